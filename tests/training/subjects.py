"""Subjects made of random latents: what a pack needs, without photos."""

from typing import Any

import torch
import yaml

from training.latents import LatentSet
from training.manifest import SubjectSpec, parse_manifest
from training.pack import Subject


def spec(id: str, **settings: Any) -> SubjectSpec:
    """A subject's settings; the learning rates are large enough to see an effect in a few steps."""
    train = {"max_steps": 4, "learning_rate": 1e-2, "text_encoder_learning_rate": 1e-3, **settings.pop("train", {})}
    entry = {"id": id, "images": "x", "class": "dog", "train": train, **settings}
    return parse_manifest(yaml.safe_dump({"version": 1, "name": "test", "subjects": [entry]})).subjects[0]


def latents(prompt: str, count: int, seed: int) -> LatentSet:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, 4, 8, 8, generator=generator)
    return LatentSet(mean, torch.full_like(mean, 0.1), (prompt,) * count)


def subject(id: str, seed: int = 0, **settings: Any) -> Subject:
    """A subject whose latents and random stream depend on `seed` alone."""
    settings["train"] = {"seed": seed, **settings.get("train", {})}
    made = spec(id, **settings)
    prior = latents(made.filled_class_prompt, 7, seed=1000)
    return Subject(made, latents(made.filled_instance_prompt, 5, seed), prior)
