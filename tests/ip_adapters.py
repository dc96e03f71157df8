"""Tiny IP-Adapters of random weights for the tiny bases with a UNet, as diffusers' `load_ip_adapter` reads them."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from training.base.base import Base
from training.base.families.unet_image_prompt import cross_attentions
from training.storage.networks import ROOTS

SIDE = 32  # of the pictures that its image encoder takes
WIDTH, EMBEDDED, TOKENS = 24, 20, 4
FILE = "ip_adapter.safetensors"


def write_ip_adapter(base: Base, storage: Path, name: str, seed: int, *, plus: bool = False) -> Path:
    """Puts an adapter that changes every picture onto a storage, and returns its folder.

    All have the same image encoder: diffusers' pipelines have one for all.
    """
    torch.manual_seed(0)
    folder = storage / ROOTS["ip-adapter"] / name
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        projection_dim=EMBEDDED,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    torch.manual_seed(seed)
    unet: Any = base.denoiser
    width = unet.config.cross_attention_dim
    tensors = {f"image_proj.{key}": part for key, part in (_resampler if plus else _projection)(width).items()}
    for index, attention in enumerate(cross_attentions(unet)):
        out = attention.to_q.weight.shape[0]
        for side in ("k", "v"):
            tensors[f"ip_adapter.{2 * index + 1}.to_{side}_ip.weight"] = torch.randn(out, width)
    save_file({key: part.contiguous() for key, part in tensors.items()}, folder / FILE)
    return folder


def _projection(width: int) -> dict[str, Tensor]:
    return {
        "proj.weight": torch.randn(TOKENS * width, EMBEDDED),
        "proj.bias": torch.randn(TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def _resampler(width: int) -> dict[str, Tensor]:
    made = IPAdapterPlusImageProjection(embed_dims=WIDTH, output_dims=width, hidden_dims=16, heads=1, num_queries=6)
    return {key.replace("to_out.0", "to_out"): part.detach() for key, part in made.state_dict().items()}
