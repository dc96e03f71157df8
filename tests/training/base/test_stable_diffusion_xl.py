"""What Stable Diffusion XL has beside the laws of all families: sizes, two encoders, zeros, a VAE that overflows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from diffusers import StableDiffusionXLPipeline

from tests.families import write_family
from tests.original import original_unet
from tests.tiny import tiny_images
from training.__main__ import main
from training.adapters.adapter import Adapter, LowRank, check_adapter, load_adapter
from training.adapters.formats.formats import export_adapter, import_adapter, label_of
from training.adapters.formats.kohya import write_kohya
from training.adapters.layout import find_sites
from training.adapters.tensor_file import read_tensors
from training.base.base import Base, load_base
from training.base.families.sgm import sgm_paths
from training.base.family import RowFacts
from training.base.files.check import check_base
from training.base.files.outline import outline
from training.base.words import first_vector
from training.errors import UserError
from training.storage.registry import Registry
from training.storage.storage import open_storage
from training.trainer.latents import load_latents


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("sdxl", tmp_path_factory.mktemp("xl"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A base of one's own to change."""
    return Path(shutil.copytree(whole, tmp_path / "base"))


@pytest.fixture(scope="module")
def xl(whole: Path) -> Base:
    return load_base(str(whole), device="cpu")


def edit(file: Path, **news: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **news}))


def test_facts_of_two_encoders(xl: Base) -> None:
    facts = xl.facts
    assert (facts.text_encoders, facts.word_widths, facts.word_width) == (
        ("text_encoder", "text_encoder_2"),
        (32, 24),
        56,
    )
    assert (facts.cell_px, facts.multiple_px, facts.resolution, facts.sampler) == (2, 4, 16, "euler")


@torch.no_grad()
def test_sizes_and_crop_move_the_output_and_drawn_pictures_have_their_own(xl: Base) -> None:
    conds, x, times = xl.encode(["a dog"]), torch.randn(1, 4, 8, 12), torch.tensor([500.0])
    drawn = xl.predict(x, times, conds)
    assert torch.equal(xl.predict(x, times, conds, [RowFacts((16, 24), (0, 0))]), drawn)
    seen = [xl.predict(x, times, conds, [RowFacts(*of)]) for of in (((40, 24), (0, 0)), ((16, 40), (0, 0)))]
    seen += [xl.predict(x, times, conds, [RowFacts((16, 24), crop)]) for crop in ((5, 0), (0, 5))]
    for index, one in enumerate([drawn, *seen]):
        assert all((one - other).abs().max() > 1e-4 for other in [drawn, *seen][:index])


@torch.no_grad()
def test_no_prompt_is_zeros_where_the_base_asks_for_it(folder: Path) -> None:
    for asked in (True, False):
        edit(folder / "model_index.json", force_zeros_for_empty_prompt=asked)
        (empty,) = load_base(str(folder), device="cpu").encode([""])
        assert [bool(part.any()) for part in empty.values()] == [not asked] * 2


@torch.no_grad()
def test_a_word_has_a_vector_of_each_encoder(xl: Base) -> None:
    """`<s1>` with the vectors of `dog` is `dog`, for the pooled prompt too, which is read at the mark of the end."""
    vector = torch.cat([
        first_vector(xl.parts.tokenizers[name], xl.parts.models[name].get_input_embeddings(), "dog")  # type: ignore[operator]
        for name in xl.facts.text_encoders
    ])  # fmt: skip
    assert torch.equal(xl.word_start("dog"), vector)
    (word,) = xl.encode(["a photo of <s1> on the beach"], [{"<s1>": vector[None]}])
    (plain,) = xl.encode(["a photo of dog on the beach"])
    assert all(torch.equal(word[name], plain[name]) for name in plain)


@torch.no_grad()
def test_a_long_prompt_keeps_the_pooled_prompt_of_its_first_chunk(xl: Base) -> None:
    short, long = "a dog on the beach in the snow on the grass on the water in", " of the red toy"
    (one,), (two,) = xl.encode([short], chunks=2), xl.encode([short + long], chunks=2)
    assert two["states"].shape == (32, 56)
    assert torch.equal(one["pooled"], two["pooled"]) and torch.equal(one["states"][:16], two["states"][:16])
    assert not torch.equal(one["states"][16:], two["states"][16:])


