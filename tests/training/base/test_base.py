"""The base: what it is found by, what it says of itself, and that idle parts leave the device."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.training.subjects import subject
from training.base.base import Base, load_base
from training.base.folder import find_base, hash_base
from training.errors import UserError
from training.trainer.pack import Pack


def test_the_embedded_base_is_found_and_is_a_plain_pipeline() -> None:
    folder = find_base("pocket")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    base = load_base("pocket", device="cpu")
    assert base.resolution == pipeline.vae.config.sample_size
    assert base.prediction_type == pipeline.scheduler.config.prediction_type


def test_unknown_bases_say_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Embedded: pocket"):
        find_base("pockett")
    with pytest.raises(UserError, match="no model_index.json"):
        find_base(str(tmp_path))


def test_the_hash_is_of_the_content(tiny_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    assert hash_base(copy) == hash_base(tiny_folder)
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    assert hash_base(copy) != hash_base(tiny_folder)


def test_encode_and_decode_use_the_pipelines_scale(tiny: Base) -> None:
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, _ = tiny.encode_images(pixels)
    with torch.no_grad():
        expected = tiny.vae.encode(pixels).latent_dist.mean * tiny.vae.config.scaling_factor
    assert torch.equal(mean, expected)
    assert tiny.decode(mean).shape == pixels.shape


def test_parts_that_nobody_needs_are_at_rest(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device is short of memory. The meta device cannot compute, so resting there is really being away."""
    moves: list[tuple[str, str]] = []
    base = dataclasses.replace(tiny, rest=torch.device("meta"))
    monkeypatch.setattr(tiny.text_encoder, "to", lambda device: moves.append(("text_encoder", str(device))))
    pack = Pack(base, slots=2, rank=8, targets={"unet": ("to_q",), "text_encoder": ("q_proj",)})
    pack.join(subject("frozen", lora={"text_encoder": False, "targets": ["to_q"]}))
    assert moves[-1] == ("text_encoder", "meta")
    trains = {"targets": ["to_q"], "text_encoder_targets": ["q_proj"]}
    pack.join(subject("trained", lora=trains))
    assert moves[-1] == ("text_encoder", "cpu")
    pack.leave("trained")
    assert moves[-1] == ("text_encoder", "meta")
    pack.close()
