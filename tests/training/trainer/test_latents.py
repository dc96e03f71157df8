"""Latents of photos: sizes, prompts, and what comes back from the storage."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.subjects import subject
from training.base.base import Base
from training.base.family import RowFacts
from training.base.noise.ddpm import Ddpm
from training.manifest.subject import TrainSpec
from training.photos.photos import Photo
from training.storage.storage import open_storage
from training.trainer.batch import Turn, make_batch
from training.trainer.latents import (
    encode_photos,
    load_latents,
    photo_prompts,
    photos_key,
    posteriors,
    same_sizes,
    save_latents,
)


def train(**settings: Any) -> TrainSpec:
    return TrainSpec.model_validate(settings)


def photo(seed: int, size: tuple[int, int], caption: str | None = None, cut_out: bool = False) -> Photo:
    """Noise; `cut_out`: a square in the middle of white is the subject."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    inside = np.zeros((height, width), bool)
    inside[height // 4 : -height // 4, width // 4 : -width // 4] = True
    mask = Image.fromarray(inside.astype(np.uint8) * 255) if cut_out else None
    if cut_out:
        pixels[~inside] = 255
    return Photo(f"{seed}.png", Image.fromarray(pixels), str(seed), size, caption, mask)


PHOTOS = (photo(0, (20, 20), "on the grass"), photo(1, (20, 20), "on the beach", cut_out=True), photo(2, (20, 20)))


def test_every_photo_weighs_the_same_and_a_new_background_takes_the_caption_away(tiny: Base) -> None:
    spec = train(backgrounds=2, flip=True)
    found = encode_photos(tiny, PHOTOS, spec, "a sks dog")
    assert found.prompts == (
        *("on the grass",) * 6,
        *("on the beach",) * 2,
        *("a sks dog",) * 4,
        *("a sks dog",) * 6,
    )
    means = [image.mean_CHW for image in found.images]
    assert torch.equal(means[0], means[2]) and not torch.equal(means[6], means[8])


def test_backgrounds_without_a_mask_are_copies(tiny: Base) -> None:
    plain, repeated = (encode_photos(tiny, PHOTOS[:1], train(backgrounds=n, flip=False), "x") for n in (0, 3))
    assert all(torch.allclose(image.mean_CHW, plain.images[0].mean_CHW, atol=1e-6) for image in repeated.images)


def test_buckets_keep_the_shape_of_each_photo(tiny: Base) -> None:
    photos = (photo(0, (30, 20)), photo(1, (20, 30)), photo(2, (20, 20)), photo(3, (33, 22)))
    found = encode_photos(tiny, photos, train(crop="bucket", flip=False), "x")
    shapes = [tuple(image.mean_CHW.shape[1:]) for image in found.images]
    assert shapes[0] == shapes[3] and shapes[0][0] < shapes[0][1]
    assert shapes[1] == shapes[0][::-1] and shapes[2][0] == shapes[2][1]
    assert same_sizes([image.mean_CHW for image in found.images]) == [[0, 3], [1], [2]]


@pytest.mark.parametrize("crop", ["center", "bucket"])
def test_what_is_kept_comes_back(tiny: Base, tmp_path: Path, crop: str) -> None:
    photos = (photo(0, (30, 20), "there"), photo(1, (20, 30), cut_out=True))
    spec = train(crop=crop, backgrounds=1)
    storage, key = open_storage(str(tmp_path)), photos_key(tiny, photos, spec)
    made = encode_photos(tiny, photos, spec, "x")
    save_latents(storage, key, made.images)
    back = load_latents(storage, key)
    assert back is not None and len(back) == len(made)
    for one, other in zip(made.images, back, strict=True):
        assert torch.equal(one.mean_CHW, other.mean_CHW) and torch.equal(one.std_CHW, other.std_CHW)
        assert one.row == other.row
    assert {image.row.original_px for image in back} == {(20, 30), (30, 20)}
    assert photo_prompts(photos, spec, "x", len(back)) == made.prompts


def test_what_was_drawn_comes_back_as_drawn(tmp_path: Path) -> None:
    storage, drawn = open_storage(str(tmp_path)), posteriors(torch.randn(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
    save_latents(storage, "cache/drawn", drawn)
    back = load_latents(storage, "cache/drawn")
    assert back is not None and [image.row for image in back] == [RowFacts()] * 2


@pytest.mark.parametrize("crop", ["center", "random"])
def test_each_variant_knows_its_photo_and_its_crop(tiny: Base, crop: str) -> None:
    """A photo that covers as 40 x 16 px is cropped somewhere in 24 free pixels; its mirror image at the other end."""
    one = dataclasses.replace(photo(0, (50, 20)), source_size=(500, 200))
    found = encode_photos(tiny, [one], train(crop=crop, crops=3, resolution=16), "x")
    rows = [image.row for image in found.images]
    assert {row.original_px for row in rows} == {(200, 500)}
    for row, mirrored in zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True):
        assert row.crop_px and mirrored.crop_px
        assert row.crop_px[0] == mirrored.crop_px[0] == 0 and row.crop_px[1] + mirrored.crop_px[1] == 24
    assert len({row.crop_px for row in rows}) == (1 if crop == "center" else 6)


def test_a_batch_tells_each_row_what_it_was_cropped_from() -> None:
    one = subject("a", train={"batch_size": 3}, prior={"enabled": False})
    batch = make_batch([Turn(one.spec, one.instance, None, 0, 0)], Ddpm({}))
    assert len(set(batch.rows)) == 3
    for row, latent in zip(batch.rows, batch.latents, strict=True):
        (image,) = [image for image in one.instance.images if image.row == row]
        assert (latent - image.mean_CHW).abs().max() < 1  # a sample of that image's, whose std is 0.1
    assert batch.parts([0] * 3, 2)[1].rows == batch.rows[2:]


def test_the_key_knows_crop_and_backgrounds(tiny: Base) -> None:
    specs = [train(), train(crop="bucket"), train(backgrounds=1)]
    assert len({photos_key(tiny, PHOTOS, spec) for spec in specs}) == 3
