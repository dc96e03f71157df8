"""Pictures as bytes: what leaves the engine is encoded, what a client sends to start from is decoded and checked."""

import io
import math

import torch
from PIL import Image
from torch import Tensor

from serving.engine.request import ImageFormat
from serving.errors import Refused
from training.storage.image_file import (
    ImageError,
    ImageLimits,
    OpenImage,
    count_pixels,
    declared_size,
    open_image,
)
from training.storage.images import MaskedImage, decode_image, read_image, upright_size

# Of a picture that a client sends, in what is decoded: a JPEG that is larger than it is wanted is scaled meanwhile.
MAX_PIXELS = 24_000_000
_LIMITS = ImageLimits(min_side_px=1, max_pixels=MAX_PIXELS, max_aspect=math.inf)
_NAME = "picture"


def encode(pixels_HWC: Tensor, form: ImageFormat, quality: int) -> bytes:
    """The image file of uint8 [H, W, 3]; `quality` (0 to 100) is for jpeg and webp, PNG is lossless."""
    picture = Image.fromarray(pixels_HWC.contiguous().numpy())
    stream = io.BytesIO()
    if form == "png":
        picture.save(stream, "PNG", compress_level=4)
    else:
        picture.save(stream, form.upper(), quality=quality)
    return stream.getvalue()


def enlarge(pixels_HWC: Tensor, width: int, height: int) -> Tensor:
    """A preview, uint8 [h, w, 3], enlarged to the size of its picture, [height, width, 3]."""
    picture = Image.fromarray(pixels_HWC.contiguous().numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return as_tensor(picture)


def count(data: bytes, width: int, height: int) -> int:
    """How many pixels `decode` would decode, read from the header. Raises Refused if the header says that it cannot."""
    try:
        return count_pixels(data, _NAME, _LIMITS, max(width, height))
    except ImageError as error:
        raise _refused(error) from None


def decode(data: bytes, width: int, height: int) -> Tensor:
    """An image file, upright and on white, as uint8 [3, height, width]. Raises Refused if it cannot be used."""
    try:
        picture = read_image(data, _NAME, _LIMITS, max(width, height))
    except ImageError as error:
        raise _refused(error) from None
    return as_tensor(picture.resize((width, height), Image.Resampling.LANCZOS)).permute(2, 0, 1).contiguous()


def open_picture(data: bytes, about_px: int | None, what: str) -> OpenImage:
    """A file whose header has passed, as `training.storage.image_file.open_image`. Raises Refused naming `what`."""
    try:
        return open_image(data, what, _LIMITS, about_px)
    except ImageError as error:
        raise _refused(error) from None


def measure(data: bytes, what: str) -> tuple[int, int]:
    """Width and height of a file as it is looked at, from its header. Raises Refused naming `what`."""
    if data[:4] == b"RIFF":  # opening one takes memory for all of it
        try:
            count_pixels(data, what, _LIMITS)
        except ImageError as error:
            raise _refused(error) from None
        return declared_size(data) or (1, 1)
    return upright_size(open_picture(data, None, what))


def has_alpha(data: bytes) -> bool:
    """Whether a file may have transparency, from its header."""
    if data[:4] == b"RIFF":
        return True
    return data[:4] == b"\x89PNG" and bool(open_picture(data, None, "picture").image.has_transparency_data)


def decode_opened(opened: OpenImage) -> MaskedImage:
    """Its pixels, upright, with its alpha. Raises Refused."""
    try:
        return decode_image(opened)
    except ImageError as error:
        raise _refused(error) from None


def as_tensor(picture: Image.Image) -> Tensor:
    """uint8 [height, width, 3] of RGB, [height, width] of one channel."""
    shape = (picture.height, picture.width, *([3] if picture.mode == "RGB" else []))
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(shape)


def _refused(error: ImageError) -> Refused:
    return Refused(f"The {error.name} cannot be used: {error.reason}. Send a JPEG, PNG or WebP file.")
