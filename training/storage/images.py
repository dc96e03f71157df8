"""One image in: the bytes of a JPEG, PNG or WebP become an upright RGB image on white, or an `ImageError`.

`image_file.py` opens and checks the bytes first. A JPEG that is too large to be taken whole (phones make them with up
to 200 megapixels) is decoded at a half, a quarter or an eighth of its sides. The largest image allowed takes up to 1 GB
(WebP and progressive JPEGs; others 0.7) and 5 s to read. Knows nothing about subjects, folders or training.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from training.storage.image_file import DEFAULT_LIMITS, MIB, ImageError, ImageLimits, OpenImage, open_image

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


TURNING = (5, 6, 7, 8)  # those that swap width and height


class MaskedImage(NamedTuple):
    """An upright RGB image on white; where the file had transparency, its alpha as a mask (L, 255 = the subject)."""

    image: Image.Image
    mask: Image.Image | None


def read_image(
    data: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS, about_px: int | None = None
) -> Image.Image:
    """The image in a file's bytes as upright RGB, alpha laid on white; `about_px` as of `open_image`. Raises
    `ImageError`."""
    return read_masked(data, name, limits, about_px).image


def read_masked(
    data: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS, about_px: int | None = None
) -> MaskedImage:
    """As `read_image`, with the mask of files that have transparency."""
    return decode_image(open_image(data, name, limits, about_px))


def decode_image(opened: OpenImage) -> MaskedImage:
    """The pixels of an open file, with the mask of files that have transparency. Raises `ImageError`."""
    image, factor = opened.image, opened.factor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `open_image`
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        return _upright(image, opened.name)


def shrunk(picture: MaskedImage, side_px: int) -> MaskedImage:
    """The picture with its shorter side at most `side_px`."""
    scale = side_px / min(picture.image.size)
    if scale >= 1:
        return picture
    size = (round(picture.image.width * scale), round(picture.image.height * scale))
    mask = None if picture.mask is None else picture.mask.resize(size, Image.Resampling.LANCZOS)
    return MaskedImage(picture.image.resize(size, Image.Resampling.LANCZOS), mask)


def _upright(image: Image.Image, name: str) -> MaskedImage:
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


def upright_size(opened: OpenImage) -> tuple[int, int]:
    """Width and height that the file declares, as it is looked at; nothing is decoded."""
    width, height = opened.image.size
    return (height, width) if _orientation(opened.image) in TURNING else (width, height)


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


def thumbnail(image: Image.Image, size_px: int = 96) -> bytes:
    """A WebP of the whole image within a square of `size_px`, for reports."""
    small = image.convert("RGB")
    small.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=80)
    return out.getvalue()
