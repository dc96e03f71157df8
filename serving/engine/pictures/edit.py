"""A picture to edit and its mask, decoded: what the engine draws on, and how what it drew is put back.

What the mask leaves out is the picture's own pixels in the end, bit for bit. Sources: AUTOMATIC1111's `masking.py`
(the region of `only_masked`, `fill`) and diffusers' inpainting pipelines. Suffixes: H, W of a picture, C 3 colours.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from serving.engine.pictures.codec import as_tensor, decode_opened, open_picture
from serving.engine.request import EditMask, GenerateRequest
from serving.errors import Refused
from training.storage.images import upright_size

Box = tuple[int, int, int, int]  # left, top, right, bottom
SEEN = 128  # a mask's value from which a pixel counts as redrawn
# what surrounds the mask, blurred into it: radius and repeats, from far to near
_BLURS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """`pixels_CHW` and `drawn_HW` (True: redrawn) have the request's size; they are the part `box` of `whole_HWC`.

    `weight_HW`, of the whole's size, says how much of what is drawn is seen: 0 nothing, 255 all. `start_CHW` is what
    drawing starts from where it is not the picture itself.
    """

    pixels_CHW: Tensor
    drawn_HW: Tensor
    start_CHW: Tensor | None
    whole_HWC: Tensor
    weight_HW: Tensor
    box: Box

    def compose(self, made_HWC: Tensor) -> Tensor:
        """The finished picture, uint8 [H, W, 3]: the whole one with what was made, put into it by its weight."""
        left, top, right, bottom = self.box
        made = Image.fromarray(made_HWC.contiguous().numpy())
        if made.size != (right - left, bottom - top):
            made = made.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        whole = Image.fromarray(self.whole_HWC.numpy())
        weight = Image.fromarray(self.weight_HW[top:bottom, left:right].contiguous().numpy())
        whole.paste(made, (left, top), weight)
        return as_tensor(whole)


def decode_edit(request: GenerateRequest) -> Edit:
    """The edit that a request with a mask asks for.

    Raises Refused for files that cannot be used, a mask of another size than the picture, one that is not there, and
    one that leaves nothing to redraw.
    """
    assert request.image is not None and request.mask is not None
    asked, size = request.mask, (request.width, request.height)
    native = asked.keep_size or asked.only_masked
    about_px = None if native else max(size)
    opened = open_picture(request.image, about_px, "picture")
    declared = upright_size(opened)
    picture, alpha = decode_opened(opened)
    mask = _mask(asked, declared, alpha, about_px)
    whole_size = picture.size if native else size
    picture, mask = (_fitted(one, whole_size) for one in (picture, mask))
    if asked.inverted:
        mask = ImageOps.invert(mask)
    if max(mask.tobytes()) < SEEN:
        raise Refused(
            "The mask leaves nothing to redraw: "
            + ("no part of it is transparent." if asked.means == "clear" else "no part of it is white.")
        )
    weight = _weight(mask, asked)
    if asked.blur_px:
        mask = weight
    box = _region(mask, asked.padding_px, size) if asked.only_masked else (0, 0, *whole_size)
    part, part_mask = (_fitted(one.crop(box), size) for one in (picture, mask))
    start = _filled(part, part_mask) if asked.fill == "fill" else None
    return Edit(
        pixels_CHW=_planes(part),
        drawn_HW=as_tensor(part_mask) >= SEEN,
        start_CHW=None if start is None else _planes(start),
        whole_HWC=as_tensor(picture),
        weight_HW=as_tensor(weight),
        box=box,
    )


def cells_of(drawn_HW: Tensor, cell_px: int) -> Tensor:
    """Which latent cells are redrawn, float32 [1, h, w]: those whose first pixel is, as diffusers has it.

    Where no cell would be, because the mask is finer than cells, all that it touches are.
    """
    cells_HW = drawn_HW[::cell_px, ::cell_px].float()
    if not cells_HW.any():
        cells_HW = torch.nn.functional.max_pool2d(drawn_HW[None].float(), cell_px)[0]
    return cells_HW[None]


def _mask(asked: EditMask, declared: tuple[int, int], alpha: Image.Image | None, about_px: int | None) -> Image.Image:
    """White where the picture is redrawn; of the mask's own file, or of the picture's alpha."""
    if asked.data is None:
        if alpha is None and not asked.required:
            return Image.new("L", declared, 255)
        if alpha is None:
            raise Refused(
                "There is no mask, and the picture has no transparency. Send a mask whose transparent part is to be "
                "redrawn, or make that part of the picture transparent. To redraw all of it, use "
                "/v1/images/generations with 'image' and 'strength'."
            )
        return ImageOps.invert(alpha)
    opened = open_picture(asked.data, about_px, "mask")
    if upright_size(opened) != declared:
        shown = ["x".join(map(str, one)) for one in (upright_size(opened), declared)]
        raise Refused(f"The mask has {shown[0]} px and the picture {shown[1]} px; they must have the same size.")
    image, clear = decode_opened(opened)
    if asked.means == "white":
        return image.convert("L") if clear is None else clear.point(lambda value: 255 if value > 127 else 0)
    if clear is None:
        raise Refused(
            "The mask has no transparency, so nothing would be redrawn. Make the part transparent that is to be "
            "redrawn, and keep the rest opaque."
        )
    return ImageOps.invert(clear)


def _weight(mask: Image.Image, asked: EditMask) -> Image.Image:
    """How much of what is drawn is seen, L. A blur reaches beyond the mask, a feather does not."""
    if asked.blur_px:
        return mask.filter(ImageFilter.GaussianBlur(asked.blur_px))
    if not asked.feather_px:
        return mask
    total = np.zeros((mask.height, mask.width), dtype=np.uint32)
    for _ in range(asked.feather_px + 1):
        total += np.asarray(mask)
        mask = mask.filter(ImageFilter.MinFilter(3))  # the picture's own border is no edge of the mask
    return Image.fromarray((total // (asked.feather_px + 1)).astype(np.uint8))


def _region(mask: Image.Image, padding_px: int, size: tuple[int, int]) -> Box:
    """The part of the picture that is drawn: the mask's surroundings, in the shape of `size` where there is room."""
    left, top, right, bottom = mask.point(lambda value: 255 if value else 0).getbbox() or (0, 0, *mask.size)
    width, height = mask.size
    left, top = max(0, left - padding_px), max(0, top - padding_px)
    right, bottom = min(width, right + padding_px), min(height, bottom + padding_px)
    shape = size[0] / size[1]
    wanted_w = min(width, max(right - left, ceil((bottom - top) * shape)))
    wanted_h = min(height, max(bottom - top, ceil(wanted_w / shape)))
    left = min(max(0, (left + right - wanted_w) // 2), width - wanted_w)
    top = min(max(0, (top + bottom - wanted_h) // 2), height - wanted_h)
    return left, top, left + wanted_w, top + wanted_h


def _filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture whose masked part holds the colours of what surrounds it."""
    known = Image.new("RGBa", picture.size)
    known.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    made = Image.new("RGBA", picture.size)
    for radius, repeats in _BLURS:
        blurred = known.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(repeats):
            made.alpha_composite(blurred)
    return made.convert("RGB")


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size == size:
        return image
    way = Image.Resampling.LANCZOS if image.mode == "RGB" else Image.Resampling.BILINEAR
    return image.resize(size, way)


def _planes(picture: Image.Image) -> Tensor:
    return as_tensor(picture).permute(2, 0, 1).contiguous()
