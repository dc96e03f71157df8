"""The base: what it is found by, what it says of itself, and that idle parts leave the device."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny import ddpm, vae
from training.base.base import Base, load_base
from training.base.folder import find_base, hash_base
from training.errors import UserError


def test_the_embedded_base_is_found_and_is_a_plain_pipeline() -> None:
    folder = find_base("pocket")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    base = load_base("pocket", device="cpu")
    assert base.facts.resolution == pipeline.vae.config.sample_size
    assert ddpm(base).prediction_type == pipeline.scheduler.config.prediction_type


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
    mean, _ = tiny.to_latents(pixels)
    with torch.no_grad():
        expected = vae(tiny).encode(pixels).latent_dist.mean * vae(tiny).config.scaling_factor
    assert torch.equal(mean, expected)
    assert tiny.to_pixels(mean).shape == pixels.shape
