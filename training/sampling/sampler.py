"""Images from the base alone or from a bank's slots, many rows at once: class images, samples while training.

It is the base's own diffusers scheduler on a batch. Serving has an engine, in which rows join and leave at every step.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from training.adapters.bank import Bank
from training.base.base import Base
from training.base.family import RowFacts
from training.base.stream import stream


@torch.no_grad()
def sample(
    base: Base,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    resolution: int | None = None,
    bank: Bank | None = None,
    slots: Sequence[int] = (),
    scales: Sequence[float] = (),
) -> Tensor:
    """Latents [N, C, h, w] (scaled, on the base's device), one row a prompt; row n depends on its own seed alone.

    `steps` and `guidance_scale` are what the base recommends where they are None. With a `bank`, row n wears slot
    `slots[n]` (-1: nothing) at `scales[n]`, its negative prompt too.
    """
    steps = base.facts.steps if steps is None else steps
    guidance_scale = base.facts.guidance_scale if guidance_scale is None else guidance_scale
    guided = base.facts.guidance == "cfg" and guidance_scale > 1
    texts = [*prompts, *([negative_prompt] * len(prompts) if guided else [])]
    routes, words = [], None
    if bank is not None:
        words = [bank.words(slot) if slot >= 0 else {} for slot in slots] * (2 if guided else 1)
        times = 2 if guided else 1
        slots_NK = torch.tensor(list(slots) * times)[:, None]
        weights_NK = torch.tensor(list(scales) * times)[:, None]
        routes = [bank.route(component, slots_NK, weights_NK, base.dtype) for component in bank.sites]
    with bank.using(*routes) if bank is not None else nullcontext():
        conds = base.encode(texts, words)
        side = resolution or base.facts.resolution
        size = base.latent_size(side, side)
        stepper = base.process.stepper(steps, size)
        shape = (base.facts.channels, *size)
        noise = torch.stack([torch.randn(shape, generator=stream(seed, "sample")) for seed in seeds])
        latents = noise.to(base.device, base.dtype) * stepper.first
        told = [RowFacts(guidance=guidance_scale)] * len(texts)
        for time in stepper.times:
            rows = torch.cat([latents, latents]) if guided else latents
            prediction = base.predict(rows, time.to(base.device).expand(len(rows)), conds, told)
            if guided:
                with_prompt, without = prediction.chunk(2)
                prediction = without + guidance_scale * (with_prompt - without)
            latents = stepper.step(prediction, time, latents)
    return latents


def to_uint8(images_N3HW: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] on the CPU from images in [-1, 1]."""
    return ((images_N3HW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
