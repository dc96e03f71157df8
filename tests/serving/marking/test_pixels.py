"""The mark in the pixels: found after JPEG and scaling, not in pictures without it, and never put into small ones."""

import io
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from serving.marking.noise import FOUND
from serving.marking.pixels import PixelMark

pytest.importorskip("onnxruntime")
if find_spec("imwatermark") is None:
    pytest.skip("the extra rivagan is not installed", allow_module_level=True)
MARK = PixelMark(b"p" * 32)


def smooth(side: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side))


def test_it_survives_and_is_not_seen() -> None:
    image = smooth(256)
    marked = MARK.put(np.asarray(image))
    assert np.abs(marked.astype(int) - np.asarray(image)).mean() < 3
    file = io.BytesIO()
    Image.fromarray(marked).save(file, "JPEG", quality=90)
    assert MARK.read(Image.open(file)) <= FOUND
    assert MARK.read(image) > FOUND and PixelMark(b"q" * 32).read(Image.fromarray(marked)) > FOUND


def test_small_pictures_are_left_as_they_are() -> None:
    small = np.asarray(smooth(64))
    assert np.array_equal(MARK.put(small), small) and MARK.read(smooth(64)) == 0.0
