"""A linear map from latents to colours, fitted to a base's own VAE, for previews that take almost no time.

One latent cell becomes one pixel. The map is fitted on smooth random pictures, which the VAE encodes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from training.base.base import Base

PICTURES = 24


class PreviewMap:
    """`weights_DC`: colour = weights x [latent, 1]; D = latent channels + 1, C = 3."""

    def __init__(self, weights_DC: Tensor) -> None:
        self._weights_DC = weights_DC

    def __call__(self, latents_CHW: Tensor) -> Tensor:
        """uint8 [h, w, 3] on the CPU."""
        weights = self._weights_DC.to(latents_CHW)
        colours = torch.einsum("chw,cd->hwd", latents_CHW, weights[:-1]) + weights[-1]
        return ((colours.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def fit_preview(base: Base) -> PreviewMap:
    """Least squares over smooth random pictures, encoded by the base's VAE; the same base gives the same map."""
    side = min(base.facts.resolution, 128)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(PICTURES, 3, 4, 4, generator=generator) * 2 - 1
    pictures = functional.interpolate(coarse, side, mode="bilinear", align_corners=False)
    latents_NCHW = torch.cat([base.to_latents(part)[0] for part in pictures.split(4)]).float()
    colours_NCHW = functional.interpolate(pictures, latents_NCHW.shape[-2:], mode="area")
    x_MC = latents_NCHW.permute(0, 2, 3, 1).flatten(0, 2)
    y_MC = colours_NCHW.permute(0, 2, 3, 1).flatten(0, 2)
    x_MD = torch.cat([x_MC, torch.ones(len(x_MC), 1)], dim=1)
    # a little ridge: channels that carry no colour get no weight
    gram = x_MD.T @ x_MD + 1e-3 * len(x_MD) * torch.eye(x_MD.shape[1])
    return PreviewMap(torch.linalg.solve(gram, x_MD.T @ y_MC))
