"""An adapter fused into its base: a full model folder that needs no adapter, for programs that know none."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from training.adapter import Adapter
from training.bank import find_sites
from training.base import load_base
from training.base_weights import find_weights
from training.errors import UserError


def fuse_base(base_name: str, parts: Sequence[tuple[Adapter, float]], out: Path, *, root: str = ".") -> int:
    """Writes a diffusers folder of the base with every adapter, times its weight, added to its layers; fp16.

    Answers how many layers were changed. Raises UserError if `out` holds something, or a module has no layer.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"'{out}' is not empty. Name a new folder.")
    base = load_base(base_name, device="cpu", root=root)
    layers = {
        site.key: site.layer
        for component, model in base.models.items()
        for site in find_sites(component, model, [name for name, _ in model.named_modules() if name])
    }
    changed: set[str] = set()
    for adapter, weight in parts:
        for key, low in adapter.modules.items():
            if key not in layers:
                raise UserError(f"Adapter module '{key}' has no layer in base '{base_name}'.")
            with torch.no_grad():
                layers[key].weight += weight * low.delta().to(layers[key].weight)
            changed.add(key)
    pipeline = StableDiffusionPipeline.from_pretrained(
        base.folder,
        unet=base.unet,
        text_encoder=base.text_encoder,
        vae=base.vae,
        variant=find_weights(base.folder, "unet").variant,
    )
    pipeline.to(torch.float16).save_pretrained(out)
    return len(changed)
