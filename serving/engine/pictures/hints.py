"""The pictures of a request's ControlNets and IP-Adapters: decoded as start pictures are, in their tenant's turn."""

import asyncio
import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from serving.engine.pictures.canny import canny
from serving.engine.pictures.decoding import Decoding
from serving.engine.request import GenerateRequest

PROMPT_PX = 224  # the shorter side of a picture in place of words: what CLIP's image encoders take
_TURNED = range(5, 9)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112
_LONGEST = 8  # times the shorter side: a longer strip is squeezed, so that decoding stays bounded


@dataclass(frozen=True, slots=True)
class Hints:
    """Pictures, uint8 [3, H, W]: of each ControlNet in the size of the request's images, of each IP-Adapter small."""

    controls: tuple[Tensor, ...] = ()
    image_prompts: tuple[Tensor, ...] = ()


NO_HINTS = Hints()


async def decode_hints(decoding: Decoding, request: GenerateRequest) -> Hints:
    """The pictures of a request. Raises as `Decoding` does."""
    sizes = [(use.image, request.width, request.height) for use in request.controls]
    sizes += [(use.image, *small_size(use.image)) for use in request.image_prompts]
    waiting = [asyncio.wrap_future(decoding.submit(request.tenant, *one)) for one in sizes]
    decoded = await asyncio.gather(*waiting)
    controls = [
        await asyncio.to_thread(_edges, pixels_3HW) if use.preprocess == "canny" else pixels_3HW
        for use, pixels_3HW in zip(request.controls, decoded, strict=False)
    ]
    return Hints(tuple(controls), tuple(decoded[len(controls) :]))


def small_size(data: bytes) -> tuple[int, int]:
    """Width and height of a picture whose shorter side is as long as an image encoder takes; a square if its header
    cannot be read, which decoding it says."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            if picture.getexif().get(_ORIENTATION) in _TURNED:
                width, height = height, width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return PROMPT_PX, PROMPT_PX
    shorter = min(width, height)
    across, down = (min(_LONGEST * PROMPT_PX, round(side * PROMPT_PX / shorter)) for side in (width, height))
    return across, down


def _edges(pixels_3HW: Tensor) -> Tensor:
    edges_HW3 = canny(pixels_3HW.permute(1, 2, 0).contiguous().numpy())
    return torch.from_numpy(edges_HW3).permute(2, 0, 1).contiguous()
