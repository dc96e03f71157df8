"""How many rows fit on a device, and whether activations have to be recomputed for that. Measured, not guessed.

What limits a pack is what its forward saves for backward. One row's worth is counted by running one row and asking
autograd what it keeps; that is the same on a CPU and on a GPU.
"""

from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import Tensor

from training.base.base import Base

# the share of free memory that is used; the rest is for temporaries of a layer, fragmentation and decoding samples
SHARE = 0.75


@dataclass(frozen=True)
class Fit:
    """How to run a pack: rows at once (0: not even one), whether to recompute activations, and the reason in words."""

    rows: int
    checkpointing: bool
    why: str


def saved_bytes(base: Base, resolution: int | None = None) -> int:
    """Bytes that the denoiser's forward of one training row keeps for backward, as the base is set up now."""
    side = resolution or base.facts.resolution
    shape = (1, base.facts.channels, *base.latent_size(side, side))
    latents = torch.zeros(shape, device=base.device, dtype=base.dtype, requires_grad=True)
    cond = {name: part.detach().requires_grad_(part.is_floating_point()) for name, part in base.encode([""])[0].items()}
    times = torch.zeros(1, device=base.device)
    seen: dict[int, int] = {}
    frozen = {place for parameter in base.denoiser.parameters() for place in _storages(parameter)}

    def count(tensor: Tensor) -> Tensor:
        seen.update({place: size for place, size in _storages(tensor).items() if place not in frozen})
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        kept = base.predict(latents, times, [cond])
    del kept
    return sum(seen.values())


def _storages(tensor: Tensor) -> dict[int, int]:
    """Bytes of the memory that a tensor lies in, by its address; a quantised one lies in several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        parts = [_storages(part) for name in names if (part := getattr(tensor, name)) is not None]
        return {place: size for part in parts for place, size in part.items()}
    storage = tensor.untyped_storage()
    return {storage.data_ptr(): storage.nbytes()}


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def fit_rows(
    base: Base,
    wanted_rows: int,
    *,
    state_bytes: int,
    resolution: int | None = None,
    checkpointing: Literal["auto"] | bool = "auto",
) -> Fit:
    """Decides for `wanted_rows` rows: activations are kept while memory allows, recomputed where not (`auto`)."""
    budget = SHARE * free_bytes(base.device) - state_bytes
    plain = saved_bytes(base, resolution) if checkpointing is not True else 0
    if checkpointing is False or (plain and plain * wanted_rows <= budget):
        return Fit(_room(budget, plain, wanted_rows), False, _why(wanted_rows, plain, budget))
    base.recompute(True)
    lean = saved_bytes(base, resolution)
    base.recompute(False)
    rows = _room(budget, lean, wanted_rows)
    why = f"recomputing them takes {lean / 1e6:.0f} MB a row: {rows} rows"
    return Fit(rows, True, f"{_why(wanted_rows, plain, budget)}; {why}" if plain else _why(wanted_rows, lean, budget))


def _room(budget: float, row_bytes: int, wanted_rows: int) -> int:
    return max(0, min(wanted_rows, int(budget // row_bytes)))


def _why(rows: int, row_bytes: int, budget: float) -> str:
    verb = "fit" if rows * row_bytes <= budget else "do not fit"
    return f"{rows} rows x {row_bytes / 1e6:.0f} MB of activations {verb} into {max(0.0, budget) / 1e6:.0f} MB"
