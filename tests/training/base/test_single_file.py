"""A base in one checkpoint file: the same model as its diffusers folder, for every version."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.original import original_big_clip, original_clip, original_open_clip, original_unet, original_vae
from tests.tiny import clip_tokenizer
from tests.training.subjects import latents, spec
from training.base.base import load_base
from training.base.files.folder import find_base
from training.base.files.released import configs
from training.base.files.single_file import convert
from training.errors import UserError
from training.trainer.member import Subject
from training.trainer.pack import Pack, training_bank

Described = dict[str, dict[str, Any]]


def narrow(version: str) -> Described:
    """The real configs, with few channels and one layer a block."""
    described = dict(copy.deepcopy(configs(version)))
    if version == "xl":
        return _narrow_xl(described)
    described["unet"] |= {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1, "sample_size": 8}
    described["unet"]["attention_head_dim"] = 2
    described["vae"] |= {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
    described["text_encoder"] |= {"num_hidden_layers": 2}
    return described


def _narrow_xl(described: Described) -> Described:
    described["unet"] |= {"block_out_channels": [32, 64, 64], "layers_per_block": 1, "sample_size": 8}
    described["unet"] |= {"attention_head_dim": [2, 4, 4], "transformer_layers_per_block": [1, 1, 2]}
    described["unet"] |= {"cross_attention_dim": 32 + 48, "projection_class_embeddings_input_dim": 6 * 256 + 40}
    described["vae"] |= {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
    for name, width in (("text_encoder", 32), ("text_encoder_2", 48)):
        sizes = {"num_hidden_layers": 2, "hidden_size": width, "intermediate_size": 64, "num_attention_heads": 2}
        described[name] |= sizes | {"projection_dim": 40}
    return described


def shallow(version: str) -> Described:
    """The real configs at full width, one layer a block."""
    described = dict(copy.deepcopy(configs(version)))
    described["unet"] |= {"layers_per_block": 1}
    described["vae"] |= {"layers_per_block": 1}
    described["text_encoder"] |= {"num_hidden_layers": 2}
    return described


def write_checkpoint(file: Path, version: str, described: Described) -> dict[str, torch.nn.Module]:
    """The checkpoint of random models, which are returned by component."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(described["unet"])
    vae = AutoencoderKL.from_config(described["vae"])
    text = CLIPTextModel(CLIPTextConfig(**described["text_encoder"]))
    models: dict[str, torch.nn.Module] = {"unet": unet, "vae": vae, "text_encoder": text}
    state = original_unet(unet) | original_vae(vae)
    if version == "xl":
        second = CLIPTextModelWithProjection(CLIPTextConfig(**described["text_encoder_2"]))
        models["text_encoder_2"] = second
        state |= original_clip(text, "conditioner.embedders.0.") | original_big_clip(second)
    else:
        state |= original_clip(text) if version == "1" else original_open_clip(text)
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, file)
    return models


def check(version: str, described: Described, folder: Path) -> None:
    models = write_checkpoint(folder / "model.safetensors", version, described)
    convert(folder / "model.safetensors", folder / "made", described)
    base = load_base(str(folder / "made"), device="cpu")
    assert base.parts.models.keys() == models.keys()
    for component, theirs in models.items():
        found = base.parts.models[component].state_dict()
        for name, tensor in theirs.state_dict().items():
            if "position_ids" not in name:
                assert torch.equal(found[name], tensor.half().float()), name
    assert clip_tokenizer(base)("a photo of sks person").input_ids == [49406, 320, 1125, 539, 48136, 2533, 49407]
    for encoder, tokenizer in base.parts.tokenizers.items():
        assert tokenizer.pad_token_id == described[encoder]["pad_token_id"]
    scheduler = json.loads((base.folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler.items() >= described["scheduler"].items()
    made = spec("a", train={"max_steps": 1, "resolution": 64})
    targets: dict[str, Sequence[str]] = dict.fromkeys(base.facts.text_encoders, made.lora.text_encoder_targets)
    targets["unet"] = made.lora.targets
    pack = Pack(base, training_bank(base, slots=1, rank=8, targets=targets))
    pack.join(Subject(made, latents(made.filled_instance_prompt, 5, 0), latents(made.filled_class_prompt, 5, 1)))
    (report,) = pack.step()
    assert report.failure is None and report.grad_norm > 0
    pack.close()


@pytest.mark.parametrize("version", ["1", "2", "xl"])
def test_a_checkpoint_is_read_weight_by_weight_and_trains(version: str, tmp_path: Path) -> None:
    check(version, narrow(version), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
def test_full_width(version: str, tmp_path: Path) -> None:
    check(version, shallow(version), tmp_path)


def test_what_is_no_checkpoint_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no such checkpoint is refused in words, and nothing is left behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "other.safetensors"
    save_file({"some.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="has not the keys of a Stable Diffusion"):
        find_base(str(file))
    assert not list((tmp_path / "cache").rglob("model_index.json"))


def test_what_the_file_does_not_say_can_stand_beside_it(tmp_path: Path) -> None:
    from training.base.files.single_file import _describe

    file = tmp_path / "two.safetensors"
    save_file({"cond_stage_model.model.token_embedding.weight": torch.zeros(2)}, file)
    assert _describe(file)["scheduler"]["prediction_type"] == "v_prediction"
    file.with_suffix(".json").write_text(json.dumps({"prediction_type": "epsilon", "resolution": 512}))
    assert _describe(file)["scheduler"]["prediction_type"] == "epsilon"
    assert _describe(file)["unet"]["sample_size"] == 64


def test_a_checkpoint_of_xl_says_what_it_predicts_and_where_its_noise_ends(tmp_path: Path) -> None:
    from training.base.files.single_file import _describe

    key = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
    for marks, prediction, spacing in (((), "epsilon", "leading"), (("v_pred", "ztsnr"), "v_prediction", "trailing")):
        save_file({name: torch.zeros(2) for name in (key, *marks)}, tmp_path / "xl.safetensors")
        described = _describe(tmp_path / "xl.safetensors")
        scheduler = described["scheduler"]
        assert (scheduler["prediction_type"], scheduler["timestep_spacing"]) == (prediction, spacing)
        assert scheduler.get("rescale_betas_zero_snr", False) == bool(marks)
        assert described["unet"]["sample_size"] == 128
