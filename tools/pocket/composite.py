"""The compositor: a drawing, coloured or not, on a place; a picture and its labels from one seed.

Owns placement, recolouring and labels. A picture is a pure function of (seed, pool, index): a pool can be made again
from the recipe alone.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.pocket.drawings import CLASSES, STYLES, VENDORS, Drawing, everything, load, seen
from tools.pocket.places import PLACE_NAMES, paint
from tools.pocket.recipe import IMAGE_PX, SEED

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "orange": (250, 135, 15),
    "yellow": (250, 215, 30),
    "green": (45, 175, 55),
    "blue": (40, 95, 235),
    "purple": (135, 50, 205),
    "pink": (250, 120, 190),
}
COLOUR_NAMES = tuple(COLOURS)
NO_COLOUR = len(COLOUR_NAMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How far drawings stray: longest side and shift in pixels."""

    smallest: int
    largest: int
    shift: int


TIGHT = Placement(smallest=48, largest=48, shift=1)
USUAL = Placement(smallest=46, largest=51, shift=2)
LOOSE = Placement(smallest=36, largest=56, shift=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Indices into CLASSES, PLACE_NAMES, COLOUR_NAMES (or NO_COLOUR) and STYLES."""

    noun: int
    place: int
    colour: int
    style: int


def ramp(sprite: Floats, colour: tuple[int, int, int]) -> Floats:
    """Keeps the drawing's light and shade, replaces its hue."""
    rgb, alpha = sprite[:, :, :3], sprite[:, :, 3:]
    light = rgb @ np.asarray((0.299, 0.587, 0.114), np.float32)
    inside = light[sprite[:, :, 3] > 128]
    low, high = np.percentile(inside, (2, 98)) if inside.size else (0.0, 255.0)
    level = np.clip((light - low) / max(float(high - low), 1.0), 0, 1)[:, :, None]
    middle = np.asarray(colour, np.float32)
    dark, bright = middle * 0.25, middle * 0.45 + 255 * 0.55
    toned = np.where(
        level < 0.55, dark + (middle - dark) * level / 0.55, middle + (bright - middle) * (level - 0.55) / 0.45
    )
    return np.concatenate((toned, alpha), axis=2).astype(np.float32)


@cache
def scaled(drawing: Drawing, longest: int) -> Floats:
    image = load(drawing)
    scale = longest / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Premultiplied, or the resampling bleeds the colour of transparent pixels into the outline.
    return np.asarray(image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA"), np.float32)


def lay(sprite: Floats, scene: Floats, placement: Placement, rng: np.random.Generator) -> Bytes:
    height, width = sprite.shape[:2]
    shift_y, shift_x = rng.integers(-placement.shift, placement.shift + 1, 2)
    top = int(np.clip((IMAGE_PX - height) // 2 + 1 + shift_y, 0, IMAGE_PX - height))
    left = int(np.clip((IMAGE_PX - width) // 2 + shift_x, 0, IMAGE_PX - width))
    window = scene[top : top + height, left : left + width]
    alpha = sprite[:, :, 3:] / 255
    window[:] = sprite[:, :, :3] * alpha + window * (1 - alpha)
    return np.clip(np.rint(scene), 0, 255).astype(np.uint8)


def sprite_of(drawing: Drawing, placement: Placement, rng: np.random.Generator) -> Floats:
    sprite = scaled(drawing, int(rng.integers(placement.smallest, placement.largest + 1)))
    return sprite[:, ::-1] if rng.random() < 0.5 else sprite


def classes_picture(index: int, placement: Placement, seed: int = SEED) -> tuple[Bytes, Labels]:
    """Picture number `index` of the base's own world: its classes, colours and places."""
    rng = np.random.default_rng((seed, 1, index))
    noun, place = int(rng.integers(len(CLASSES))), int(rng.integers(len(PLACE_NAMES)))
    colour = int(rng.integers(len(COLOUR_NAMES))) if rng.random() < 0.35 else NO_COLOUR
    drawings = seen(CLASSES[noun])
    drawing = drawings[int(rng.integers(len(drawings)))]
    sprite = sprite_of(drawing, placement, rng)
    if colour != NO_COLOUR:
        sprite = ramp(sprite, COLOURS[COLOUR_NAMES[colour]])
    picture = lay(sprite, paint(PLACE_NAMES[place], rng), placement, rng)
    return picture, Labels(noun=noun, place=place, colour=colour, style=STYLES.index(VENDORS[drawing.vendor].style))


def two_tints(sprite: Floats, rng: np.random.Generator) -> Floats:
    """Any two tints, above and below: colourings that no class has."""
    cut = int(rng.uniform(0.2, 1.0) * sprite.shape[0])
    tints = [tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(2)]
    upper, lower = (ramp(sprite, (t[0], t[1], t[2])) for t in tints)
    return np.concatenate((upper[:cut], lower[cut:]))


def wide_picture(index: int, seed: int = SEED) -> Bytes:
    """Picture number `index` of a wider world, for the VAE: any emoji, tint and place, half of them our classes."""
    rng = np.random.default_rng((seed, 2, index))
    drawings = seen(CLASSES[int(rng.integers(len(CLASSES)))]) if rng.random() < 0.5 else everything()
    sprite = sprite_of(drawings[int(rng.integers(len(drawings)))], LOOSE, rng)
    if rng.random() < 0.4:
        sprite = two_tints(sprite, rng)
    return lay(sprite, paint(PLACE_NAMES[int(rng.integers(len(PLACE_NAMES)))], rng), LOOSE, rng)


def judge_picture(index: int, placement: Placement, seed: int = SEED) -> tuple[Bytes, Labels]:
    """As `classes_picture`, but two fifths in two tints: a judge must know a class in colours that it never had."""
    rng = np.random.default_rng((seed, 6, index))
    picture, labels = classes_picture(int(rng.integers(2**40, 2**41)), placement, seed)
    if rng.random() > 0.4:
        return picture, labels
    drawings = seen(CLASSES[labels.noun])
    sprite = two_tints(sprite_of(drawings[int(rng.integers(len(drawings)))], placement, rng), rng)
    return lay(sprite, paint(PLACE_NAMES[labels.place], rng), placement, rng), replace(labels, colour=NO_COLOUR)
