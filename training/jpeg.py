"""What decoding a JPEG would take, told by its header. Nothing is decoded here; every count is the file's own claim.

A baseline JPEG is decoded row by row, so reading it scaled down takes memory for the small image only. One whose
components or details come in several scans needs all its coefficients in memory, however small the wanted image is.
"""

from PIL.JpegImagePlugin import JpegImageFile

MAGIC = b"\xff\xd8\xff"
COEFFICIENT_BYTES = 2
_START_OF_SCAN = 0xDA
# markers that stand alone: no length follows
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})


def count_scans(data: bytes) -> int:
    """How often a scan may start in a file's bytes; more than there are where an embedded preview has its own."""
    return data.count(b"\xff\xda")


def held_bytes(image: JpegImageFile, data: bytes) -> int:
    """Bytes of coefficients that must be held while `image` is decoded: 0 where one scan has all components."""
    if not image.info.get("progressive") and _first_scan_components(data) == len(image.layer):
        return 0
    width, height = image.size
    across, down = (max(layer[place] for layer in image.layer) for place in (1, 2))
    samples = sum(layer[1] * layer[2] for layer in image.layer) / (across * down)
    return int(COEFFICIENT_BYTES * width * height * samples)


def _first_scan_components(data: bytes) -> int | None:
    """The components in the first scan; None if its header is not found."""
    at = 2
    while at + 4 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _START_OF_SCAN:
            return data[at + 4]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _BARE:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