def test_the_vae_is_in_fp32_where_fp16_would_overflow(folder: Path) -> None:
    for upcast, dtype in ((True, torch.float32), (False, torch.float16)):
        edit(folder / "vae/config.json", force_upcast=upcast)
        base = load_base(str(folder), device="cpu", dtype=torch.float16)
        assert {p.dtype for p in base.parts.models["vae"].parameters()} == {dtype}
        assert {p.dtype for p in base.denoiser.parameters()} == {torch.float16}
        mean, std = base.to_latents(torch.zeros(1, 3, 16, 16))
        assert mean.dtype == dtype and torch.isfinite(base.to_pixels(mean + std)).all()


def test_a_schedule_without_an_offset_is_sampled_without_one(folder: Path) -> None:
    """Only the pipeline of 1.x and 2.x sets the offset of schedulers that say none."""
    edit(folder / "scheduler/scheduler_config.json", steps_offset=0)
    assert check_base("mine", folder).process.schedule("euler", 4).table_TK[-1, 0] == 0


# -- files


def test_layers_are_named_as_in_the_original_checkpoint(xl: Base) -> None:
    unet: Any = xl.denoiser
    originals = dict(zip(unet.state_dict(), original_unet(unet), strict=True))
    sites = find_sites("unet", unet, xl.facts.layers)
    paths = [site.key.removeprefix("unet.") for site in sites]
    named = sgm_paths(paths)
    for path in paths:
        assert originals[f"{path}.weight"] == f"model.diffusion_model.{named[path]}.weight"


def test_a_kohya_file_of_another_program_is_read(xl: Base) -> None:
    """Its names, and its alpha: half the rank halves the change."""
    layers = "text_model.encoder.layers"
    names = {
        "lora_unet_input_blocks_3_1_proj_out": "unet.down_blocks.1.attentions.0.proj_out",
        "lora_unet_middle_block_1_proj_in": "unet.mid_block.attentions.0.proj_in",
        "lora_unet_output_blocks_1_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
        "lora_te1_text_model_encoder_layers_1_mlp_fc1": f"text_encoder.{layers}.1.mlp.fc1",
        "lora_te2_text_model_encoder_layers_2_self_attn_q_proj": f"text_encoder_2.{layers}.2.self_attn.q_proj",
        "lora_te2_text_projection": "text_encoder_2.text_projection",
    }
    shapes = outline(str(xl.folder)).shapes
    tensors: dict[str, torch.Tensor] = {}
    for name, module in names.items():
        out, *down = shapes[module]
        tensors[f"{name}.lora_down.weight"] = torch.ones(4, *down)
        tensors[f"{name}.lora_up.weight"] = torch.ones(out, 4, *(1,) * (len(down) - 1))
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    file = {"some.safetensors": safetensors.torch.save(tensors)}
    adapter = import_adapter(file, shapes, outline(str(xl.folder)).names)
    assert adapter.modules.keys() == set(names.values())
    check_adapter(adapter, shapes, 4)
    assert all(torch.equal(low.delta(), torch.full_like(low.delta(), 2.0)) for low in adapter.modules.values())


def test_a_kohya_file_says_what_it_is_for(xl: Base) -> None:
    (site,) = find_sites("text_encoder", xl.models["text_encoder"], ["encoder.layers.0.mlp.fc1"])
    adapter = Adapter({site.key: LowRank(torch.ones(1, 32), torch.ones(37, 1))})
    tensors, metadata = read_tensors(write_kohya(adapter, label_of("rusty", xl.facts), outline(str(xl.folder)).names))
    assert {key.partition(".")[0] for key in tensors} == {"lora_te1_text_model_encoder_layers_0_mlp_fc1"}
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_v2"] == "False"


@torch.no_grad()
def test_a_words_file_is_read_by_diffusers(xl: Base) -> None:
    vectors = torch.randn(2, 56).half()
    files = export_adapter(Adapter({}, {"<s1>": vectors}, {"word_widths": "32,24"}), "peft")
    assert list(files) == ["embeddings/s1.safetensors"]
    tensors = read_tensors(files["embeddings/s1.safetensors"]).tensors
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"clip_l": (2, 32), "clip_g": (2, 24)}
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl.folder, local_files_only=True)
    for key, which in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = (getattr(pipeline, part + which) for part in ("text_encoder", "tokenizer"))
        pipeline.load_textual_inversion(tensors[key].float(), token="<s1>", text_encoder=encoder, tokenizer=tokenizer)
    states, _, pooled, _ = pipeline.encode_prompt("a photo of <s1> dog", do_classifier_free_guidance=False)
    (cond,) = xl.encode(["a photo of <s1> dog"], [{"<s1>": vectors.float()}])
    assert torch.allclose(cond["states"], states[0], atol=1e-5) and torch.allclose(cond["pooled"], pooled[0], atol=1e-5)


