"""The base: the frozen model that everything shares, loaded from a diffusers folder.

A `Base` is the pieces (denoiser, VAE, text encoder, tokenizer, noise schedule) and the few facts about them that the
rest needs. Nothing in it is ever changed; adapters lie over it in a bank.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.base.check import check_base
from training.base.family import Family
from training.base.folder import find_base, hash_base
from training.base.footprint import images_at_once
from training.base.weights import find_weights
from training.base.words import Tokenised, Words, replacing, tokenise


@dataclass(frozen=True)
class Base:
    """A loaded base. `name` is what users call it; `hash` identifies its files."""

    name: str
    hash: str
    folder: Path
    family: Family
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        """The components an adapter may change, by name."""
        return {component: getattr(self, component) for component in self.family.components}

    @property
    def vae_scale(self) -> int:
        """Pixels a latent cell, per side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """The side in pixels the base was made for."""
        return int(self.unet.config.sample_size) * self.vae_scale

    def cells(self, resolution: int | None = None) -> int:
        """Cells of a square picture's latent; of the base's own resolution by default."""
        return ((resolution or self.resolution) // self.vae_scale) ** 2

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def prediction_type(self) -> str:
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """The noise schedule of training: [T] in float64 on the CPU, zero-terminal-SNR applied where configured."""
        scheduler = DDPMScheduler.from_config(self.scheduler_config)
        return scheduler.alphas_cumprod.double()

    @property
    def token_embedding(self) -> torch.nn.Embedding:
        return self.text_encoder.get_input_embeddings()

    def encode_prompts(self, prompts: Sequence[str], words: Sequence[Words] | None = None, chunks: int = 1) -> Tensor:
        """Prompt embeddings [N, chunks x L, C]; differentiable where a bank's route is in use.

        `words[n]`: trained vectors of textual-inversion words in prompt n; differentiable towards them. A prompt that
        is longer than the encoder is encoded chunk by chunk, each by itself, as A1111 and Compel do. It is cut after
        `chunks`, and filled up to it with what the empty prompt is encoded to.
        """
        known = words or [{}] * len(prompts)
        made = [self._encode(tokenise(self.tokenizer, prompts, known, chunk)) for chunk in range(chunks)]
        return torch.cat(made, dim=1)

    def _encode(self, chunk: Tokenised) -> Tensor:
        with replacing(self.token_embedding, chunk.places):
            return self.text_encoder(chunk.ids.to(self.device))[0]

    @torch.no_grad()
    def encode_images(self, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the posterior of images in [-1, 1], scaled: two tensors [N, C, h, w] on the CPU."""
        scale = self.vae.config.scaling_factor
        parts = pixels_NCHW.split(images_at_once(pixels_NCHW[0, 0].numel()))
        found = [self.vae.encode(part.to(self.device, self.vae.dtype)).latent_dist for part in parts]
        mean, std = torch.cat([part.mean for part in found]), torch.cat([part.std for part in found])
        return (mean * scale).cpu(), (std * scale).cpu()

    @torch.no_grad()
    def decode(self, latents_NCHW: Tensor) -> Tensor:
        """Images in [-1, 1], [N, 3, H, W], from scaled latents."""
        latents = latents_NCHW.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        parts = latents.split(images_at_once(latents[0, 0].numel() * self.vae_scale**2))
        return torch.cat([self.vae.decode(part).sample.clamp(-1, 1) for part in parts])


def load_base(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    root: str = ".",
) -> Base:
    """Loads a base, frozen and in eval mode.

    `name`: `pocket`, a diffusers folder or a hub id; `root`: where relative folders start. Raises UserError if it is
    not found, or of a family that is not supported.
    """
    folder = find_base(name, root)
    family = check_base(name, folder)
    target = torch.device(device) if device is not None else best_device()
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    models = {component: _load(kind, folder, component, dtype) for component, kind in kinds.items()}
    for model in models.values():
        model.requires_grad_(False).eval().to(target)
    if target.type == "cpu" and dtype == torch.bfloat16:
        # fused attention's backward is slow on a CPU in bf16: plain attention makes a pack 1.6 times as fast
        models["unet"].set_attn_processor(AttnProcessor())
    return Base(
        name=name,
        hash=hash_base(folder),
        folder=folder,
        family=family,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler_config=json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
        device=target,
        dtype=dtype,
        **models,
    )


def _load(kind: Any, folder: Path, component: str, dtype: torch.dtype) -> Any:
    """A component from its safetensors files, whichever variant they are; never from a pickle."""
    variant = find_weights(folder, component).variant
    return kind.from_pretrained(folder / component, torch_dtype=dtype, variant=variant, use_safetensors=True)


def best_device() -> torch.device:
    """The device this process should compute on: CUDA where it really works, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
