"""How a picture at hand may lie in the picture that was made: scaled, or a part of it. Knows no torch.

Noise can only be read in the size and on the grid of cells that it was made with. `usual_views` are the sizes that a
picture may have been made in; `cut_views` suppose that a part was cut off, with or without scaling what is left.
"""

import io
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from training.base.facts import Facts

MOST_CUT = 0.15  # of a side, that `cut_views` look for
_SHIFTS = 4  # a side: places on the grid of cells that are tried
_SCALES = 9


class Supposition(NamedTuple):
    """One supposition: the picture scaled to `size`, its corner at `shift` pixels on a canvas of `canvas` pixels.

    `cut_cells`: up to so many cells of the whole picture may be missing above and left.
    """

    size: tuple[int, int]
    canvas: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    cut_cells: int = 0


def usual_views(size: tuple[int, int], facts: Facts, most_px: int) -> list[Supposition]:
    """The sizes (width, height) that a whole picture of `size` may have been made in: as it is, and as it is usual."""
    width, height = size
    step = facts.multiple_px
    usual = facts.resolution / min(size)
    found = []
    for factor in (1.0, usual, 2.0, 0.5):
        sides = (max(step, round(width * factor / step) * step), max(step, round(height * factor / step) * step))
        same_shape = abs(sides[0] / sides[1] / (width / height) - 1) < 0.1
        if same_shape and facts.resolution <= min(sides) and max(sides) <= most_px:
            found.append(Supposition(sides, sides))
    return list(dict.fromkeys(found))


def cut_views(size: tuple[int, int], facts: Facts, most_px: int) -> Iterator[Supposition]:
    """Suppositions that up to `MOST_CUT` of each side was cut off; what is left may have been scaled back to `size`."""
    cell, step = facts.cell_px, facts.multiple_px
    for scale in (1.0, *(1 - MOST_CUT * (turn + 1) / _SCALES for turn in range(_SCALES))):
        left = (round(size[0] * scale), round(size[1] * scale))
        if max(left) > most_px:
            continue
        cut = -(-int(max(left) * MOST_CUT / (1 - MOST_CUT)) // cell)
        for down in range(0, cell, max(1, cell // _SHIFTS)):
            for across in range(0, cell, max(1, cell // _SHIFTS)):
                canvas = (-(-(left[0] + across) // step) * step, -(-(left[1] + down) // step) * step)
                yield Supposition(left, canvas, (across, down), min(cut, 16))


def looked_at(image: Image.Image, view: Supposition) -> bytes:
    """The picture as a view supposes it, as a PNG file; the canvas beyond it continues its edges."""
    scaled = image if image.size == view.size else image.resize(view.size, Image.Resampling.BICUBIC)
    if view.canvas != view.size:
        across, down = view.shift
        right, bottom = across + view.size[0], down + view.size[1]
        whole = Image.new("RGB", view.canvas)
        for box, part in (
            ((0, 0, view.canvas[0], down), (0, 0, view.size[0], 1)),
            ((0, bottom, view.canvas[0], view.canvas[1]), (0, view.size[1] - 1, view.size[0], view.size[1])),
            ((0, 0, across, view.canvas[1]), (0, 0, 1, view.size[1])),
            ((right, 0, view.canvas[0], view.canvas[1]), (view.size[0] - 1, 0, view.size[0], view.size[1])),
        ):
            if box[2] > box[0] and box[3] > box[1]:
                whole.paste(scaled.crop(part).resize((box[2] - box[0], box[3] - box[1])), box[:2])
        whole.paste(scaled, (across, down))
        scaled = whole
    out = io.BytesIO()
    scaled.save(out, "PNG", compress_level=1)
    return out.getvalue()
