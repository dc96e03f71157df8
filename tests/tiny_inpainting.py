"""Tiny real bases made for inpainting: the UNet takes a mask and the latents of the picture beside what it denoises."""

from pathlib import Path

import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

from tests.tiny import tiny_pipeline


def inpainting(folder: Path) -> StableDiffusionInpaintPipeline:
    """The tiny Stable Diffusion with 9 channels."""
    pipeline = tiny_pipeline(folder)
    torch.manual_seed(1)
    wide = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 9})
    return StableDiffusionInpaintPipeline(**{**pipeline.components, "unet": wide}, requires_safety_checker=False)
