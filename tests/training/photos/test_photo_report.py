"""A planted fault is found and names its photos; a good set is silent, at demo size and at full size."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from training.photos.photo_report import Seen, report, sharpness
from training.photos.warning import PhotoWarning, WarningKind, listed, shown

RESOLUTIONS = [64, 256]


def scene(seed: int, side: int, place: int | None = None) -> Image.Image:
    """A stand-in for a photo: a textured room (`place` fixes it), an object of shapes and detail somewhere in it."""
    room = np.random.default_rng(1000 + (seed if place is None else place))
    wall = room.integers(30, 226, (4, 4, 3)).astype(np.uint8)
    image = Image.fromarray(wall).resize((side, side), Image.Resampling.BICUBIC)
    rng = np.random.default_rng(seed)
    detail = rng.integers(0, 256, (16, 16, 3), np.uint8)
    size = side // 2
    at = rng.integers(side // 8, side - size - side // 8, 2)
    image.paste(Image.fromarray(detail).resize((size, size), Image.Resampling.NEAREST), (int(at[0]), int(at[1])))
    return image


def photos(images: list[Image.Image]) -> list[Seen]:
    return [Seen(f"{i}.jpg", image, min(image.size), str(i)) for i, image in enumerate(images)]


def good(side: int, count: int = 6) -> list[Image.Image]:
    return [scene(seed, side) for seed in range(count)]


def only(warnings: tuple[PhotoWarning, ...], kind: WarningKind) -> PhotoWarning:
    (found,) = warnings
    assert found.kind == kind
    assert found.message.endswith(".")
    assert found.advice.endswith(".")
    return found


@pytest.mark.parametrize("side", RESOLUTIONS)
def test_a_good_set_is_silent(side: int) -> None:
    assert report(photos(good(side)), side) == ()


def test_larger_photos_are_judged_at_the_resolution() -> None:
    assert report(photos(good(512)), 64) == ()


def test_no_photos_no_report() -> None:
    assert report([], 512) == ()


@pytest.mark.parametrize("side", RESOLUTIONS)
def test_blurry(side: int) -> None:
    images = good(side)
    images[2] = images[2].filter(ImageFilter.GaussianBlur(4))
    assert only(report(photos(images), side), "blurry").names == ("2.jpg",)


def test_a_sharp_subject_before_a_soft_background_is_not_blurry() -> None:
    image = scene(3, 256)
    soft = image.filter(ImageFilter.GaussianBlur(8))
    soft.paste(image.crop((64, 64, 192, 192)), (64, 64))
    assert sharpness(soft, 256) > 10 * sharpness(image.filter(ImageFilter.GaussianBlur(8)), 256)
    assert not any(warning.kind == "blurry" for warning in report(photos([soft]), 256))


def test_one_even_colour_has_no_detail() -> None:
    assert sharpness(Image.new("RGB", (64, 64), (90, 80, 70)), 64) == 0
    assert sharpness(Image.new("RGB", (1, 1)), 64) == 0


@pytest.mark.parametrize("side", RESOLUTIONS)
def test_small_is_relative_to_the_resolution(side: int) -> None:
    images = good(side)
    images[1] = images[1].resize((side // 2, side // 2), Image.Resampling.LANCZOS)
    found = only(report(photos(images), side), "small")
    assert found.names == ("1.jpg",)
    assert f"{side} px" in found.message
    assert report(photos(images), side // 2) == ()


@pytest.mark.parametrize("side", RESOLUTIONS)
@pytest.mark.parametrize("change", ["resized", "brighter", "cropped", "turned"])
def test_near_duplicates(side: int, change: str) -> None:
    images = good(side)
    original, edge = images[0], side // 50
    images.append(
        {
            "resized": original.resize((side * 2, side * 2)),
            "brighter": ImageEnhance.Brightness(original).enhance(1.1),
            "cropped": original.crop((edge, edge, side - edge, side - edge)).resize((side, side)),
            "turned": original.rotate(1, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128)),
        }[change]
    )
    assert only(report(photos(images), side), "near-duplicate").names == ("0.jpg", "6.jpg")


def test_identical_files_are_not_also_near_duplicates() -> None:
    several = photos(good(64))
    copies = [several[0]._replace(name=name) for name in ("x.jpg", "y.jpg")]
    found = only(report([*several, *copies], 64), "identical")
    assert found.names == ("0.jpg", "x.jpg", "y.jpg")
    assert "3 times" in found.message


@pytest.mark.parametrize("side", RESOLUTIONS)
def test_one_place_in_most_photos(side: int) -> None:
    images = [scene(seed, side, place=7) for seed in range(5)] + [scene(9, side)]
    found = only(report(photos(images), side), "background")
    assert found.names == tuple(f"{i}.jpg" for i in range(5))
    assert "5 of 6" in found.message
    half = [scene(seed, side, place=7) for seed in range(3)] + [scene(seed, side) for seed in range(10, 13)]
    assert report(photos(half), side) == ()


@pytest.mark.parametrize("side", RESOLUTIONS)
def test_dark_and_overexposed(side: int) -> None:
    images = good(side)
    images[3] = ImageEnhance.Brightness(images[3]).enhance(0.12)
    assert only(report(photos(images), side), "dark").names == ("3.jpg",)
    images = good(side)
    images[4] = images[4].point(lambda value: min(255, 242 + value // 8))
    found = report(photos(images), side)
    assert [warning.names for warning in found if warning.kind == "overexposed"] == [("4.jpg",)]


def test_few_counts_different_photos() -> None:
    assert "4 different photos;" in only(report(photos(good(64, 4)), 64), "few").message
    several = photos(good(64, 4))
    found = report([*several, several[0]._replace(name="copy.jpg")], 64)
    assert [warning.kind for warning in found] == ["few", "identical"]
    assert "4 different photos among 5" in found[0].message


def test_a_warning_is_plain_data() -> None:
    (found,) = report(photos(good(64, 2)), 64)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["names"] == ["0.jpg", "1.jpg"]


def test_names_are_shown_short_and_without_control_characters() -> None:
    assert shown("a\x1b[31m\n.jpg") == "a?[31m?.jpg"
    assert len(shown("x" * 300)) == 80
    assert listed(["a", "b", "c"], most=2) == "a, b and 1 more"


def test_two_hundred_photos_take_seconds() -> None:
    # a set at the limit: the pairwise checks must stay cheap (the suite's timeout is the bound)
    assert isinstance(report(photos([scene(seed, 32) for seed in range(200)]), 32), tuple)
