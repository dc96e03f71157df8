"""Subjects made of random latents: what a pack needs, without photos."""

from collections.abc import Sequence
from typing import Any

import torch
import yaml

from training.base.facts import Facts
from training.base.families.clip import CLIP_ATTENTION
from training.base.families.unet import ATTENTION
from training.base.family import RowFacts
from training.manifest.manifest import parse_manifest
from training.manifest.subject import SubjectSpec
from training.trainer.latents import LatentSet, Posterior, posteriors
from training.trainer.member import Subject


def spec(id: str, **settings: Any) -> SubjectSpec:
    """A subject's settings; the learning rates are large enough to see an effect in a few steps."""
    train = {"max_steps": 4, "learning_rate": 1e-2, "text_encoder_learning_rate": 1e-3, **settings.pop("train", {})}
    lora = {"targets": list(ATTENTION), "text_encoder_targets": list(CLIP_ATTENTION), **settings.pop("lora", {})}
    entry = {"id": id, "images": "x", "class": "dog", "train": train, "lora": lora, **settings}
    return parse_manifest(yaml.safe_dump({"version": 1, "name": "test", "subjects": [entry]})).subjects[0]


def latents(
    prompt: str, count: int, seed: int, sizes: Sequence[tuple[int, int]] = ((8, 8),), channels: int = 4
) -> LatentSet:
    """Of `count` images, whose sizes take turns; each was cropped from another place of another photo."""
    generator = torch.Generator().manual_seed(seed)
    images: list[Posterior] = []
    for index in range(count):
        mean = torch.randn(1, channels, *sizes[index % len(sizes)], generator=generator)
        (image,) = posteriors(mean, torch.full_like(mean, 0.1))
        images.append(image._replace(row=RowFacts((20 + index, 30), (index, 2))))
    return LatentSet(tuple(images), (prompt,) * count)


def subject(id: str, seed: int = 0, facts: Facts | None = None, **settings: Any) -> Subject:
    """A subject whose latents and random stream depend on `seed` alone.

    `facts` are of the base that it is for; of a Stable Diffusion by default.
    """
    channels = 4
    if facts is not None:
        channels = facts.channels
        own = {"targets": list(facts.targets), "text_encoder_targets": list(facts.text_targets)}
        settings["lora"] = {**own, "text_encoder": bool(facts.text_encoders), **settings.get("lora", {})}
    settings["train"] = {"seed": seed, **settings.get("train", {})}
    made = spec(id, **settings)
    prior = latents(made.filled_class_prompt, 7, seed=1000, channels=channels)
    sizes = ((8, 8), (8, 12), (12, 6)) if made.train.cropping == "bucket" else ((8, 8),)
    return Subject(made, latents(made.filled_instance_prompt, 5, seed, sizes, channels), prior)
