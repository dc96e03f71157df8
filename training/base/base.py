"""The base: the frozen model that everything shares, loaded from a diffusers folder.

A `Base` is a family's loaded parts under a name and a hash. Nothing in it is ever changed; adapters lie over it in a
bank. Shape suffixes: N rows, C, H, W of a latent or picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.base.facts import Facts
from training.base.family import Cond, Family, Parts, RowFacts, Wording, Words
from training.base.files.check import check_base
from training.base.files.folder import find_base, hash_base
from training.base.footprint import images_at_once
from training.base.frozen_prompts import HOST, FrozenPrompts
from training.base.noise.process import Process
from training.base.quantization import (
    Offload,
    Quantization,
    check_offload,
    identity_of,
    quantization_config,
    without_saved_weights,
)
from training.base.words import first_vector

DRAWN = RowFacts()


@dataclass(frozen=True)
class Base:
    """A loaded base. `name` is what users call it; `hash` identifies its files.

    `prompts` are there where text encoders that nobody trains wait in host memory.
    """

    name: str
    hash: str
    folder: Path
    family: Family
    parts: Parts
    prompts: FrozenPrompts | None = None
    quantization: Quantization = "none"
    offload: Offload = "none"
    worn: str = ""  # the hash of an adapter that every row wears while others train

    @property
    def facts(self) -> Facts:
        """Sizes, components and defaults."""
        return self.family.facts

    @property
    def identity(self) -> str:
        """What decides what it computes: its files, and how its denoiser is quantised."""
        return identity_of(self.hash, self.quantization, self.worn)

    @property
    def process(self) -> Process:
        """The noise process."""
        return self.family.process

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.parts.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.parts.dtype

    @property
    def denoiser(self) -> nn.Module:
        """The model that takes the steps."""
        return self.parts.models[self.facts.denoiser]

    @property
    def models(self) -> dict[str, nn.Module]:
        """The components an adapter may change, by name."""
        return {component: self.parts.models[component] for component in self.facts.components}

    def recompute(self, on: bool) -> None:
        """Has the components that adapters change recompute their activations in backward, or keep them."""
        denoiser: Any = self.denoiser
        if on:
            denoiser.enable_gradient_checkpointing()
        else:
            denoiser.disable_gradient_checkpointing()
        for name in self.facts.text_encoders:
            encoder: Any = self.parts.models[name]
            if on:
                encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                encoder.gradient_checkpointing_disable()
            encoder.train(on)  # transformers' models recompute in training mode only

    def latent_size(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Cells down and across of a picture's latents."""
        return height_px // self.facts.cell_px, width_px // self.facts.cell_px

    def cells(self, resolution: int | None = None) -> int:
        """Cells of a square picture's latent; of the base's own resolution by default."""
        return ((resolution or self.facts.resolution) // self.facts.cell_px) ** 2

    # -- what the family does --

    def encode(self, prompts: Sequence[Wording], words: Sequence[Words] | None = None, chunks: int = 1) -> list[Cond]:
        """The record of each prompt; differentiable where a bank's route is in use, and towards `words[n]`, the trained
        vectors of textual-inversion words in prompt n. Prompts are cut after `chunks`, and filled up to it."""
        if self.prompts is not None:
            return self.prompts.encode(prompts, chunks, self._encode_one)
        return self.family.encode(self.parts, prompts, words, chunks)

    def _encode_one(self, prompt: Wording, chunks: int) -> Cond:
        return self.family.encode(self.parts, [prompt], None, chunks)[0]

    def count_chunks(self, prompt: Wording, words: Words) -> int:
        """How often the text encoder must run to take all of a prompt in."""
        return self.family.count_chunks(self.parts, prompt, words)

    @torch.no_grad()
    def to_latents(self, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the latents of pictures in [-1, 1]: two tensors [N, C, h, w] on the CPU."""
        parts = pixels_N3HW.split(images_at_once(pixels_N3HW[0, 0].numel()))
        found = [self.family.to_latents(self.parts, part.to(self.device, self._vae_dtype)) for part in parts]
        mean, std = (torch.cat(kind) for kind in zip(*found, strict=True))
        return mean.cpu(), std.cpu()

    @torch.no_grad()
    def to_pixels(self, latents_NCHW: Tensor) -> Tensor:
        """Pictures in [-1, 1], [N, 3, H, W]."""
        latents = latents_NCHW.to(self.device, self._vae_dtype)
        parts = latents.split(images_at_once(latents[0, 0].numel() * self.facts.cell_px**2))
        return torch.cat([self.family.to_pixels(self.parts, part).clamp(-1, 1) for part in parts])

    def predict(
        self, x_NCHW: Tensor, times_N: Tensor, conds: Sequence[Cond], rows: Sequence[RowFacts] | None = None
    ) -> Tensor:
        """What the denoiser says of N rows, [N, C, h, w]. `rows`: of drawn pictures by default."""
        return self.family.predict(self.parts, x_NCHW, times_N, conds, rows or [DRAWN] * len(conds))

    def features(self, x_NCHW: Tensor, times_N: Tensor, conds: Sequence[Cond]) -> Tensor:
        """Activations [N, E, h, w] inside the denoiser that tell what a picture shows."""
        return self.family.features(self.parts, x_NCHW, times_N, conds, [DRAWN] * len(conds))

    def word_start(self, text: str) -> Tensor:
        """Where a textual-inversion word starts: the embedding [D] of the first token of `text`, of each encoder."""
        return torch.cat(
            [
                first_vector(self.parts.tokenizers[name], _embedding(self.parts.models, name), text)
                for name in self.facts.text_encoders
            ]
        )

    @property
    def _vae_dtype(self) -> torch.dtype:
        return next(self.parts.models["vae"].parameters()).dtype


def load_base(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    root: str = ".",
    park_text: bool = False,
    quantization: Quantization = "none",
    offload: Offload = "none",
) -> Base:
    """Loads a base, frozen and in eval mode.

    `name`: `pocket`, a diffusers folder or a hub id; `root`: where relative folders start. `park_text`: of a family
    whose text encoders nobody trains, they are on the device only while prompts are encoded, each once.
    `quantization`: of the denoiser's linear layers; `offload`: whether its layers wait in host memory. Raises UserError
    if the base is not found, or of a family that is not supported, or the quantisation cannot be had.
    """
    folder = find_base(name, root)
    family = check_base(name, folder)
    target = torch.device(device) if device is not None else best_device()
    check_offload(offload, quantization)
    config = quantization_config(quantization, target, dtype)
    parts = family.load(target, dtype, {} if config is None else {family.facts.denoiser: config})
    facts = family.facts
    if config is not None:
        without_saved_weights(parts.models[facts.denoiser])
    parked = facts.frozen_encoders if park_text and not facts.text_encoders else ()
    waiting = (*parked, *([] if offload == "none" else [facts.denoiser]))
    for component, model in parts.models.items():
        model.requires_grad_(False).eval().to(HOST if component in waiting else target)
    if offload == "layers":
        _offload(parts.models[facts.denoiser], target)
    prompts = FrozenPrompts({name: parts.models[name] for name in parked}, target) if parked else None
    return Base(name, hash_base(folder), folder, family, parts, prompts, quantization, offload)


def _offload(model: nn.Module, device: torch.device) -> None:
    """Has every layer's weights wait in host memory, and come to the device for each of its forwards alone.

    Backward holds those that it still needs, so little is gained in training unless activations are recomputed.
    """
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=device, offload_buffers=True)
    model.requires_grad_(False)


def best_device() -> torch.device:
    """The device this process should compute on: CUDA where it really works, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _embedding(models: Mapping[str, nn.Module], name: str) -> nn.Embedding:
    encoder: Any = models[name]
    embedding: nn.Embedding = encoder.get_input_embeddings()
    return embedding
