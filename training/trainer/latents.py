"""Latents made once, before the loop: a subject's photos (every crop, mirror and colour variant) and class images.

A `LatentSet` keeps the posterior, not a sample of it, so each step still draws its own latents. Sets are cached on the
storage under the hash of everything they depend on.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from training.base.base import DRAWN, Base
from training.base.family import RowFacts
from training.manifest.subject import TrainSpec
from training.photos.photos import Photo
from training.photos.variants import Framed, Pixels, framed, on_backgrounds
from training.storage.interface import Storage

BATCH = 8
SIZES = "sizes"  # in a cached file, int64 [V, 4]: a photo's height and width, its crop's top and left


class Posterior(NamedTuple):
    """What the VAE says of one image: mean and std [C, h, w], in fp32 on the CPU; `row`: what it was cropped from.

    `subject_HW`: the share of each latent cell that shows the subject, fp32 [h, w], if that is known.
    """

    mean_CHW: Tensor
    std_CHW: Tensor
    row: RowFacts = DRAWN
    subject_HW: Tensor | None = None


def posteriors(mean_VCHW: Tensor, std_VCHW: Tensor) -> tuple[Posterior, ...]:
    """Splits V images of one size into one posterior each."""
    return tuple(map(Posterior, mean_VCHW.unbind(), std_VCHW.unbind()))


@dataclass(frozen=True)
class LatentSet:
    """Images as latents, each with its prompt. They may differ in size (aspect buckets)."""

    images: tuple[Posterior, ...]
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def draw(self, picked: Sequence[int], generator: torch.Generator) -> list[Tensor]:
        """A sample of the posterior for each picked image, [C, h, w]."""
        return [
            image.mean_CHW + image.std_CHW * torch.randn(image.mean_CHW.shape, generator=generator)
            for image in (self.images[index] for index in picked)
        ]


def same_sizes(latents: Sequence[Tensor]) -> list[list[int]]:
    """The places of latents of one size, for every size: what can go through one forward together."""
    places: dict[torch.Size, list[int]] = {}
    for place, latent_CHW in enumerate(latents):
        places.setdefault(latent_CHW.shape, []).append(place)
    return list(places.values())


def photo_latents(
    base: Base,
    storage: Storage,
    photos: Sequence[Photo],
    spec: TrainSpec,
    prompt: str,
    encoding: Callable[[], None] = lambda: None,
) -> LatentSet:
    """The latents of every variant of every photo, from the cache on the storage if they are there.

    `prompt` is that of photos without a caption. `encoding` is called before they are encoded, which may take minutes.
    """
    key = photos_key(base, photos, spec)
    cached = load_latents(storage, key)
    if cached is not None:
        return LatentSet(cached, photo_prompts(photos, spec, prompt, len(cached)))
    encoding()
    made = encode_photos(base, photos, spec, prompt)
    save_latents(storage, key, made.images)
    return made


def encode_photos(base: Base, photos: Sequence[Photo], spec: TrainSpec, prompt: str) -> LatentSet:
    """Encodes every variant of every photo; the variants of one photo stand together."""
    resolution = spec.resolution or base.facts.resolution
    pixels: list[Pixels] = []
    rows: list[RowFacts] = []
    masks: list[Pixels | None] = []
    for photo in photos:
        width, height = photo.source_size
        for one in _photo_variants(photo, spec, resolution):
            pixels.append(one.pixels_HW3)
            rows.append(RowFacts((height, width), one.crop_px))
            masks.append(one.mask_HW)
    encoded = zip(encode_pixels(base, pixels), rows, masks, strict=True)
    images = [image._replace(row=row, subject_HW=_cells(mask, image.mean_CHW)) for image, row, mask in encoded]
    return LatentSet(tuple(images), photo_prompts(photos, spec, prompt, len(pixels)))


def _photo_variants(photo: Photo, spec: TrainSpec, resolution: int) -> list[Framed]:
    """The variants of one photo. Their number depends on the settings alone, so every photo has the same weight."""
    images = [photo.image] * (1 + spec.backgrounds)
    if photo.mask is not None:
        images[1:] = on_backgrounds(photo.image, photo.mask, spec.backgrounds, spec.seed)
    mask = photo.subject_mask if spec.background_weight is not None else None
    return [
        variant
        for image in images
        for side in (resolution, *spec.resolutions)
        for variant in framed(
            image,
            side,
            crop=spec.cropping,
            crops=spec.crops,
            flip=spec.flip,
            color_jitter=spec.color_jitter,
            seed=spec.seed,
            mask=mask,
        )
    ]


def _cells(mask_HW: Pixels | None, latent_CHW: Tensor) -> Tensor | None:
    """The mean of a mask (255 is all) over the pixels of each latent cell."""
    if mask_HW is None:
        return None
    pixels = torch.from_numpy(mask_HW.astype(np.float32)) / 255
    return functional.adaptive_avg_pool2d(pixels[None, None], (latent_CHW.shape[1], latent_CHW.shape[2]))[0, 0]


def photo_prompts(photos: Sequence[Photo], spec: TrainSpec, prompt: str, count: int) -> tuple[str, ...]:
    """The prompts of `count` variants of the photos: a photo's caption, where it has one, stands for `prompt`.

    Not where its background was replaced: a caption tells of the place.
    """
    each = count // (len(photos) * (1 + spec.backgrounds))
    prompts: list[str] = []
    for photo in photos:
        own = photo.caption or prompt
        replaced = own if photo.mask is None else prompt
        prompts += [own] * each + [replaced] * each * spec.backgrounds
    return tuple(prompts)


def encode_pixels(base: Base, pixels: Sequence[Pixels]) -> tuple[Posterior, ...]:
    """The posterior of uint8 images [H, W, 3]; neighbours of one size are encoded in batches."""
    made: list[Posterior] = []
    for _, alike in itertools.groupby(pixels, key=lambda image_HW3: image_HW3.shape):
        images = list(alike)
        for start in range(0, len(images), BATCH):
            batch = torch.from_numpy(np.stack(images[start : start + BATCH])).permute(0, 3, 1, 2)
            mean, std = base.to_latents(batch.float() / 127.5 - 1)
            # in the memory format of tensors read from a file: another format rounds differently in every step
            made += posteriors(mean.float().contiguous(), std.float().contiguous())
    return tuple(made)


def photos_key(base: Base, photos: Sequence[Photo], spec: TrainSpec) -> str:
    """The cache key of `encode_photos`' tensors: everything they depend on."""
    resolution = spec.resolution or base.facts.resolution
    settings = (resolution, spec.cropping, spec.crops, spec.flip, spec.color_jitter, spec.backgrounds, spec.seed)
    more: list[object] = [f"also {side}" for side in spec.resolutions]
    if spec.background_weight is not None:
        masks = [(photo.subject_mask or Image.new("L", (0, 0))).tobytes() for photo in photos]
        more += [f"mask {hashlib.sha256(mask).hexdigest()}" for mask in masks]
    return content_key("latents", base.hash, str(base.dtype), *settings, *(photo.sha256 for photo in photos), *more)


