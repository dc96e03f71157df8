"""A VAE that takes large pictures in tiles: overlapping by a quarter, blended, by diffusers' own tiling.

What a tile holds is what bounds memory, so it does not grow with the picture. A picture in tiles differs a little from
the same in one piece, since every tile is normalised by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_SETTINGS = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")
OVERLAP = 0.25


@contextmanager
def tiled(vae: nn.Module, tile_px: int) -> Iterator[None]:
    """Within it, pictures with a side of more than `tile_px` are encoded and decoded in tiles of that side; 0: none.

    The side is taken as the next smaller one whose overlap is whole in cells. The VAE is left as it was.
    """
    model: Any = vae
    cell_px = 2 ** (len(model.config.block_out_channels) - 1)
    cells = max(4, tile_px // cell_px // 4 * 4)
    held = [getattr(model, name) for name in _SETTINGS]
    for name, value in zip(_SETTINGS, (tile_px > 0, cells * cell_px, cells, OVERLAP), strict=True):
        setattr(model, name, value)
    try:
        yield
    finally:
        for name, value in zip(_SETTINGS, held, strict=True):
            setattr(model, name, value)
