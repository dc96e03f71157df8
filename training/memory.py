"""How many rows fit on a device, and whether activations have to be recomputed for that. Measured, not guessed.

What limits a pack is what its forward saves for backward. One row's worth is counted by running one row and asking
autograd what it keeps; that is the same on a CPU and on a GPU.
"""

from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from training.base import Base

# of the free memory; the rest is for what one layer needs while it runs, fragmentation and decoding samples
SHARE = 0.75


@dataclass(frozen=True)
class Fit:
    """How to run a pack: rows at once, whether to recompute activations, and the reason in words."""

    rows: int
    checkpointing: bool
    why: str


def saved_bytes(base: Base, resolution: int | None = None) -> int:
    """Bytes that the denoiser's forward of one training row keeps for backward, as the base is set up now."""
    side = (resolution or base.resolution) // base.vae_scale
    latents = torch.zeros(1, base.latent_channels, side, side, device=base.device, dtype=base.dtype)
    embeddings = base.encode_prompts([""]).detach().requires_grad_(True)
    seen: dict[int, int] = {}
    frozen = {parameter.untyped_storage().data_ptr() for parameter in base.unet.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        kept = base.unet(latents.requires_grad_(True), 0, encoder_hidden_states=embeddings).sample
    del kept
    return sum(seen.values())


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def fit_rows(base: Base, wanted_rows: int, *, state_bytes: int, resolution: int | None = None) -> Fit:
    """Decides for `wanted_rows` rows: activations are kept while memory allows, recomputed where not."""
    budget = SHARE * free_bytes(base.device) - state_bytes
    plain = saved_bytes(base, resolution)
    if plain * wanted_rows <= budget:
        why = f"{wanted_rows} rows x {plain / 1e6:.0f} MB of activations fit into {budget / 1e6:.0f} MB"
        return Fit(wanted_rows, False, why)
    base.unet.enable_gradient_checkpointing()
    lean = saved_bytes(base, resolution)
    base.unet.disable_gradient_checkpointing()
    rows = max(1, min(wanted_rows, int(budget // lean)))
    why = (
        f"{wanted_rows} rows x {plain / 1e6:.0f} MB of activations do not fit into {budget / 1e6:.0f} MB; recomputing "
        f"them takes {lean / 1e6:.0f} MB a row: {rows} rows"
    )
    return Fit(rows, True, why)
