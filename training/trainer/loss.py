"""Noise, target and loss: pure functions of tensors, one value of everything per row.

Shape suffixes: N rows, C, H, W a latent's. `alphas_N` is the schedule's cumulative alpha at each row's timestep.
Source: Ho et al. 2020 (epsilon), Salimans and Ho 2022 (v), Hang et al. 2023 (min-SNR).
"""

import torch
from torch import Tensor


def add_noise(latents_NCHW: Tensor, noise_NCHW: Tensor, alphas_N: Tensor) -> Tensor:
    """The noisy latents of the forward process."""
    alphas = alphas_N[:, None, None, None]
    return alphas.sqrt() * latents_NCHW + (1 - alphas).sqrt() * noise_NCHW


def target(prediction_type: str, latents_NCHW: Tensor, noise_NCHW: Tensor, alphas_N: Tensor) -> Tensor:
    """What the denoiser should answer: the noise, or v. Raises ValueError for another prediction type."""
    if prediction_type == "epsilon":
        return noise_NCHW
    if prediction_type == "v_prediction":
        alphas = alphas_N[:, None, None, None]
        return alphas.sqrt() * noise_NCHW - (1 - alphas).sqrt() * latents_NCHW
    raise ValueError(f"prediction type '{prediction_type}' is not epsilon or v_prediction")


def row_losses(prediction_NCHW: Tensor, target_NCHW: Tensor) -> Tensor:
    """Mean squared error of each row, [N], at least in fp32."""
    wide = torch.promote_types(prediction_NCHW.dtype, torch.float32)
    return (prediction_NCHW.to(wide) - target_NCHW.to(wide)).square().flatten(1).mean(1)


def min_snr_weights(prediction_type: str, alphas_N: Tensor, gamma_N: Tensor) -> Tensor:
    """The min-SNR weight of each row, [N]; rows whose gamma is infinite weigh 1."""
    snr = alphas_N / (1 - alphas_N)
    floor = torch.finfo(snr.dtype).tiny  # a zero-terminal-SNR schedule really reaches 0
    clipped = torch.minimum(snr, gamma_N)
    weights = clipped / (snr + 1) if prediction_type == "v_prediction" else clipped / snr.clamp(min=floor)
    return torch.where(gamma_N.isinf(), torch.ones_like(snr), weights)
