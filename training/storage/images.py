"""One image file in: the bytes of a JPEG, PNG or WebP become an upright RGB image on white, or an `ImageError`.

Bytes are hostile until read: their count, the size and frames a header declares and the passes a JPEG asks for are all
bounded before anything is decoded. A JPEG that is too large to be taken whole (phones make them with up to 200
megapixels) is decoded at a half, a quarter or an eighth of its sides. The largest image allowed takes up to 1 GB (WebP
and progressive JPEGs; others 0.7) and 5 s to read. Knows nothing about subjects, folders or training (`photos.py`
does).
"""

import io
import struct
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms
from PIL.JpegImagePlugin import JpegImageFile

from training.errors import UserError
from training.storage import jpeg

MIB = 2**20
# Real progressive JPEGs have about 10 scans. Each scan walks the whole image, so thousands of empty ones cost hours.
MAX_JPEG_SCANS = 100
MAX_JPEG_SCANNED_PIXELS = 4_000_000_000  # pixels times scans
MAX_JPEG_HELD_BYTES = 640 * MIB
MAX_ICC_BYTES = 4 * MIB
ORIENTATION_TAG = 0x0112

# EXIF orientation -> what turns the stored pixels upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

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


class MaskedImage(NamedTuple):
    """An upright RGB image on white; where the file had transparency, its alpha as a mask (L, 255 = the subject)."""

    image: Image.Image
    mask: Image.Image | None


DEFAULT_LIMITS = ImageLimits()


def read_image(
    data: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS, about_px: int | None = None
) -> Image.Image:
    """The image in a file's bytes as upright RGB, alpha laid on white. Raises `ImageError`."""
    return read_picture(data, name, limits, about_px).image


def read_picture(
    data: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS, about_px: int | None = None
) -> MaskedImage:
    """`read_image` with the mask of files that have transparency. Raises `ImageError`.

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
        if plan.factor > 1:
            image.draft(None, (image.width // plan.factor, image.height // plan.factor))
        return _decode(image, name)


def count_pixels(data: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS, about_px: int | None = None) -> int:
    """How many pixels `read_picture` would decode, going by the file's header alone: it takes no time and no memory.

    Raises `ImageError` if the header says enough to refuse the file, or is none.
    """
    plan = _plan(data, name, limits, about_px)
    width, height = (-(-side // plan.factor) for side in plan.size)
    return width * height


class _Plan(NamedTuple):
    """How a file is read: the size it declares, by what its sides are divided, and whether that can be done at all."""

    size: tuple[int, int]
    factor: int
    scalable: bool
    header: jpeg.Header | None


def _plan(data: bytes, name: str, limits: ImageLimits, about_px: int | None) -> _Plan:
    """From the header alone. Raises `ImageError` if that is enough to refuse the file."""
    if not data:
        raise ImageError(name, "empty: 0 bytes")
    if len(data) > limits.max_bytes:
        raise ImageError(name, f"too many bytes: {len(data) / MIB:.1f} MiB, at most {limits.max_bytes / MIB:g} MiB")
    try:
        header = jpeg.read_header(data)
    except jpeg.EndlessHeader as error:
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


def thumbnail(image: Image.Image, size_px: int = 96) -> bytes:
    """A WebP of the whole image within a square of `size_px`, for reports."""
    small = image.convert("RGB")
    small.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=80)
    return out.getvalue()


def _open(data: bytes, name: str) -> Image.Image:
    """The file's header read, nothing decoded."""
    try:
        if data.startswith(jpeg.MAGIC):  # `Image.open` refuses what is too large to be decoded whole
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
    if data.startswith(jpeg.MAGIC) or data[:4] == b"\x89PNG" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
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


def _check_work(image: Image.Image, data: bytes, name: str, header: jpeg.Header | None) -> None:
    """Raises for animations, and for JPEGs that would take hours or more memory than there may be.

    MPO, which many phones write, is a JPEG with a preview or a depth map behind it: its first image is the photo.
    """
    if not isinstance(image, JpegImageFile):
        frames = int(getattr(image, "n_frames", 1))
        if frames > 1:
            raise ImageError(name, f"animated: {frames} frames, at most 1")
        return
    most = min(MAX_JPEG_SCANS, MAX_JPEG_SCANNED_PIXELS // (image.width * image.height))
    scans = jpeg.count_scans(data)
    if scans > most:
        raise ImageError(name, f"too many JPEG scans: {scans}, at most {most}")
    held = jpeg.held_bytes(image, header)
    if held > MAX_JPEG_HELD_BYTES:
        raise ImageError(
            name,
            f"too large for a progressive JPEG: {image.width}x{image.height} px take {held // MIB} MiB to decode, at "
            f"most {MAX_JPEG_HELD_BYTES // MIB}; save it as a baseline JPEG",
        )


def _decode(image: Image.Image, name: str) -> MaskedImage:
    try:
        image.load()
        orientation = _orientation(image)
        rgb, alpha = _to_rgb(image)
    except Exception as error:  # as in `_open`
        truncated = "truncated" in str(error) or isinstance(error, EOFError)
        raise ImageError(name, f"{'truncated' if truncated else 'corrupt'}: its pixels cannot be read") from None
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    turn = UPRIGHT.get(orientation)
    if turn is None:
        return MaskedImage(rgb, alpha)
    return MaskedImage(rgb.transpose(turn), None if alpha is None else alpha.transpose(turn))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) if there is none. Broken EXIF is no reason to lose a good photo."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # as in `_open`
        return 1


def _to_rgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """(RGB, alpha or None) of any mode that JPEG, PNG and WebP decode to; wide gamuts are brought to sRGB."""
    icc = image.info.get("icc_profile", b"")
    if image.mode.startswith("I"):
        return _sixteen_bit_grey(image)
    if not image.has_transparency_data:
        return _to_srgb(image, icc), None
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # a 16-bit colour, while Pillow has read 8 bits of each channel
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    opaque = alpha.getextrema()[0] == 255
    return _to_srgb(rgba.convert("RGB"), icc), None if opaque else alpha


def _sixteen_bit_grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey scaled to 8 bits (Pillow's own conversion cuts off); one value may be marked as transparent."""
    values_HW = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values_HW + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255, rounded exactly
    clear = image.info.get("transparency")
    alpha = Image.fromarray(np.where(values_HW == clear, 0, 255).astype(np.uint8)) if isinstance(clear, int) else None
    return grey.convert("RGB"), alpha


def _to_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """RGB through the embedded colour profile (phones save Display P3, printers CMYK), plainly if none is usable."""
    plain = image.convert("RGB")
    if not icc or len(icc) > MAX_ICC_BYTES:
        return plain
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return plain
        stored = image if image.mode == "CMYK" else plain
        converted = ImageCms.profileToProfile(stored, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return plain
    return plain if converted is None else converted
