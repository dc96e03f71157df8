"""One file a family, and the list of them. Nothing else names a pipeline, UNet, CLIP or VAE class."""

import json
from pathlib import Path

from training.base.families.stable_diffusion import StableDiffusion
from training.base.family import Family
from training.errors import UserError

FAMILIES: tuple[type[Family], ...] = (StableDiffusion,)


def open_family(folder: Path, name: str) -> Family:
    """The family of the base in a diffusers folder; `name` is what messages call it. Reads configs only.

    Raises UserError naming the supported families for another one.
    """
    pipeline = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    for family in FAMILIES:
        if pipeline in family.pipelines:
            return family(folder)
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise UserError(f"Base '{name}' is a {pipeline}; supported are {known}.")
