"""A tiny real base of every family: what the laws in `tests/training/base/test_families.py` are stated on.

Each is a diffusers pipeline of random weights, made without network, that `save_pretrained` writes.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from tests.tiny import tiny_pipeline
from tests.tiny_flow import flux, klein, z_image
from tests.tiny_xl import tiny_xl, xl_statistics, xl_velocity

FAMILIES: dict[str, Callable[[Path], DiffusionPipeline]] = {
    "sd": tiny_pipeline,
    "sd-v": lambda folder: tiny_pipeline(folder, "v_prediction"),
    "sdxl": tiny_xl,
    "sdxl-v": xl_velocity,
    "sdxl-statistics": xl_statistics,
    "klein": klein,
    "z-image": z_image,
    "flux": flux,
}
SISTERS: dict[str, Callable[[Path], DiffusionPipeline]] = {  # of a few steps, drawn without guidance
    "klein-distilled": lambda folder: klein(folder, distilled=True),
    "flux-schnell": lambda folder: flux(folder, guided=False),
}


def write_family(name: str, folder: Path) -> Path:
    """Writes the tiny base of a family, or a few-step sister, as a diffusers folder and returns it."""
    target = folder / name
    if not (target / "model_index.json").exists():
        torch.manual_seed(0)
        (FAMILIES | SISTERS)[name](folder / f"{name}-parts").save_pretrained(target)
    return target
