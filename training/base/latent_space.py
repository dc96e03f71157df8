"""Between pixels and latents through an `AutoencoderKL`: shifted and scaled by the factors in its config."""

from typing import Any

from torch import Tensor, nn


def encode(vae: nn.Module, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std [N, C, h, w] of the latents of pictures in [-1, 1], in the space that noise is added in."""
    model: Any = vae
    posterior = model.encode(pixels_N3HW).latent_dist
    shift, scale = _factors(model)
    return (posterior.mean - shift) * scale, posterior.std * scale


def decode(vae: nn.Module, latents_NCHW: Tensor) -> Tensor:
    """Pictures [N, 3, H, W], nominally in [-1, 1]."""
    model: Any = vae
    shift, scale = _factors(model)
    pixels_N3HW: Tensor = model.decode(latents_NCHW / scale + shift).sample
    return pixels_N3HW


def _factors(vae: Any) -> tuple[float, float]:
    return vae.config.shift_factor or 0.0, vae.config.scaling_factor
