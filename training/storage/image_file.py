"""An image file before it is decoded: what its header declares, and whether it may be decoded at all.

Bytes are hostile until read: their count, the size and frames a header declares and the passes a JPEG asks for are all
bounded here; every count is the file's own claim, and nothing is decoded. A baseline JPEG is decoded row by row, so
reading it scaled down takes memory for the small image only. One whose components or details come in several scans
needs all its coefficients in memory, however small the wanted image is. `images.py` decodes.
"""

import io
import struct
import warnings
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from training.errors import UserError

MIB = 2**20
JPEG_MAGIC = b"\xff\xd8\xff"
# Real ones have fewer than 600 (64 KB each). Pillow walks them one by one in Python, and so it does with bytes between.
MAX_JPEG_SEGMENTS = 2000
# Real progressive JPEGs have about 10 scans. Each scan walks the whole image, so thousands of empty ones cost hours.
MAX_JPEG_SCANS = 100
MAX_JPEG_SCANNED_PIXELS = 4_000_000_000  # pixels times scans
MAX_JPEG_HELD_BYTES = 640 * MIB
COEFFICIENT_BYTES = 2

# How files of other kinds begin (offset, bytes, name): only to say what a rejected file is.
OTHER_KINDS = (
    (0, b"GIF8", "a GIF"),
    (0, b"BM", "a BMP"),
    (0, b"II*\0", "a TIFF or raw photo"),
    (0, b"MM\0*", "a TIFF or raw photo"),
    (4, b"ftyphei", "a HEIC photo"),
    (4, b"ftypmif", "a HEIC photo"),
    (4, b"ftypavi", "an AVIF"),
    (4, b"ftyp", "a video"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a ZIP archive"),
)


class ImageError(UserError):
    """An image that cannot be used: `name` of the file and `reason`, a few words with the value and the limit."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return ImageError, (self.name, self.reason)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What is taken: the shorter side is at least `min_side_px`, the longer at most `max_side_px`.

    A JPEG beyond `max_side_px` or `max_pixels` is read scaled down into them, if it has at most `max_jpeg_pixels`.
    `max_aspect` (longer through shorter side) keeps slivers out, which resized by their shorter side would be huge.
    """

    min_side_px: int = 16
    max_side_px: int = 8192
    max_pixels: int = 40_000_000
    max_jpeg_pixels: int = 250_000_000
    max_bytes: int = 128 * MIB
    max_aspect: float = 8

    def reduction(self, size: tuple[int, int]) -> int:
        """By how much the sides of a JPEG of this size are divided as it is read: 1, 2, 4 or 8."""
        for factor in (1, 2, 4):
            if max(size) <= self.max_side_px * factor and size[0] * size[1] <= self.max_pixels * factor**2:
                return factor
        return 8


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True, slots=True)
class OpenImage:
    """A file that passed every check: its header read, nothing decoded. Its sides are divided by `factor` as it is
    decoded (1 but for a JPEG)."""

    image: Image.Image
    factor: int
    name: str


def open_image(data: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS, about_px: int | None = None) -> OpenImage:
    """Opens a JPEG, PNG or WebP and checks it, decoding nothing. Raises `ImageError`.

    `about_px`: the image is wanted with sides of so many pixels; a baseline JPEG comes scaled down by 2, 4 or 8 where
    it stays larger than that, and other files must fit the limits as they are: they would be held whole.
    """
    plan = _plan(data, name, limits, about_px)
    with warnings.catch_warnings():
        # Pillow warns about odd metadata; what matters is whether pixels come out.
        warnings.simplefilter("ignore")
        image = _open(data, name)
        # Pillow may have found another frame than the header's first
        _check_size(image.size, name, limits, scalable=plan.scalable)
        _check_work(image, data, name, plan.header)
    return OpenImage(image, plan.factor, name)


