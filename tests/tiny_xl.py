"""A tiny Stable Diffusion XL, and the kinds of its descendants: real classes, random weights of a fixed seed."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.tiny import tiny_tokenizer


def tiny_xl(folder: Path, seed: int = 0, vae: dict[str, Any] | None = None, **scheduler: Any) -> DiffusionPipeline:
    """SDXL, two blocks wide: 16 px pictures, 8x8 latents; `vae` and `scheduler` change their configs.

    Its encoders are 32 and 24 wide: what mixes them up does not fit.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(folder / "vocab")
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    settings |= {"steps_offset": 1, "timestep_spacing": "leading", **scheduler}
    pads = tiny_tokenizer(folder / "vocab")
    pads.pad_token = "!"  # as SDXL's second tokenizer
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=32 + 24,
            norm_num_groups=8,
        ),
        vae=AutoencoderKL(
            **{
                "block_out_channels": (8, 8),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "latent_channels": 4,
                "norm_num_groups": 4,
                "sample_size": 16,
                "scaling_factor": 0.13025,
                **(vae or {}),
            }
        ),
        text_encoder=CLIPTextModel(_clip(tokenizer, 32)),
        text_encoder_2=CLIPTextModelWithProjection(_clip(tokenizer, 24)),
        tokenizer=tokenizer,
        tokenizer_2=pads,
        scheduler=EulerDiscreteScheduler(**settings),
        add_watermarker=False,
    )


def _clip(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=37,
        projection_dim=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )


def xl_velocity(folder: Path) -> DiffusionPipeline:
    """As NoobAI's v-prediction bases: the schedule ends at no signal at all."""
    return tiny_xl(folder, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")


def xl_statistics(folder: Path) -> DiffusionPipeline:
    """As Playground's: latents are normalised channel by channel."""
    means = {"latents_mean": [-1.6, 1.1, -0.5, 0.2], "latents_std": [8.4, 5.9, 5.3, 5.9], "scaling_factor": 0.5}
    return tiny_xl(folder, vae=means)