def content_key(kind: str, *parts: object) -> str:
    """`cache/<kind>/<sha256 of the parts>.safetensors`."""
    digest = hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()
    return f"cache/{kind}/{digest}.safetensors"


def load_latents(storage: Storage, key: str) -> tuple[Posterior, ...] | None:
    """The images cached under `key`; None if there are none."""
    if not storage.exists(key):
        return None
    tensors = load(storage.get(key))
    sizes = tensors.pop(SIZES, None)
    count = sum(name.endswith(".mean") for name in tensors)
    rows = [DRAWN] * count if sizes is None else [RowFacts((h, w), (y, x)) for h, w, y, x in sizes.tolist()]
    return tuple(
        Posterior(tensors[f"{i}.mean"], tensors[f"{i}.std"], rows[i], tensors.get(f"{i}.subject")) for i in range(count)
    )


def save_latents(storage: Storage, key: str, images: Sequence[Posterior]) -> None:
    """Caches images under `key`, in fp32: all of photos, or all drawn. `load_latents` returns them to the bit."""
    means = {f"{index}.mean": image.mean_CHW for index, image in enumerate(images)}
    stds = {f"{index}.std": image.std_CHW for index, image in enumerate(images)}
    sizes = [
        (*image.row.original_px, *image.row.crop_px) for image in images if image.row.original_px and image.row.crop_px
    ]
    if sizes:
        means[SIZES] = torch.tensor(sizes)
    means |= {f"{i}.subject": image.subject_HW for i, image in enumerate(images) if image.subject_HW is not None}
    # cloned: safetensors refuses views of one memory
    storage.put(key, save({name: value.clone() for name, value in (means | stds).items()}))