def count_pixels(data: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS, about_px: int | None = None) -> int:
    """How many pixels would be decoded, going by the file's header alone: it takes no time and no memory.

    Raises `ImageError` if the header says enough to refuse the file, or is none.
    """
    plan = _plan(data, name, limits, about_px)
    width, height = (-(-side // plan.factor) for side in plan.size)
    return width * height


class JpegHeader(NamedTuple):
    """Size in pixels, whether all is in one pass over rows, and the components in the first scan (None: not there)."""

    width: int
    height: int
    baseline: bool
    scanned: int | None


class EndlessHeader(Exception):
    """A header of more segments than any real file has."""


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """What a JPEG's header declares; None for other bytes and broken headers. Raises EndlessHeader."""
    if not data.startswith(JPEG_MAGIC):
        return None
    frame, at = None, 2
    for _ in range(MAX_JPEG_SEGMENTS):
        before, at = at, data.find(b"\xff", at)
        marker = data[at + 1 : at + 2]
        if at < 0 or not marker or marker in b"\xd9\xda":  # cut short, the end, or where pixels begin
            scanned = data[at + 4] if marker == b"\xda" and len(data) > at + 4 else None
            return JpegHeader(*frame, scanned) if frame else None
        if at - before > MAX_JPEG_SEGMENTS:
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
    raise EndlessHeader(f"its JPEG header does not end: at most {MAX_JPEG_SEGMENTS} segments")


def count_scans(data: bytes) -> int:
    """How often a scan may start in a file's bytes; more than there are where an embedded preview has its own."""
    return data.count(b"\xff\xda")


def held_bytes(image: JpegImageFile, header: JpegHeader | None) -> int:
    """Bytes of coefficients that must be held while `image` is decoded: 0 where one scan has all components."""
    scanned = header.scanned if header else None
    if not image.info.get("progressive") and scanned == len(image.layer):
        return 0
    width, height = image.size
    across, down = (max(layer[place] for layer in image.layer) for place in (1, 2))
    samples = sum(layer[1] * layer[2] for layer in image.layer) / (across * down)
    return int(COEFFICIENT_BYTES * width * height * samples)


class _Plan(NamedTuple):
    """How a file is read: the size it declares, by what its sides are divided, and whether that can be done at all."""

    size: tuple[int, int]
    factor: int
    scalable: bool
    header: JpegHeader | None


def _plan(data: bytes, name: str, limits: ImageLimits, about_px: int | None) -> _Plan:
    """From the header alone. Raises `ImageError` if that is enough to refuse the file."""
    if not data:
        raise ImageError(name, "empty: 0 bytes")
    if len(data) > limits.max_bytes:
        raise ImageError(name, f"too many bytes: {len(data) / MIB:.1f} MiB, at most {limits.max_bytes / MIB:g} MiB")
    try:
        header = read_jpeg_header(data)
    except EndlessHeader as error:
        raise ImageError(name, str(error)) from None
    size = (header.width, header.height) if header else declared_size(data)
    if size is None:
        raise ImageError(name, _unopened(data))
    scalable = header is not None and (about_px is None or header.baseline)
    _check_size(size, name, limits, scalable=scalable)
    factor = limits.reduction(size) if scalable else 1
    if scalable and about_px is not None:
        factor = max(factor, next(by for by in (8, 4, 2, 1) if by == 1 or min(size) // about_px >= by))
    return _Plan(size, factor, scalable, header)


def declared_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) that a PNG or WebP header declares, None for other bytes.

    Read by hand because Pillow's WebP reader takes memory for the whole canvas as soon as a file is opened.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return width, height
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if data[12:16] == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _open(data: bytes, name: str) -> Image.Image:
    """The file's header read, nothing decoded."""
    try:
        if data.startswith(JPEG_MAGIC):  # `Image.open` refuses what is too large to be decoded whole
            return JpegImageFile(io.BytesIO(data))
        return Image.open(io.BytesIO(data), formats=("PNG", "WEBP"))
    except Image.DecompressionBombError:
        raise ImageError(name, "decompression bomb: declares more than 170 million pixels") from None
    except Exception:  # parsers of hostile bytes raise whatever they stumble over; all of it means the same
        raise ImageError(name, _unopened(data)) from None


def _unopened(data: bytes) -> str:
    """Why bytes that Pillow cannot open are no image of ours."""
    for offset, magic, kind in OTHER_KINDS:
        if data[offset : offset + len(magic)] == magic:
            return f"{kind}, not one of JPEG, PNG, WebP"
    if data.startswith(JPEG_MAGIC) or data[:4] == b"\x89PNG" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return "corrupt or truncated: its header cannot be read"
    return "not an image: neither JPEG, PNG nor WebP"


def _check_size(size: tuple[int, int], name: str, limits: ImageLimits, *, scalable: bool = False) -> None:
    """`scalable`: a JPEG, which is measured by what it may have before it is scaled down."""
    width, height = size
    if min(size) < limits.min_side_px:
        raise ImageError(name, f"too small: {width}x{height} px, at least {limits.min_side_px} px a side")
    most = f"{limits.max_jpeg_pixels / 1e6:g} megapixels"
    if scalable and width * height > limits.max_jpeg_pixels:
        raise ImageError(name, f"too large (decompression bomb?): {width}x{height} px, at most {most}")
    if not scalable and (max(size) > limits.max_side_px or width * height > limits.max_pixels):
        allowed = f"at most {limits.max_side_px} px a side and {limits.max_pixels / 1e6:g} megapixels"
        hint = f"; a JPEG may have {most}, it is read scaled down"
        raise ImageError(name, f"too large (decompression bomb?): {width}x{height} px, {allowed}{hint}")
    if max(size) > limits.max_aspect * min(size):
        raise ImageError(name, f"too narrow: {width}x{height} px, at most {limits.max_aspect:g} times as long as wide")


def _check_work(image: Image.Image, data: bytes, name: str, header: JpegHeader | None) -> None:
    """Raises for animations, and for JPEGs that would take hours or more memory than there may be.

    MPO, which many phones write, is a JPEG with a preview or a depth map behind it: its first image is the photo.
    """
    if not isinstance(image, JpegImageFile):
        frames = int(getattr(image, "n_frames", 1))
        if frames > 1:
            raise ImageError(name, f"animated: {frames} frames, at most 1")
        return
    most = min(MAX_JPEG_SCANS, MAX_JPEG_SCANNED_PIXELS // (image.width * image.height))
    scans = count_scans(data)
    if scans > most:
        raise ImageError(name, f"too many JPEG scans: {scans}, at most {most}")
    held = held_bytes(image, header)
    if held > MAX_JPEG_HELD_BYTES:
        raise ImageError(
            name,
            f"too large for a progressive JPEG: {image.width}x{image.height} px take {held // MIB} MiB to decode, at "
            f"most {MAX_JPEG_HELD_BYTES // MIB}; save it as a baseline JPEG",
        )
