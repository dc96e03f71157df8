"""Latents made once, before the loop: a subject's photos (every crop, mirror and colour variant) and class images.

A `LatentSet` keeps the posterior, not a sample of it, so each step still draws its own latents. Sets are cached on the
storage under the hash of everything they depend on.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from training.base import Base
from training.manifest import TrainSpec
from training.photos import Photo
from training.storage_base import Storage
from training.variants import variants

BATCH = 8


@dataclass(frozen=True)
class LatentSet:
    """V images as latents: posterior mean and std [V, C, h, w] in fp32 on the CPU, and each one's prompt."""

    mean_VCHW: Tensor
    std_VCHW: Tensor
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def draw(self, picked: Sequence[int], generator: torch.Generator) -> Tensor:
        """A sample of the posterior for each picked image: [N, C, h, w]."""
        mean = self.mean_VCHW[list(picked)]
        return mean + self.std_VCHW[list(picked)] * torch.randn(mean.shape, generator=generator)


def encode_photos(base: Base, photos: Sequence[Photo], spec: TrainSpec, prompt: str) -> LatentSet:
    """Encodes every variant of every photo. A photo's caption, where it has one, stands for `prompt`."""
    resolution = spec.resolution or base.resolution
    pixels: list[np.ndarray] = []
    prompts: list[str] = []
    for photo in photos:
        made = variants(
            photo.image,
            resolution,
            crop=spec.cropping,
            crops=spec.crops,
            flip=spec.flip,
            color_jitter=spec.color_jitter,
            seed=spec.seed,
        )
        pixels += made
        prompts += [photo.caption or prompt] * len(made)
    mean, std = encode_pixels(base, pixels)
    return LatentSet(mean, std, tuple(prompts))


def encode_pixels(base: Base, pixels: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Posterior mean and std of uint8 images [H, W, 3], in batches: two tensors [V, C, h, w] in fp32."""
    means, stds = [], []
    for start in range(0, len(pixels), BATCH):
        batch = torch.from_numpy(np.stack(pixels[start : start + BATCH])).permute(0, 3, 1, 2)
        mean, std = base.encode_images(batch.float() / 127.5 - 1)
        means.append(mean.float())
        stds.append(std.float())
    # as they come back from a file: another memory format would be another rounding in every step
    return torch.cat(means).contiguous(), torch.cat(stds).contiguous()


def photos_key(base: Base, photos: Sequence[Photo], spec: TrainSpec) -> str:
    """The cache key of `encode_photos`' tensors: everything they depend on."""
    settings = (spec.resolution or base.resolution, spec.cropping, spec.crops, spec.flip, spec.color_jitter, spec.seed)
    return content_key("latents", base.hash, str(base.dtype), *settings, *(photo.sha256 for photo in photos))


def content_key(kind: str, *parts: object) -> str:
    """`cache/<kind>/<sha256 of the parts>.safetensors`."""
    digest = hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()
    return f"cache/{kind}/{digest}.safetensors"


def load_latents(storage: Storage, key: str) -> tuple[Tensor, Tensor] | None:
    """Mean and std cached under `key`, or None."""
    if not storage.exists(key):
        return None
    tensors = load(storage.get(key))
    return tensors["mean"], tensors["std"]


def save_latents(storage: Storage, key: str, mean_VCHW: Tensor, std_VCHW: Tensor) -> None:
    storage.put(key, save({"mean": mean_VCHW.contiguous(), "std": std_VCHW.contiguous()}))
