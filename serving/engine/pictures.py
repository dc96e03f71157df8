"""Pictures as bytes: what leaves the engine is encoded, what a client sends to start from is decoded and checked."""

import io
import warnings

import torch
from PIL import Image
from torch import Tensor

from serving.engine.request import ImageFormat
from serving.errors import Refused

MAX_PIXELS = 64 * 2**20  # of a picture that a client sends
_READABLE = ("PNG", "JPEG", "WEBP")


def encode(pixels_HWC: Tensor, form: ImageFormat, quality: int) -> bytes:
    """uint8 [H, W, 3] as an image file; `quality` (0 to 100) is of jpeg and webp, PNG is exact."""
    picture = Image.fromarray(pixels_HWC.contiguous().numpy())
    stream = io.BytesIO()
    if form == "png":
        picture.save(stream, "PNG", compress_level=4)
    else:
        picture.save(stream, form.upper(), quality=quality)
    return stream.getvalue()


def enlarge(pixels_HWC: Tensor, width: int, height: int) -> Tensor:
    """A preview at the size of its picture."""
    picture = Image.fromarray(pixels_HWC.contiguous().numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3)


def decode(data: bytes, width: int, height: int) -> Tensor:
    """An image file as [3, height, width] in [-1, 1]. Raises Refused if it is none, or too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_READABLE) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise Refused(f"The image has {opened.width}x{opened.height} pixels; at most {MAX_PIXELS} in all.")
                picture = opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except Refused:
        raise
    except Exception as error:  # PIL raises almost anything on a broken file
        raise Refused(f"The image cannot be read ({type(error).__name__}); send a PNG, JPEG or WebP file.") from None
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
