"""A base that cannot be trained is told apart by its files alone, in words; one that can be is loaded, whatever it has
called its weights."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_images
from training.adapters.fuse import fuse_base
from training.base.base import Base, load_base
from training.base.files.check import check_base
from training.base.files.folder import find_base
from training.base.files.outline import outline
from training.base.files.weights import find_weights
from training.errors import UserError
from training.run.submission import read_manifest, submit
from training.storage.storage import open_storage

WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A tiny base of one's own to break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


def edit(file: Path, **news: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **news}))


def inpainting(folder: Path) -> None:
    edit(folder / "unet/config.json", in_channels=9)


def as_pickles(folder: Path) -> None:
    for stem in WEIGHTS:
        (folder / f"{stem}.safetensors").rename(folder / f"{stem}.bin")


def cut_short(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def as_pointer(folder: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


CANNOT: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda folder: edit(folder / "model_index.json", _class_name="StableCascadeDecoderPipeline"),
        r"is a StableCascadeDecoderPipeline, which cannot be trained.*StableDiffusionPipeline",
    ),
    (inpainting, r"is an inpainting model: its UNet takes 9 channels, not the 4"),
    (lambda folder: edit(folder / "unet/config.json", in_channels=8), r"a model that edits pictures"),
    (as_pickles, r"unet/ has its weights as a pickle \(diffusion_pytorch_model.bin\).*\.safetensors"),
    (cut_short, r"is cut short: it has .* Download it again"),
    (as_pointer, r"pointer of Git LFS: run `git lfs pull`"),
    (lambda folder: (folder / "text_encoder/model.safetensors").unlink(), r"text_encoder/ has no weights"),
    (lambda folder: edit(folder / "unet/config.json", addition_embed_type="text_time"), r"addition_embed_type"),
    (lambda folder: edit(folder / "unet/config.json", cross_attention_dim=64), r"width 64.*writes 32"),
    (lambda folder: edit(folder / "text_encoder/config.json", architectures=["T5Model"]), r"text_encoder is a T5Model"),
    (lambda folder: (folder / "vae/config.json").write_text("{"), r"is no JSON object"),
    (lambda folder: shutil.rmtree(folder / "tokenizer"), r"has no tokenizer"),
    (lambda folder: (folder / "scheduler/scheduler_config.json").unlink(), r"has no scheduler"),
]


@pytest.mark.parametrize(("damage", "reason"), CANNOT)
def test_a_base_that_cannot_be_trained_says_why(damage: Callable[[Path], object], reason: str, folder: Path) -> None:
    damage(folder)
    for read in (lambda: check_base("mine", folder), lambda: outline(str(folder)), lambda: load_base(str(folder))):
        with pytest.raises(UserError, match=reason):
            read()


def test_a_manifest_on_such_a_base_is_refused_and_nothing_is_submitted(folder: Path, tmp_path: Path) -> None:
    inpainting(folder)
    tiny_images(tmp_path / "rusty")
    manifest = tmp_path / "pets.yaml"
    manifest.write_text(
        f"version: 1\nname: pets\nbase: {folder}\nsubjects: [{{id: rusty, class: dog, images: rusty}}]\n"
    )
    for ask in (read_manifest, lambda path: submit(path, open_storage(str(tmp_path / "storage")))):
        with pytest.raises(UserError, match="inpainting"):
            ask(manifest)
    assert not (tmp_path / "storage").exists()


def test_it_is_said_without_torch(folder: Path) -> None:
    inpainting(folder)
    code = (
        "import sys; from training.base.files.outline import outline; from training.errors import UserError\n"
        f"try: outline({str(folder)!r})\n"
        "except UserError: sys.exit('torch' in sys.modules)\n"
        "sys.exit('not refused')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- weights by other names


def as_variant(folder: Path, variant: str) -> None:
    for stem in WEIGHTS:
        plain = folder / f"{stem}.safetensors"
        halves = {name: tensor.half() for name, tensor in load_file(plain).items()}
        save_file(halves, folder / f"{stem}.{variant}.safetensors", {"format": "pt"})
        plain.unlink()


def in_shards(folder: Path, variant: str = "") -> None:
    """As diffusers and transformers write large models, also those of a variant."""
    for stem in WEIGHTS:
        plain = folder / f"{stem}.safetensors"
        tensors = load_file(plain)
        place: dict[str, str] = {}
        for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
            shard = f"{Path(stem).name}{variant}-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in names}, plain.parent / shard, {"format": "pt"})
            place |= dict.fromkeys(names, shard)
        index = {"metadata": {"total_size": plain.stat().st_size}, "weight_map": place}
        (folder / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))
        plain.unlink()


@pytest.mark.parametrize(
    "rename",
    [lambda f: as_variant(f, "fp16"), lambda f: as_variant(f, "non_ema"), in_shards, lambda f: in_shards(f, ".bf16")],
    ids=["fp16", "non_ema", "shards", "shards of bf16"],
)
def test_weights_by_other_names_are_the_same_base(rename: Callable[[Path], None], folder: Path, tiny: Base) -> None:
    rename(folder)
    facts = outline(str(folder))
    base = load_base(str(folder), device="cpu")
    for component, theirs in tiny.parts.models.items():
        for name, tensor in theirs.state_dict().items():
            assert torch.allclose(base.parts.models[component].state_dict()[name], tensor, atol=1e-3, rtol=1e-3), name
    assert facts.layers == outline(str(tiny.folder)).layers
    fuse_base(str(folder), [], folder / "fused")
    assert load_base(str(folder / "fused"), device="cpu").facts == tiny.facts


def test_plain_weights_go_before_variants(folder: Path) -> None:
    plain = folder / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(plain, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert find_weights(folder, "unet") == ((plain,), None)


def test_a_hub_id_is_refused_before_its_weights_are_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_base("owner/model") == folder and "*/*.safetensors" in asked
    asked.clear()
    inpainting(folder)
    with pytest.raises(UserError, match="'owner/model' is an inpainting model"):
        find_base("owner/model")
    assert asked and not any("safetensors" in pattern for pattern in asked)


# -- one file


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"conditioner.embedders.0.x": (2,)}, "it is a refiner of Stable Diffusion XL"),
        ({"lora_unet_a.lora_down.weight": (2,)}, "an adapter, not a base"),
        (
            {
                "cond_stage_model.model.token_embedding.weight": (2,),
                "model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3),
            },
            "inpainting",
        ),
    ],
)
def test_a_checkpoint_of_another_kind_is_named(
    keys: dict[str, tuple[int, ...]], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)  # no process is started to find it out
    save_file({name: torch.zeros(shape) for name, shape in keys.items()}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=reason):
        find_base(str(tmp_path / "other.safetensors"))
