"""Pictures from the base, through nothing but diffusers' own StableDiffusionPipeline."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from transformers import CLIPTextModel

from tools.pocket import tokenizer
from tools.pocket.recipe import IMAGE_PX


def schedule() -> DDIMScheduler:
    """Ends in pure noise: trained and sampled alike, so that bright and dark places come out as they are."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def pipeline(unet: UNet2DConditionModel, text: CLIPTextModel, vae: AutoencoderKL) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer.build(),
        unet=unet,
        scheduler=schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def generate(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    guidance: float = 3.0,
    steps: int = 20,
    seed: int = 0,
    batch_size: int = 28,
) -> NDArray[np.uint8]:
    """Pictures [N, H, W, 3]; the picture of a prompt depends on its position and the seed, not on the batch."""
    pipe.set_progress_bar_config(disable=True)
    made = []
    for first in range(0, len(prompts), batch_size):
        batch = list(prompts[first : first + batch_size])
        generators = [torch.Generator().manual_seed(seed * 100_003 + first + i) for i in range(len(batch))]
        result = pipe(
            batch,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
            height=IMAGE_PX,
            width=IMAGE_PX,
        )
        made.append(np.rint(result.images * 255).astype(np.uint8))
    return np.concatenate(made)


def grid(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
    return np.concatenate(rows)
