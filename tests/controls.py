"""Tiny ControlNets of random weights for the tiny bases of `tests/families.py`, and diffusers' pipelines with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxTransformer2DModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)

from tests.tiny_flow import flux
from training.base.base import Base
from training.storage.networks import ROOTS

PIPELINES = {
    "sd": StableDiffusionControlNetPipeline,
    "sdxl": StableDiffusionXLControlNetPipeline,
    "flux": FluxControlNetPipeline,
    "flux-pixels": FluxControlNetPipeline,
}


def write_deep_flux(folder: Path) -> Path:
    """FLUX.1 with a VAE of eight pixels a cell, which the networks that read pixels are made for, and three blocks of
    each kind, to which a network's residuals are dealt out."""
    pipeline = flux(folder / "parts")
    config: dict[str, Any] = dict(pipeline.transformer.config)
    pipeline.transformer = FluxTransformer2DModel.from_config(config | {"num_layers": 3, "num_single_layers": 3})
    blocks = {"block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4}
    vae: dict[str, Any] = {**pipeline.vae.config, **blocks, "up_block_types": ("UpDecoderBlock2D",) * 4}
    pipeline.vae = AutoencoderKL.from_config(vae)
    target = folder / "deep-flux"
    pipeline.save_pretrained(target)
    return target


def control_for(base: Base, seed: int) -> Any:
    """A network that changes every picture of a base; of a deep FLUX.1, of the kind that reads pixels, not latents."""
    torch.manual_seed(seed)
    network: Any
    if base.facts.family == "flux-1":
        own: Any = base.denoiser
        deep = base.facts.cell_px == 8
        config = {name: value for name, value in own.config.items() if name != "out_channels"}
        config |= {"num_layers": 1 + deep, "num_single_layers": 2}
        config |= {"conditioning_embedding_channels": 16, "patch_size": 2} if deep else {}
        network = FluxControlNetModel.from_config(config)
    else:
        network = ControlNetModel.from_unet(base.denoiser, conditioning_embedding_out_channels=(8, 16))
    with torch.no_grad():  # they begin as zeros
        for name, part in network.named_parameters():
            if "controlnet" in name or "input_hint_block" in name:
                part.normal_(std=0.3)
    return network.eval()


def write_control(network: Any, storage: Path, name: str) -> Path:
    """Puts a network onto a storage under a name, and returns its folder."""
    folder = storage / ROOTS["control"] / name
    network.save_pretrained(folder)
    return folder


def control_pipeline(name: str, folder: Path, networks: Sequence[Any]) -> Any:
    """diffusers' pipeline of a family with some ControlNets."""
    made = PIPELINES[name].from_pretrained(folder, controlnet=networks[0] if len(networks) == 1 else list(networks))
    made.set_progress_bar_config(disable=True)
    return made