def test_a_words_file_of_another_program_is_named_by_its_file() -> None:
    tensors = {"clip_g": torch.ones(1, 24), "clip_l": torch.zeros(1, 32)}
    adapter = import_adapter({"words/easy.safetensors": safetensors.torch.save(tensors)}, ())
    assert torch.equal(adapter.embeddings["easy"], torch.tensor([[0.0] * 32 + [1.0] * 24]))
    assert adapter.metadata == {"word_widths": "32,24"}
    tensors["clip_g"] = torch.ones(2, 24)
    with pytest.raises(UserError, match="not as many vectors for each text encoder"):
        import_adapter({"easy.safetensors": safetensors.torch.save(tensors)}, ())


def test_a_manifest_on_it_is_trained_and_published(xl: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From photos to an adapter of UNet, both text encoders and a word, which its file says how to part."""
    tiny_images(tmp_path / "rusty", side=40)
    subject = {
        "id": "rusty", "images": "rusty", "class": "dog", "instance_prompt": "a photo of <s1> dog",
        "words": {"tokens": ["<s1>"]}, "prior": {"images": 2, "steps": 2}, "samples": {"images": 1, "steps": 2},
        "train": {"max_steps": 2, "learning_rate": 1e-2, "text_encoder_learning_rate": 1e-2, "crop": "bucket"},
        "evaluate": {"enabled": False},
    }  # fmt: skip
    manifest = {"version": 1, "name": "pets", "base": str(xl.folder), "subjects": [subject]}
    (tmp_path / "pets.yaml").write_text(yaml.safe_dump(manifest))
    monkeypatch.setattr("sys.argv", ["training", str(tmp_path / "pets.yaml"), "--storage", str(tmp_path / "storage")])
    assert main() == 0
    registry = Registry(open_storage(str(tmp_path / "storage")))
    adapter = load_adapter(registry.weights(registry.resolve("default/rusty")))
    assert {key.partition(".")[0] for key, low in adapter.modules.items() if low.up.any()} == set(xl.facts.components)
    assert adapter.embeddings["<s1>"].shape == (1, 56) and adapter.metadata["word_widths"] == "32,24"
    (cached,) = (tmp_path / "storage/cache/latents").glob("*.safetensors")
    images = load_latents(open_storage(str(cached.parent)), cached.name)
    assert images is not None and {image.row.original_px for image in images} == {(40, 40)}


CANNOT: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: edit(folder / "unet/config.json", addition_embed_type="image"), r"addition_embed_type: image"),
    (lambda folder: edit(folder / "unet/config.json", addition_embed_type=None), r"addition_embed_type: None"),
    (lambda folder: edit(folder / "unet/config.json", addition_time_embed_dim=9), r"takes 68 values.*would get 74"),
    (lambda folder: edit(folder / "unet/config.json", encoder_hid_dim_type="text_proj"), r"encoder_hid_dim_type"),
    (lambda folder: edit(folder / "unet/config.json", in_channels=9), r"is an inpainting model"),
    (lambda folder: edit(folder / "text_encoder_2/config.json", hidden_size=32), r"width 56.*writes 64"),
    (
        lambda folder: edit(folder / "text_encoder_2/config.json", architectures=["CLIPTextModel"]),
        r"text_encoder_2 is a CLIPTextModel; supported is CLIPTextModelWithProjection",
    ),
    (lambda folder: shutil.rmtree(folder / "tokenizer_2"), r"has no tokenizer_2"),
    (lambda folder: shutil.rmtree(folder / "text_encoder_2"), r"no text_encoder_2/config.json"),
    (lambda folder: (folder / "text_encoder_2/model.safetensors").unlink(), r"text_encoder_2/ has no weights"),
    (lambda folder: (folder / "scheduler/scheduler_config.json").unlink(), r"has no scheduler"),
    (
        lambda folder: edit(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline"),
        r"is a StableDiffusionXLImg2ImgPipeline, which cannot be trained.*Stable Diffusion XL",
    ),
]


@pytest.mark.parametrize(("damage", "reason"), CANNOT)
def test_a_base_that_cannot_be_trained_says_why(damage: Callable[[Path], object], reason: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match=reason):
        check_base("mine", folder)
