"""Between pictures and latents: in tiles beyond a size, so that memory does not grow with pictures."""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.base.base import Base
from training.base.tiling import tiled


def in_range(pixels_CHW: Tensor) -> Tensor:
    """A picture of uint8 in [-1, 1]."""
    return pixels_CHW.float() / 127.5 - 1


def as_bytes(images_NCHW: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8, on the CPU."""
    return ((images_NCHW / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


@dataclass(frozen=True, slots=True)
class TiledVae:
    """The base's VAE, for pictures of any size; `tile_px` 0: never in tiles."""

    base: Base
    tile_px: int

    def to_latents(self, pixels_CHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std [C, h, w] of the latents of a picture in [-1, 1]: float32 on the CPU."""
        with tiled(self.base.parts.models["vae"], self.tile_px):
            mean_NCHW, std_NCHW = self.base.to_latents(pixels_CHW[None])
        return mean_NCHW[0].float(), std_NCHW[0].float()

    def to_pixels(self, latents_NCHW: Tensor) -> Tensor:
        """Pictures in [-1, 1], [N, 3, H, W]."""
        with tiled(self.base.parts.models["vae"], self.tile_px):
            return self.base.to_pixels(latents_NCHW)
