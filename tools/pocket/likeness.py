"""What a strip of pictures is worth: likeness to the subject, places, and what became of the class.

Likeness is asked twice, of things that err differently: of the subject's own two hues, by counting pixels, and of the
judge, by its features. Composites of the subject in the very places that were asked for are what both aim at.
"""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image

from tools.pocket.composite import Bytes
from tools.pocket.dreambooth import ASKS, PHOTOGRAPHED, Ask
from tools.pocket.places import paint
from tools.pocket.subjects import Subject, picture
from training.evaluation.compare import standard_error
from training.evaluation.judges.features import PocketJudge
from training.evaluation.judges.pocket import load_judge
from training.evaluation.scores import diversity, likeness, mutual_likeness, share

HUE_WITHIN = 22 / 360
LEAST_SATURATION, LEAST_VALUE = 0.35, 0.2
# A place with more of a hue than this, without any subject in it, says nothing about that hue.
PLACE_HAS_HUE = 0.005
ANYWHERE = "white"
TARGETS_PER_PLACE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """Scores of one strip.

    `hues`, `class_hues`: the rarer of the subject's hues, as a share of what the subject itself has. `likeness`,
    `class_drift`: from the base alone (0) to the subject (1) by the judge's features; `errors`: how many standard
    errors over pictures lie between the base's cosine and the adapter's. The rest are shares of pictures that the judge
    reads as asked, and DreamBooth's diversity.
    """

    hues: float
    likeness: float
    cosine: float
    errors: float
    unseen_places: float
    seen_places: float
    diversity: float
    class_hues: float
    class_drift: float
    class_read: float
    placed_class_drift: float
    placed_class_read: float


@cache
def judge() -> PocketJudge:
    return PocketJudge(load_judge())


def hue_share(pixels: Bytes, colour: tuple[int, int, int]) -> float:
    """The share of a picture's pixels that have the colour's hue, vividly."""
    found = np.asarray(Image.fromarray(pixels).convert("HSV"), np.float32) / 255
    away = np.abs((found[..., 0] - colorsys.rgb_to_hsv(*(c / 255 for c in colour))[0] + 0.5) % 1 - 0.5)
    return float(((away < HUE_WITHIN) & (found[..., 1] > LEAST_SATURATION) & (found[..., 2] > LEAST_VALUE)).mean())


@cache
def can_tell(place: str, colour: tuple[int, int, int]) -> bool:
    """Whether the place itself is free of the colour."""
    scenes = [np.clip(paint(place or ANYWHERE, np.random.default_rng(i)), 0, 255).astype(np.uint8) for i in range(4)]
    return max(hue_share(scene, colour) for scene in scenes) < PLACE_HAS_HUE


@cache
def targets(subject: Subject, place: str) -> tuple[Bytes, ...]:
    """Composites of the subject in the place: what a perfect base would draw."""
    first = 100 + len(PHOTOGRAPHED)
    return tuple(np.asarray(picture(subject, place or ANYWHERE, first + i)) for i in range(TARGETS_PER_PLACE))


def has_hues(subject: Subject, pixels: Bytes, place: str) -> float:
    """The rarer of the two hues, as a share of what the subject has of it; 1 at most."""
    wanted = [
        (hue_share(pixels, colour), float(np.mean([hue_share(target, colour) for target in targets(subject, place)])))
        for colour in (subject.colouring.first, subject.colouring.second)
    ]
    return min(min(1.0, found / whole) for found, whole in wanted)


def tellable(subject: Subject, ask: Ask) -> bool:
    colouring = subject.colouring
    return can_tell(ask.place, colouring.first) and can_tell(ask.place, colouring.second)


def mean_hues(subject: Subject, strip: Sequence[Bytes], of: Callable[[Ask], bool]) -> float:
    found = [
        has_hues(subject, pixels, ask.place)
        for ask, pixels in zip(ASKS, strip, strict=True)
        if of(ask) and tellable(subject, ask)
    ]
    return float(np.mean(found))


def features(pictures: Sequence[Bytes]) -> torch.Tensor:
    return judge().embed([Image.fromarray(pixels) for pixels in pictures])


@cache
def target_features(subject: Subject, place: str) -> torch.Tensor:
    return features(targets(subject, place))


def cosines(subject: Subject, strip: Sequence[Bytes]) -> list[float]:
    """Each picture's mean cosine to the subject in the same place."""
    rows = features(strip)
    return [likeness(rows[i : i + 1], target_features(subject, ask.place)) for i, ask in enumerate(ASKS)]


def picked(found: Sequence[float], of: Callable[[Ask], bool]) -> list[float]:
    return [value for ask, value in zip(ASKS, found, strict=True) if of(ask)]


def reached(subject: Subject, found: Sequence[float], bare: Sequence[float], of: Callable[[Ask], bool]) -> float:
    """How far cosines have gone from the base's own (0) to those of the subject with itself (1)."""
    places = dict.fromkeys(ask.place for ask in ASKS if of(ask))
    ceiling = float(np.mean([mutual_likeness(target_features(subject, place)) for place in places]))
    return share(float(np.mean(picked(found, of))), float(np.mean(picked(bare, of))), ceiling)


def errors(found: Sequence[float], bare: Sequence[float]) -> float:
    """The gain over the base in standard errors, picture by picture on the same prompt and seed."""
    gains = [one - other for one, other in zip(picked(found, is_unseen), picked(bare, is_unseen), strict=True)]
    scatter = standard_error(gains)
    return float(np.mean(gains)) / scatter if scatter else 0.0


def is_unseen(ask: Ask) -> bool:
    return not ask.of_class and ask.place not in PHOTOGRAPHED


def is_seen(ask: Ask) -> bool:
    return not ask.of_class and ask.place in PHOTOGRAPHED


def is_class(ask: Ask) -> bool:
    return ask.of_class and not ask.place


def is_placed_class(ask: Ask) -> bool:
    return ask.of_class and bool(ask.place)


def spread(strip: Sequence[Bytes]) -> float:
    """Diversity over the seeds of each prompt of the subject."""
    rows = features(strip)
    places = dict.fromkeys(ask.place for ask in ASKS if is_unseen(ask))
    groups = [rows[[i for i, ask in enumerate(ASKS) if is_unseen(ask) and ask.place == place]] for place in places]
    return diversity(groups) or 0.0


def weigh(subject: Subject, strip: Sequence[Bytes], bare: Sequence[Bytes]) -> Worth:
    """`bare`: the strip of the base alone."""
    readings = load_judge().read([Image.fromarray(pixels) for pixels in strip])
    pairs = list(zip(ASKS, readings, strict=True))
    found, floor = cosines(subject, strip), cosines(subject, bare)

    def placed(of: Callable[[Ask], bool]) -> float:
        return float(np.mean([reading.place == ask.place for ask, reading in pairs if of(ask)]))

    def recognised(of: Callable[[Ask], bool]) -> float:
        return float(np.mean([reading.noun == subject.noun for ask, reading in pairs if of(ask)]))

    return Worth(
        hues=mean_hues(subject, strip, is_unseen),
        likeness=reached(subject, found, floor, is_unseen),
        cosine=float(np.mean(picked(found, is_unseen))),
        errors=errors(found, floor),
        unseen_places=placed(is_unseen),
        seen_places=placed(is_seen),
        diversity=spread(strip),
        class_hues=mean_hues(subject, strip, lambda ask: ask.of_class),
        class_drift=reached(subject, found, floor, is_class),
        class_read=recognised(is_class),
        placed_class_drift=reached(subject, found, floor, is_placed_class),
        placed_class_read=recognised(is_placed_class),
    )
