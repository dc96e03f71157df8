"""Images from the base alone or from a bank's slots, many rows at once: class images, samples while training.

It is diffusers' DDIM on a batch. Serving has an engine of its own, in which rows join and leave at every step.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from training.adapters.bank import Bank
from training.base.base import Base
from training.base.stream import stream


@torch.no_grad()
def sample(
    base: Base,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 25,
    guidance_scale: float = 4.0,
    negative_prompt: str = "",
    resolution: int | None = None,
    bank: Bank | None = None,
    slots: Sequence[int] = (),
    scales: Sequence[float] = (),
) -> Tensor:
    """Latents [N, C, h, w] (scaled, on the base's device), one row a prompt; row n depends on its own seed alone.

    With a `bank`, row n wears slot `slots[n]` (-1: nothing) at `scales[n]`, its negative prompt too.
    """
    guided = guidance_scale > 1
    texts = [*prompts, *([negative_prompt] * len(prompts) if guided else [])]
    routes, words = [], None
    if bank is not None:
        words = [bank.words(slot) if slot >= 0 else {} for slot in slots] * (2 if guided else 1)
        times = 2 if guided else 1
        slots_NK = torch.tensor(list(slots) * times)[:, None]
        weights_NK = torch.tensor(list(scales) * times)[:, None]
        routes = [bank.route(component, slots_NK, weights_NK, base.dtype) for component in bank.sites]
    with bank.using(*routes) if bank is not None else nullcontext():
        embeddings = base.encode_prompts(texts, words)
        scheduler = DDIMScheduler.from_config(base.scheduler_config)
        scheduler.set_timesteps(steps)
        side = (resolution or base.resolution) // base.vae_scale
        shape = (base.latent_channels, side, side)
        noise = torch.stack([torch.randn(shape, generator=stream(seed, "sample")) for seed in seeds])
        latents = noise.to(base.device, base.dtype) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            rows = torch.cat([latents, latents]) if guided else latents
            prediction = base.unet(rows, timestep, encoder_hidden_states=embeddings).sample
            if guided:
                with_prompt, without = prediction.chunk(2)
                prediction = without + guidance_scale * (with_prompt - without)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


def to_pixels(images_N3HW: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] on the CPU from images in [-1, 1]."""
    return ((images_N3HW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
