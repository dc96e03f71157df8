"""A 64-bit perceptual hash: near for pictures that look alike, about 32 bits apart for others.

The signs of the lowest frequencies of a small grey copy (Zauner 2010). Survives scaling, JPEG and small colour changes;
not mirroring, rotation or large crops.
"""

import numpy as np
from PIL import Image

SIDE = 32
KEPT = 8
NEAR = 10  # bits; two different photos are this near once in about a hundred million pairs


def picture_hash(image: Image.Image) -> str:
    """16 hex digits."""
    grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    values = _COSINES @ np.asarray(grey, dtype=np.float64) @ _COSINES.T
    low = values.ravel()
    bits = low > np.median(low[1:])
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"


def distance(one: str, other: str) -> int:
    """In how many bits two hashes differ."""
    return (int(one, 16) ^ int(other, 16)).bit_count()


def _cosines() -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    frequencies, places = np.arange(KEPT)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * (places + 0.5) * frequencies / SIDE)


_COSINES = _cosines()
