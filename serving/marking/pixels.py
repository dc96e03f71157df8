"""A second mark, in the pixels, for what must survive without our base: RivaGAN (Zhang et al. 2019), 32 bits.

The extra `rivagan` brings its two networks (`invisible-watermark`, MIT); onnxruntime runs them, and nothing else of
that package is imported. The 32 bits come from the service's key and name nobody: they say "made here", no more.
"""

import hmac
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.errors import UserError

BITS = 32
LEAST_PX = 256  # of the shorter side: smaller pictures do not hold it


@dataclass(frozen=True, slots=True)
class PixelMark:
    """The mark of one service."""

    key: bytes

    @property
    def bits(self) -> NDArray[np.float32]:
        """The 32 bits that all pictures carry."""
        digest = hmac.digest(self.key, b"pixels", "sha256")[: BITS // 8]
        return np.unpackbits(np.frombuffer(digest, dtype=np.uint8)).astype(np.float32)

    def put(self, pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The picture with the mark; a smaller one as it is."""
        if min(pixels_HWC.shape[:2]) < LEAST_PX:
            return pixels_HWC
        (marked,) = _network("encoder").run(None, {"frame": _frame(pixels_HWC), "data": self.bits[None]})
        bgr_HWC = (np.clip(marked[0, :, 0], -1, 1).transpose(1, 2, 0) + 1) * 127.5
        rgb_HWC: NDArray[np.uint8] = np.ascontiguousarray(bgr_HWC[..., ::-1].round().astype(np.uint8))
        return rgb_HWC

    def read(self, image: Image.Image) -> float:
        """log10 of the probability that an unmarked picture has as many of the bits right; the key's are fair coins."""
        if min(image.size) < LEAST_PX:
            return 0.0
        (found,) = _network("decoder").run(None, {"frame": _frame(np.asarray(image.convert("RGB")))})
        right = int(((found[0] > 0.5) == (self.bits > 0.5)).sum())
        return math.log10(sum(math.comb(BITS, more) for more in range(right, BITS + 1)) / 2**BITS)


def check_pixels() -> None:
    """Raises UserError if the second mark is asked for and its packages are not installed."""
    try:
        _network("encoder")
    except ImportError:
        raise UserError(
            "The mark in the pixels needs the extra `rivagan`: run `pip install dreamfleet[rivagan]`, or leave it off."
        ) from None


def _frame(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """As the networks take a film of one frame: [1, 3, 1, H, W] in [-1, 1], blue first."""
    values = pixels_HWC[..., ::-1].astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None, :, None])


@lru_cache(maxsize=2)
def _network(name: str) -> Any:
    import onnxruntime

    package = find_spec("imwatermark")  # found, not imported: that would ask for OpenCV
    if package is None or package.origin is None:
        raise ImportError("invisible-watermark")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    file = Path(package.origin).parent / f"rivagan_{name}.onnx"
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
