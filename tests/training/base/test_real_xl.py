"""Stable Diffusion XL at its real size: planned from configs and headers, run on shapes alone, and once for real.

The bank sizes are checked against the released model's: 560 attention layers, 2.57 billion parameters in the UNet.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.training.subjects import latents, spec
from training.adapters.bank import Bank
from training.adapters.layout import find_sites
from training.base.base import Base
from training.base.families import open_family
from training.base.family import Parts, RowFacts
from training.base.files.outline import Outline, outline
from training.base.files.released import configs
from training.base.files.single_file import write_configs
from training.base.noise.process import row_losses
from training.manifest.defaults import filled
from training.manifest.manifest import Manifest, parse_manifest
from training.manifest.plan import adapter_parameters, plan_run
from training.trainer.member import Subject, initial_adapter
from training.trainer.pack import Pack, training_bank

NEEDED_BYTES = 12 * 2**30  # weights of 16 bit, one adapter's state and one row's activations
META = torch.device("meta")


def models_on_meta() -> dict[str, nn.Module]:
    """The real models: their shapes without their weights."""
    described = configs("xl", resolution=1024)
    with META:
        return {
            "unet": UNet2DConditionModel.from_config(described["unet"]),
            "vae": AutoencoderKL.from_config(described["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**described["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**described["text_encoder_2"])),
        }


def write_header(file: Path, state: dict[str, torch.Tensor]) -> None:
    """A safetensors file of 16-bit tensors whose data is a hole: it takes no room."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in state.items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    data = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(data).to_bytes(8, "little") + data)
        stream.truncate(8 + len(data) + end)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("real") / "xl"
    write_configs(made, configs("xl", resolution=1024))
    for component, model in models_on_meta().items():
        stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
        write_header(made / component / f"{stem}.safetensors", model.state_dict())
    return made


def base_of(folder: Path, models: dict[str, nn.Module], device: torch.device) -> Base:
    family = open_family(folder, "xl")
    for model in models.values():
        model.requires_grad_(False).eval()
    tokenizers = dict.fromkeys(family.facts.text_encoders, family.tokenizer())
    return Base("xl", "", folder, family, Parts(models, tokenizers, device, torch.bfloat16))


def targets_of(base: Base) -> dict[str, Sequence[str]]:
    facts = base.facts
    return {facts.denoiser: facts.targets, **dict.fromkeys(facts.text_encoders, facts.text_targets)}


def planned(entry: dict[str, Any], base: Outline) -> Manifest:
    made = parse_manifest(yaml.safe_dump({"version": 1, "name": "plan", "subjects": [entry]}))
    return filled(made, base.facts)


def test_it_is_planned_from_configs_and_headers(folder: Path) -> None:
    base = outline(str(folder))
    assert (base.facts.resolution, base.facts.cell_px, base.facts.multiple_px) == (1024, 8, 32)
    assert base.facts.word_widths == (768, 1280)
    assert base.parameters == pytest.approx(3.469e9, rel=1e-3)
    wanted = tuple(f".{end}" for end in base.facts.targets)
    assert sum(f".{name}".endswith(wanted) for name in base.layers["unet"]) == 560
    entry: dict[str, Any] = {"id": "a", "images": "x", "class": "dog", "lora": {"rank": 16, "text_encoder": False}}
    manifest = planned(entry, base)
    parameters = adapter_parameters(manifest.subjects[0], base)
    assert 2 * parameters == pytest.approx(46e6, rel=0.02)  # a slot that serves
    plan = plan_run(manifest, base)
    assert plan.packs[0].state_bytes == 16 * parameters == pytest.approx(372e6, rel=0.01)
    assert plan.packs[0].profile.resolution == 1024
    assert 28_000 < plan.packs[0].memory_mb < 33_000  # of it 22 GB are two rows' activations
    entry["train"] = {"gradient_checkpointing": True}
    assert 10_000 < plan_run(planned(entry, base), base).packs[0].memory_mb < 14_000


def test_a_training_and_a_serving_step_run_on_its_shapes(folder: Path) -> None:
    """Every layer is found, every adapter's gradient arrives, at 1024 px."""
    models = {name: model.to(torch.bfloat16) for name, model in models_on_meta().items()}
    base = base_of(folder, models, META)
    sites = {name: find_sites(name, base.models[name], ends) for name, ends in targets_of(base).items()}
    assert len(sites["unet"]) == 560
    assert {site.key for found in sites.values() for site in found} <= outline(str(folder)).shapes.keys()
    for end in base.facts.layers:
        assert find_sites("unet", base.denoiser, [end]), end
    bank = Bank(sites, slots=2, rank=16, device=META)
    row = bank.pack(initial_adapter(base, list(sites), spec("a", lora={"rank": 16})))
    for slot in range(2):
        bank.put(slot, row)
    weights = bank.weights_SP.clone().requires_grad_()
    x = torch.zeros(2, 4, 128, 128, device=META, dtype=torch.bfloat16)
    rows = [RowFacts((3000, 4000), (0, 170)), RowFacts()]
    bank.inject()
    for training in (True, False):
        with torch.set_grad_enabled(training), bank.reading(weights):
            routes = [bank.route(name, torch.tensor([[0], [1]]), dtype=torch.bfloat16) for name in sites]
            with bank.using(*routes):
                said = base.predict(x, torch.zeros(2, device=META), base.encode(["a dog", "a cat"]), rows)
                assert said.shape == x.shape
                if training:
                    row_losses(said, x).sum().backward()
    assert weights.grad is not None and weights.grad.shape == bank.weights_SP.shape
    pixels = torch.zeros(1, 3, 1024, 1024, device=META, dtype=torch.bfloat16)
    mean, _ = base.family.to_latents(base.parts, pixels)
    assert mean.shape == (1, 4, 128, 128) and base.family.to_pixels(base.parts, mean).shape == pixels.shape


@pytest.mark.slow
@pytest.mark.skipif(psutil.virtual_memory().available < NEEDED_BYTES, reason="needs 12 GiB of free memory")
def test_one_step_of_the_real_size_runs(folder: Path) -> None:
    """Random weights in bf16, one subject of rank 16, UNet and both text encoders, a picture of 256 px."""
    torch.manual_seed(0)
    models = {}
    for name, model in models_on_meta().items():
        models[name] = model.to(torch.bfloat16).to_empty(device="cpu")
        for path, parameter in models[name].named_parameters():
            is_scale = "norm" in path and path.endswith("weight")
            nn.init.normal_(parameter, mean=float(is_scale), std=0.02)
        for buffer_name, buffer in models[name].named_buffers():
            assert buffer_name.endswith("position_ids"), buffer_name
            buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))
    unet: Any = models["unet"]
    unet.set_attn_processor(AttnProcessor())
    base = base_of(folder, models, torch.device("cpu"))
    made = spec("a", lora={"rank": 16}, prior={"enabled": False}, train={"max_steps": 1, "resolution": 256})
    pack = Pack(base, training_bank(base, slots=1, rank=16, targets=targets_of(base)))
    pack.join(Subject(made, latents(made.filled_instance_prompt, 5, 0, ((32, 32),))))
    (report,) = pack.step()
    assert report.failure is None and report.grad_norm > 0
    moved = [key for key, low in pack.adapter("a").modules.items() if low.up.any()]
    pack.close()
    assert {key.partition(".")[0] for key in moved} == set(base.facts.components)
    assert sum(key.startswith("unet.") for key in moved) == 560
