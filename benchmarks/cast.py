"""The demo's subjects side by side in one picture, and what each region of such a picture is worth."""

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from serving.engine.request import AdapterRef
from training.adapters.adapter import Adapter, load_adapter
from training.evaluation.judges.features import PocketJudge
from training.evaluation.judges.pocket import load_judge
from training.evaluation.scores import likeness, mutual_likeness, share
from training.storage.registry import Registry
from training.storage.storage import open_storage

PHOTOS = Path(__file__).resolve().parents[1] / "manifests" / "demo" / "images"
HUE_WITHIN, LEAST_SATURATION, LEAST_VALUE = 22 / 360, 0.35, 0.2
Picture = Image.Image


@dataclass(frozen=True, eq=False)
class Subject:
    """One subject of the demo: its photos, its two hues and its adapter."""

    id: str
    noun: str
    hues: tuple[tuple[int, ...], tuple[int, ...]]
    adapter: Adapter

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(tenant="default", id=self.id, version="1")

    @property
    def words(self) -> str:
        return f"sks {self.noun}"

    @cached_property
    def photos(self) -> list[Picture]:
        return [Image.open(file).convert("RGB") for file in sorted((PHOTOS / self.id).glob("*.png"))]

    @cached_property
    def features(self) -> torch.Tensor:
        return JUDGE.embed(self.photos)

    def has(self, picture: Picture, hue: tuple[int, ...]) -> float:
        """How much of a hue a picture has, as a share of what the photos have; 1 at most."""
        usual = float(np.mean([hue_share(photo, hue) for photo in self.photos]))
        return min(1.0, hue_share(picture, hue) / usual)


JUDGE = PocketJudge(load_judge())
NET = load_judge()


def hue_share(picture: Picture, colour: tuple[int, ...]) -> float:
    """The share of a picture's pixels that have a colour's hue, vividly."""
    found = np.asarray(picture.convert("HSV"), np.float32) / 255
    away = np.abs((found[..., 0] - colorsys.rgb_to_hsv(*(c / 255 for c in colour))[0] + 0.5) % 1 - 0.5)
    return float(((away < HUE_WITHIN) & (found[..., 1] > LEAST_SATURATION) & (found[..., 2] > LEAST_VALUE)).mean())


def read_subjects(storage: str) -> list[Subject]:
    """Those of the demo's subjects that a storage has adapters of."""
    registry = Registry(open_storage(storage))
    found = []
    for one in json.loads((PHOTOS / "subjects.json").read_text()):
        resolved = registry.look(one["id"])
        if resolved is not None:
            hues = tuple(one["first"]), tuple(one["second"])
            found.append(Subject(one["id"], one["class"], hues, load_adapter(registry.weights(resolved))))
    return found


@dataclass(frozen=True)
class Scene:
    """Subjects from left to right in a place."""

    cast: tuple[Subject, ...]
    place: str
    seed: int

    @property
    def prompt(self) -> str:
        first, *others = (f"a {one.words}" for one in self.cast)
        return f"a photo of {first}{''.join(f' and {one}' for one in others)} {self.place}"

    def box(self, index: int) -> tuple[float, float, float, float]:
        return index / len(self.cast), 0.0, (index + 1) / len(self.cast), 1.0


def crop(scene: Scene, picture: Picture, index: int) -> Picture:
    """The region of one subject; of a narrow one the square around where things stand."""
    width, height = picture.size[0] // len(scene.cast), picture.size[1]
    top = max(0, min(height - width, round(0.52 * height - width / 2)))
    return picture.crop((index * width, top, (index + 1) * width, min(height, top + width)))


def weigh(scenes: Sequence[Scene], pictures: Sequence[Picture], bare: Sequence[Picture]) -> tuple[float, ...]:
    """Means over regions: likeness, bleeding, own hues, others' hues, class."""
    rows = []
    for scene, picture, plain in zip(scenes, pictures, bare, strict=True):
        for index, one in enumerate(scene.cast):
            own, base = crop(scene, picture, index), crop(scene, plain, index)
            made, floor = JUDGE.embed([own]), JUDGE.embed([base])

            def reached(other: Subject, made: torch.Tensor = made, floor: torch.Tensor = floor) -> float:
                ceiling = mutual_likeness(other.features)
                return share(likeness(made, other.features), likeness(floor, other.features), ceiling)

            others = [other for other in scene.cast if other is not one]
            foreign = [(other, hue) for other in others for hue in other.hues if hue not in one.hues]
            rows.append((
                reached(one),
                max(map(reached, others)),
                min(one.has(own, hue) for hue in one.hues),
                max((other.has(own, hue) for other, hue in foreign), default=0.0),
                float(NET.read([own])[0].noun == one.noun),
            ))  # fmt: skip
    return tuple(float(value) for value in np.mean(rows, axis=0))
