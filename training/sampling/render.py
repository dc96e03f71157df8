"""Pictures of many adapters in mixed batches: every checkpoint of every subject is a slot of one bank.

Knows nothing about scores. A picture depends on its own shot alone, never on its neighbours.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from PIL import Image

from training.adapters.adapter import Adapter
from training.adapters.bank import Bank
from training.adapters.layout import find_sites
from training.base.base import Base
from training.base.footprint import MOST_PICTURES, pictures_at_once
from training.sampling.sampler import sample, to_uint8

BARE = -1


class Look(NamedTuple):
    """How pictures are made, apart from what they show."""

    steps: int
    guidance_scale: float
    resolution: int | None
    negative_prompt: str = ""


class Shot(NamedTuple):
    """One picture: which slot is worn (BARE: none) at which scale, and what is asked."""

    slot: int
    scale: float
    prompt: str
    seed: int
    look: Look


def adapter_bank(base: Base, adapters: Sequence[Adapter]) -> Bank:
    """A bank with `adapters` in slots 0, 1, ...; `inject` it before use and `eject` it after."""
    keys = {key for adapter in adapters for key in adapter.modules}
    sites = {}
    for component, model in base.models.items():
        # whole names as ends: exactly the layers that some adapter changes
        found = [site for site in find_sites(component, model, _names(model)) if site.key in keys]
        if found:
            sites[component] = found
    bank = Bank(
        sites,
        slots=max(1, len(adapters)),
        rank=max((adapter.rank for adapter in adapters), default=1),
        vectors=(max(map(_vectors, adapters), default=0), base.facts.word_width),
        device=base.device,
        dtype=torch.promote_types(base.dtype, torch.float32),
    )
    for slot, adapter in enumerate(adapters):
        bank.put(slot, bank.pack(adapter))
    return bank


def render(
    base: Base,
    bank: Bank,
    shots: Iterable[Shot],
    *,
    rows: int = MOST_PICTURES,
    alive: Callable[[int, int], None] | None = None,
) -> Mapping[Shot, Image.Image]:
    """Every shot once, `rows` at a time, fewer of large ones and when memory runs out.

    `alive(done, all)` is called after each batch.
    """
    wanted = list(dict.fromkeys(shots))
    made: dict[Shot, Image.Image] = {}
    for look in dict.fromkeys(shot.look for shot in wanted):
        left = [shot for shot in wanted if shot.look == look]
        while left:
            batch = left[: min(rows, pictures_at_once(base.cells(look.resolution)))]
            try:
                made.update(zip(batch, _draw(base, bank, batch, look), strict=True))
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                rows = len(batch) // 2
                torch.cuda.empty_cache()
                continue
            left = left[len(batch) :]
            if alive is not None:
                alive(len(made), len(wanted))
    return made


def _draw(base: Base, bank: Bank, batch: Sequence[Shot], look: Look) -> list[Image.Image]:
    latents = sample(
        base,
        [shot.prompt for shot in batch],
        seeds=[shot.seed for shot in batch],
        steps=look.steps,
        guidance_scale=look.guidance_scale,
        negative_prompt=look.negative_prompt,
        resolution=look.resolution,
        bank=bank,
        slots=[shot.slot for shot in batch],
        scales=[shot.scale for shot in batch],
    )
    return [Image.fromarray(pixels.numpy()) for pixels in to_uint8(base.to_pixels(latents))]


def _names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name]


def _vectors(adapter: Adapter) -> int:
    """Textual-inversion vectors of all its words."""
    return sum(vectors.reshape(-1, vectors.shape[-1]).shape[0] for vectors in adapter.embeddings.values())
