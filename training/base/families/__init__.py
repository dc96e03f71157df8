"""One file a family, and the list of them. Nothing else names a pipeline, UNet, CLIP or VAE class."""

import json
from collections.abc import Mapping
from pathlib import Path

from training.base.families.flux_1 import Flux1
from training.base.families.flux_2_klein import Flux2Klein
from training.base.families.stable_diffusion import StableDiffusion
from training.base.families.stable_diffusion_xl import StableDiffusionXL
from training.base.families.z_image import ZImage
from training.base.family import Family
from training.errors import UserError

FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusionXL, Flux2Klein, ZImage, Flux1)


def open_family(folder: Path, name: str) -> Family:
    """The family of the base in a diffusers folder; `name` is what messages call it. Reads configs only.

    Raises UserError naming the supported families for another one, or saying what is wrong with the configs.
    """
    index = folder / "model_index.json"
    try:
        pipeline = str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"Base '{name}': '{index}' does not name a pipeline class.") from None
    for family in FAMILIES:
        if pipeline in family.pipelines:
            return family(folder, name)
    known = "; ".join(f"{', '.join(family.pipelines)} ({family.title})" for family in FAMILIES)
    raise UserError(
        f"Base '{name}' is a {pipeline}, which cannot be trained. Supported: {known}. Take a base of that kind."
    )


def title_of_adapter(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The title of the family that an adapter's tensors, by key, are made for; None where that cannot be told."""
    plain = {key.replace(".", "_").replace(":", "_"): shape for key, shape in shapes.items()}
    return next((family.title for family in FAMILIES if family.owns(plain)), None)
