"""The configs of released models whose checkpoints are one file: such a file has weights and says nothing else.

Knows no torch.
"""

from collections.abc import Mapping
from typing import Any

Configs = Mapping[str, dict[str, Any]]  # by component

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_CLIP = {"max_position_embeddings": 77, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}


def configs(
    version: str, prediction_type: str = "epsilon", resolution: int = 512, *, zero_snr: bool = False
) -> Configs:
    """The component configs of Stable Diffusion 1.x (`version` "1"), 2.x ("2") or XL ("xl").

    `zero_snr`: the noise schedule ends at no signal at all.
    """
    made = _xl(resolution) if version == "xl" else _first_and_second(version == "1", resolution)
    made["scheduler"]["prediction_type"] = prediction_type
    if zero_snr:
        made["scheduler"] |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return made


def _vae(resolution: int, scale: float) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "sample_size": resolution,
        "scaling_factor": scale,
    }


def _clip_l() -> dict[str, Any]:
    return _CLIP | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
        "pad_token_id": 49407,
    }


def _first_and_second(first: bool, resolution: int) -> dict[str, dict[str, Any]]:
    unet = {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": 8 if first else [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768 if first else 1024,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "sample_size": resolution // 8,
        "use_linear_projection": not first,
    }
    second = {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,  # 2.x reads the last layer but one of 24
        "projection_dim": 512,
        "pad_token_id": 0,
    }
    scheduler = {
        "_class_name": "DDIMScheduler",
        **_BETAS,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    text = _clip_l() | ({} if first else second)
    return {"unet": unet, "vae": _vae(resolution, 0.18215), "text_encoder": text, "scheduler": scheduler}


def _xl(resolution: int) -> dict[str, dict[str, Any]]:
    unet = {
        "_class_name": "UNet2DConditionModel",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": resolution // 8,
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
    }
    second = _CLIP | {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
        "pad_token_id": 0,
    }
    scheduler = {
        "_class_name": "EulerDiscreteScheduler",
        **_BETAS,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    vae = _vae(resolution, 0.13025) | {"force_upcast": True}
    return {"unet": unet, "vae": vae, "text_encoder": _clip_l(), "text_encoder_2": second, "scheduler": scheduler}
