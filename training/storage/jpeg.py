"""What decoding a JPEG would take, told by its header. Nothing is decoded here; every count is the file's own claim.

A baseline JPEG is decoded row by row, so reading it scaled down takes memory for the small image only. One whose
components or details come in several scans needs all its coefficients in memory, however small the wanted image is.
"""

import struct
from typing import NamedTuple

from PIL.JpegImagePlugin import JpegImageFile

MAGIC = b"\xff\xd8\xff"
# Real ones have fewer than 600 (64 KB each). Pillow walks them one by one in Python, and so it does with bytes between.
MAX_SEGMENTS = 2000
COEFFICIENT_BYTES = 2


class Header(NamedTuple):
    """Size in pixels, whether all is in one pass over rows, and the components in the first scan (None: not there)."""

    width: int
    height: int
    baseline: bool
    scanned: int | None


class EndlessHeader(Exception):
    """A header of more segments than any real file has."""


def read_header(data: bytes) -> Header | None:
    """What a JPEG's header declares; None for other bytes and broken headers. Raises EndlessHeader."""
    if not data.startswith(MAGIC):
        return None
    frame, at = None, 2
    for _ in range(MAX_SEGMENTS):
        before, at = at, data.find(b"\xff", at)
        marker = data[at + 1 : at + 2]
        if at < 0 or not marker or marker in b"\xd9\xda":  # cut short, the end, or where pixels begin
            scanned = data[at + 4] if marker == b"\xda" and len(data) > at + 4 else None
            return Header(*frame, scanned) if frame else None
        if at - before > MAX_SEGMENTS:
            break
        if marker == b"\xff":  # padding
            at += 1
        elif marker in b"\x00\x01\xd0\xd1\xd2\xd3\xd4\xd5\xd6\xd7\xd8":  # no length follows
            at += 2
        else:
            if b"\xc0" <= marker <= b"\xcf" and marker not in b"\xc4\xc8\xcc" and len(data) >= at + 9:
                height, width = struct.unpack(">HH", data[at + 5 : at + 9])
                frame = width, height, marker in b"\xc0\xc1"
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    raise EndlessHeader(f"its JPEG header does not end: at most {MAX_SEGMENTS} segments")


def count_scans(data: bytes) -> int:
    """How often a scan may start in a file's bytes; more than there are where an embedded preview has its own."""
    return data.count(b"\xff\xda")


def held_bytes(image: JpegImageFile, header: Header | None) -> int:
    """Bytes of coefficients that must be held while `image` is decoded: 0 where one scan has all components."""
    scanned = header.scanned if header else None
    if not image.info.get("progressive") and scanned == len(image.layer):
        return 0
    width, height = image.size
    across, down = (max(layer[place] for layer in image.layer) for place in (1, 2))
    samples = sum(layer[1] * layer[2] for layer in image.layer) / (across * down)
    return int(COEFFICIENT_BYTES * width * height * samples)
