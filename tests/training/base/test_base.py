"""The base: what it is found by, and what it says of itself."""

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny import ddpm, vae
from training.base.base import Base, load_base
from training.base.files.check import check_base
from training.base.files.folder import find_base, hash_base
from training.errors import UserError
from training.storage import file_hash
from training.storage.file_hash import hash_file


def test_the_embedded_base_is_found_and_is_a_plain_pipeline() -> None:
    folder = find_base("pocket")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    base = load_base("pocket", device="cpu")
    assert base.facts.resolution == pipeline.vae.config.sample_size
    assert ddpm(base).prediction_type == pipeline.scheduler.config.prediction_type


def test_a_base_recommends_how_it_is_used(tiny_folder: Path, tmp_path: Path) -> None:
    pocket = check_base("pocket", find_base("pocket")).facts
    assert (pocket.steps, pocket.guidance_scale, pocket.sampler, pocket.judge) == (20, 3.0, "ddim", "pocket-judge")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    (copy / "dreamfleet.json").write_text('{"steps": 4, "sampler": "euler"}')
    facts, plain = check_base("copy", copy).facts, check_base("tiny", tiny_folder).facts
    assert (facts.steps, facts.sampler, facts.guidance_scale) == (4, "euler", plain.guidance_scale)
    assert hash_base(copy) == hash_base(tiny_folder)  # adapters of the one are adapters of the other
    (copy / "dreamfleet.json").write_text('{"stepps": 4}')
    with pytest.raises(UserError, match="stepps is 4: .*Known keys: steps, guidance_scale, sampler, judge"):
        check_base("copy", copy)


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


class Reads:
    """The sizes of the files that are read to be hashed. `forget` does what the start of another process does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.sizes: list[int] = []
        digest = hashlib.file_digest

        def counted(stream: Any, name: str) -> Any:
            self.sizes.append(os.fstat(stream.fileno()).st_size)
            return digest(stream, name)

        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(hashlib, "file_digest", counted)
        monkeypatch.setattr(file_hash, "KEPT_BYTES", 1000)
        monkeypatch.setattr(file_hash, "SETTLED_SECONDS", 0.0)

    def forget(self) -> None:
        file_hash._known.clear()


def test_large_files_are_read_once_between_all_processes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "base"
    shutil.copytree(tiny_folder, copy)
    reads = Reads(monkeypatch, tmp_path / "cache")
    first, once = hash_base(copy), len(reads.sizes)
    assert hash_base(copy) == first and len(reads.sizes) == once
    reads.forget()
    assert hash_base(copy) == first
    assert reads.sizes[once:] == [size for size in reads.sizes[:once] if size < 1000]


def test_a_file_of_the_same_size_and_time_is_still_told_from_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Reads(monkeypatch, tmp_path / "cache")
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 2000)
    before, times = hash_file(file), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    time.sleep(0.02)  # the file system's clock ticks every few milliseconds
    file.write_bytes(b"b" * 2000)
    os.utime(file, ns=times)
    assert hash_file(file) != before


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(file_hash, "SETTLED_SECONDS", 3600.0)
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 2000)
    hash_file(file)
    hash_file(file)
    assert len(reads.sizes) == 2


def test_encode_and_decode_use_the_pipelines_scale(tiny: Base) -> None:
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, _ = tiny.to_latents(pixels)
    with torch.no_grad():
        expected = vae(tiny).encode(pixels).latent_dist.mean * vae(tiny).config.scaling_factor
    assert torch.equal(mean, expected)
    assert tiny.to_pixels(mean).shape == pixels.shape


def test_many_images_go_through_the_vae_a_few_at_a_time(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.rand(5, 3, 16, 16) * 2 - 1
    (mean, std), whole = tiny.to_latents(pixels), tiny.to_pixels(torch.ones(5, 4, 8, 8))
    sizes: list[int] = []
    for layer in (vae(tiny).encoder, vae(tiny).decoder):
        layer.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr("training.base.footprint.VAE_PIXELS", 2 * 16 * 16)
    try:
        found, spread = tiny.to_latents(pixels)
        assert torch.allclose(found, mean, atol=1e-5) and torch.allclose(spread, std, atol=1e-5)
        assert torch.allclose(tiny.to_pixels(torch.ones(5, 4, 8, 8)), whole, atol=1e-5)
    finally:
        for layer in (vae(tiny).encoder, vae(tiny).decoder):
            layer._forward_pre_hooks.clear()
    assert sizes == [2, 2, 1, 2, 2, 1]
