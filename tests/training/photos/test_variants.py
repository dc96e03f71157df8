"""Variants are the same in every process, of the right shape, and only crops, mirrors and mild colour changes."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from training.photos import variants as variants_module
from training.photos.variants import (
    JITTERS,
    Crop,
    Face,
    assign_bucket,
    bucket_sizes,
    can_find_faces,
    cover,
    find_face,
    framed,
    on_backgrounds,
    replace_background,
    variants,
)


def picture(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


SIZES = [(64, 64), (96, 64), (50, 130), (64, 65), (300, 200), (17, 40)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", ["center", "random", "bucket"])
def test_shapes_and_repeatability(size: tuple[int, int], crop: Crop) -> None:
    image = picture(*size)
    width, height = assign_bucket(*size, bucket_sizes(32)) if crop == "bucket" else (32, 32)
    first = variants(image, 32, crop=crop, crops=3, flip=True, color_jitter=True, seed=5)
    second = variants(image, 32, crop=crop, crops=3, flip=True, color_jitter=True, seed=5)
    assert all(variant.shape == (height, width, 3) and variant.dtype == np.uint8 for variant in first)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert all(variant.flags.c_contiguous for variant in first)


def test_another_process_makes_the_same_bytes() -> None:
    code = (
        "import hashlib, numpy as np; from PIL import Image; from training.photos.variants import variants;"
        "image = Image.fromarray(np.arange(90 * 60 * 3).reshape(60, 90, 3).astype(np.uint8));"
        "made = variants(image, 32, crop='random', crops=4, flip=True, color_jitter=True, seed=9);"
        "print(hashlib.sha256(b''.join(variant.tobytes() for variant in made)).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    image = Image.fromarray(np.arange(90 * 60 * 3).reshape(60, 90, 3).astype(np.uint8))
    made = variants(image, 32, crop="random", crops=4, flip=True, color_jitter=True, seed=9)
    assert hashlib.sha256(b"".join(variant.tobytes() for variant in made)).hexdigest() == there


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", ["center", "random", "bucket"])
def test_a_variant_knows_where_its_crop_begins(size: tuple[int, int], crop: Crop) -> None:
    image = picture(*size)
    made = framed(image, 32, crop=crop, crops=3, flip=True)
    height, width, _ = made[0].pixels_HW3.shape
    whole = np.asarray(cover(image, (width, height)))
    for index, one in enumerate(made):
        seen = whole if index < len(made) // 2 else whole[:, ::-1]
        top, left = one.crop_px
        np.testing.assert_array_equal(one.pixels_HW3, seen[top : top + height, left : left + width])


@pytest.mark.parametrize("color_jitter", [False, True])
def test_flip_appends_exact_mirrors(color_jitter: bool) -> None:
    plain = variants(picture(), 32, crop="random", crops=4, color_jitter=color_jitter)
    both = variants(picture(), 32, crop="random", crops=4, color_jitter=color_jitter, flip=True)
    assert len(both) == 2 * len(plain)
    for before, kept, mirror in zip(plain, both[: len(plain)], both[len(plain) :], strict=True):
        np.testing.assert_array_equal(before, kept)
        np.testing.assert_array_equal(before[:, ::-1], mirror)


def test_the_centre_crop_is_the_middle() -> None:
    image = picture(96, 64)
    (variant,) = variants(image, 64)
    np.testing.assert_array_equal(variant, np.asarray(image)[:, 16:80])


def test_random_crops_are_places_of_the_image_and_depend_on_seed_and_image() -> None:
    image = picture(192, 64)
    made = variants(image, 64, crop="random", crops=6, seed=1)
    places = [np.asarray(image)[:, left : left + 64] for left in range(129)]
    assert len(made) == 6
    assert all(any((variant == place).all() for place in places) for variant in made)
    assert len({variant.tobytes() for variant in made}) >= 4
    other_seed = variants(image, 64, crop="random", crops=6, seed=2)
    assert {variant.tobytes() for variant in made} != {variant.tobytes() for variant in other_seed}


def test_random_crops_reach_both_ends() -> None:
    lefts = {variants_module._places(picture(68, 64), (64, 64), "random", 40, f"{seed}")[0][0] for seed in range(60)}
    assert lefts == {0, 1, 2, 3, 4}


def test_a_square_image_has_as_many_variants_as_others() -> None:
    made = variants(picture(80, 80), 64, crop="random", crops=8)
    assert len(made) == 8
    assert len({variant.tobytes() for variant in made}) == 1


def test_jitter_is_mild_and_keeps_the_plain_crop() -> None:
    grey = Image.new("RGB", (64, 64), (100, 100, 100))
    made = variants(grey, 64, color_jitter=True)
    assert len(made) == 1 + JITTERS
    assert (made[0] == 100).all()
    means = [float(variant.mean()) for variant in made[1:]]
    assert all(79 <= mean <= 121 for mean in means)
    assert len(set(means)) == JITTERS
    structured = variants(picture(), 64, color_jitter=True)
    plain = structured[0].astype(float).ravel()
    assert all(np.corrcoef(plain, variant.astype(float).ravel())[0, 1] > 0.97 for variant in structured[1:])


def test_cover_keeps_proportions_and_returns_fitting_images_as_they_are() -> None:
    image = picture(96, 64)
    assert cover(image, (64, 64)) is image
    assert cover(image, (32, 32)).size == (48, 32)
    assert cover(picture(10, 40), (20, 20)).size == (20, 80)


def test_face_crop_without_a_detector_is_the_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants_module, "can_find_faces", lambda: False)
    assert find_face(picture()) is None
    np.testing.assert_array_equal(variants(picture(), 64, crop="face")[0], variants(picture(), 64)[0])


@pytest.mark.parametrize(("centre", "left"), [(10, 0), (48, 16), (90, 32)])
def test_face_crop_centres_the_face_within_the_image(monkeypatch: pytest.MonkeyPatch, centre: int, left: int) -> None:
    monkeypatch.setattr(variants_module, "find_face", lambda _: Face(centre - 8, 10, centre + 8, 30))
    image = picture(96, 64)
    np.testing.assert_array_equal(variants(image, 64, crop="face")[0], np.asarray(image)[:, left : left + 64])


@pytest.mark.skipif(not can_find_faces(), reason="dlib is not installed")
def test_no_face_in_a_picture_without_one() -> None:
    assert find_face(picture(200, 200)) is None


@pytest.mark.parametrize("resolution", [64, 256, 512, 768, 1024])
def test_buckets(resolution: int) -> None:
    sizes = bucket_sizes(resolution)
    assert (resolution, resolution) in sizes
    assert len(sizes) == len(set(sizes)) >= 5
    for width, height in sizes:
        assert width % (resolution // 8) == height % (resolution // 8) == 0
        assert width * height <= resolution**2
        assert max(width, height) <= 2.5 * min(width, height)
        assert (height, width) in sizes
        assert assign_bucket(width, height, sizes) == (width, height)


def test_bucket_steps_and_their_limits() -> None:
    assert all(width % 16 == height % 16 == 0 for width, height in bucket_sizes(64, 16))
    with pytest.raises(ValueError, match="resolution 100 is not a multiple of 64"):
        bucket_sizes(100, 64)
    with pytest.raises(ValueError, match="no buckets"):
        assign_bucket(1, 1, [])


def test_images_go_to_the_nearest_bucket() -> None:
    sizes = bucket_sizes(512)
    assert assign_bucket(4000, 4000, sizes) == (512, 512)
    assert assign_bucket(4100, 4000, sizes) == (512, 512)
    assert assign_bucket(6000, 4000, sizes) == (640, 384)
    width, height = assign_bucket(1000, 3000, sizes)
    assert (width, height) == (320, 768)


@pytest.mark.parametrize(("source", "made"), [((90, 60), (40, 24)), ((60, 90), (24, 40)), ((64, 64), (32, 32))])
def test_a_bucket_follows_the_photo(source: tuple[int, int], made: tuple[int, int]) -> None:
    width, height = made
    assert [variant.shape for variant in variants(picture(*source), 32, crop="bucket")] == [(height, width, 3)]


def test_backgrounds_are_keyed_by_seed_and_photo_and_leave_the_subject() -> None:
    mask = Image.fromarray(np.repeat(np.array([[0] * 8 + [255] * 8], np.uint8), 16, axis=0))
    image = Image.composite(picture(16, 16), Image.new("RGB", (16, 16), "white"), mask)
    made = [np.asarray(one) for one in on_backgrounds(image, mask, 3, seed=1)]
    again = [np.asarray(one) for one in on_backgrounds(image, mask, 3, seed=1)]
    other = np.asarray(on_backgrounds(image, mask, 1, seed=2)[0])
    np.testing.assert_array_equal(made, again)
    assert len({one[0, 0].tobytes() for one in (*made, other)}) == 4
    for one in made:
        np.testing.assert_array_equal(one[:, 8:], np.asarray(image)[:, 8:])
        assert (one[:, :8] == one[0, 0]).all()


def test_a_background_is_replaced_exactly() -> None:
    colour = np.asarray(picture(40, 30), float)
    alpha = np.linspace(0, 1, 40)[None, :, None] * np.ones((30, 1, 1))
    on_white = Image.fromarray(np.rint(colour * alpha + 255 * (1 - alpha)).astype(np.uint8))
    mask = Image.fromarray(np.rint(alpha[..., 0] * 255).astype(np.uint8))
    replaced = replace_background(on_white, mask, (10, 120, 60))
    np.testing.assert_allclose(np.asarray(replaced), colour * alpha + np.array([10, 120, 60]) * (1 - alpha), atol=2)
    green = np.asarray(replace_background(on_white, mask, (0, 200, 0)))
    assert tuple(green[0, 0]) == (0, 200, 0)
    np.testing.assert_array_equal(np.asarray(replace_background(on_white, mask, (255, 255, 255))), np.asarray(on_white))


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask of \(8, 8\) px for an image of \(96, 64\) px"):
        replace_background(picture(), Image.new("L", (8, 8)), (0, 0, 0))
