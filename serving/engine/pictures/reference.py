"""A picture that a prompt refers to, decoded as diffusers' FLUX.2 pipelines prepare theirs."""

import math

from PIL import Image
from torch import Tensor

from serving.engine.pictures.codec import as_tensor, decode_opened, open_picture
from serving.errors import Refused

REFERENCE_SIDE = 1024  # it is seen with at most so many pixels, squared


def decode_reference(data: bytes, multiple_px: int) -> Tensor:
    """uint8 [3, H, W]: in its own shape, scaled down where it is large, its sides cut to multiples. Raises Refused."""
    picture = decode_opened(open_picture(data, REFERENCE_SIDE, "reference picture")).image
    if picture.width * picture.height > REFERENCE_SIDE**2:
        scale = math.sqrt(REFERENCE_SIDE**2 / (picture.width * picture.height))
        size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    width, height = (side // multiple_px * multiple_px for side in picture.size)
    if not width or not height:
        shown = "x".join(map(str, picture.size))
        raise Refused(f"A reference picture has {shown} px; each side needs at least {multiple_px}.")
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return as_tensor(picture.crop((left, top, left + width, top + height))).permute(2, 0, 1).contiguous()
