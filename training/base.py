"""The base: the frozen model that everything shares, loaded from a diffusers folder.

A `Base` is the pieces (denoiser, VAE, text encoder, tokenizer, noise schedule) and the few facts about them that the
rest needs. Nothing in it is ever changed; adapters lie over it in a bank.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.base_check import check_base
from training.base_folder import find_base, hash_base
from training.base_weights import find_weights
from training.family import Family
from training.words import Words, replacing, tokenise


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
    # where VAE and text encoder wait while nobody needs them; None: they stay on the device
    rest: torch.device | None = None

    @contextmanager
    def at_work(self, component: str) -> Iterator[None]:
        """The component is on the device inside, and back at rest afterwards."""
        model: torch.nn.Module = getattr(self, component)
        if self.rest is None:
            yield
            return
        before = next(model.parameters()).device
        model.to(self.device)
        try:
            yield
        finally:
            model.to(before)

    def send(self, component: str, *, to_work: bool) -> None:
        """Brings a component to the device, or to rest, until the next call."""
        if self.rest is not None:
            getattr(self, component).to(self.device if to_work else self.rest)

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

    def encode_prompts(self, prompts: Sequence[str], words: Sequence[Words] | None = None) -> Tensor:
        """Prompt embeddings [N, L, C]; differentiable where a bank's route is in use.

        `words[n]`: trained vectors of textual-inversion words in prompt n; differentiable towards them.
        """
        made = tokenise(self.tokenizer, prompts, words or [{}] * len(prompts))
        with self.at_work("text_encoder"), replacing(self.token_embedding, made.places):
            return self.text_encoder(made.ids.to(self.device))[0]

    @torch.no_grad()
    def encode_images(self, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the posterior of images in [-1, 1], scaled: two tensors [N, C, h, w] on the CPU."""
        with self.at_work("vae"):
            posterior = self.vae.encode(pixels_NCHW.to(self.device, self.vae.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return (posterior.mean * scale).cpu(), (posterior.std * scale).cpu()

    @torch.no_grad()
    def decode(self, latents_NCHW: Tensor) -> Tensor:
        """Images in [-1, 1], [N, 3, H, W], from scaled latents."""
        latents = latents_NCHW.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        with self.at_work("vae"):
            return self.vae.decode(latents).sample.clamp(-1, 1)


def load_base(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    root: str = ".",
    rest: torch.device | str | None = None,
) -> Base:
    """Loads a base, frozen and in eval mode.

    `name`: `pocket`, a diffusers folder or a hub id; `root`: where relative folders start; `rest`: where VAE and text
    encoder wait while nobody needs them (default: they stay on the device). Raises UserError if it cannot be found or
    is of a family that is not supported.
    """
    folder = find_base(name, root)
    family = check_base(name, folder)
    target = torch.device(device) if device is not None else best_device()
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    models = {component: _load(kind, folder, component, dtype) for component, kind in kinds.items()}
    for component, model in models.items():
        away = rest is not None and component != family.denoiser
        model.requires_grad_(False).eval().to(rest if away else target)
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
        rest=torch.device(rest) if rest is not None else None,
        **models,
    )


def _load(kind: Any, folder: Path, component: str, dtype: torch.dtype) -> Any:
    """A component from its safetensors files, whichever variant they are; never from a pickle."""
    variant = find_weights(folder, component).variant
    return kind.from_pretrained(folder / component, torch_dtype=dtype, variant=variant, use_safetensors=True)


def best_device() -> torch.device:
    """The device this process should compute on: CUDA where it really works, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
