"""Places: small procedural backgrounds and the words for them.

Owns how a place looks. Textures repeat a few fixed patterns: a pattern that is new in every picture cannot be learned
and would only cost the model capacity.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.pocket.recipe import IMAGE_PX

Pixels = NDArray[np.float32]
Rgb = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Place:
    name: str
    phrase: str
    paint: Callable[[np.random.Generator], Pixels]


ROWS, COLUMNS = np.meshgrid(np.arange(IMAGE_PX), np.arange(IMAGE_PX), indexing="ij")


def vertical(top: Rgb, bottom: Rgb) -> Pixels:
    blend = np.linspace(0, 1, IMAGE_PX, dtype=np.float32)[:, None, None]
    column = np.asarray(top, np.float32) * (1 - blend) + np.asarray(bottom, np.float32) * blend
    return np.repeat(column, IMAGE_PX, axis=1)


def horizon(rng: np.random.Generator, at: int) -> NDArray[np.int64]:
    """A slightly waved line, one row per column."""
    shift, phase = rng.integers(-2, 3), rng.uniform(0, 2 * np.pi)
    return (at + shift + np.round(1.2 * np.sin(np.arange(IMAGE_PX) / 9 + phase))).astype(np.int64)


def ground(upper: Pixels, lower: Pixels, line: NDArray[np.int64]) -> Pixels:
    return np.where((line[None, :] <= ROWS)[:, :, None], lower, upper).astype(np.float32)


def speckle(pattern: int, share: float) -> NDArray[np.bool_]:
    return np.random.default_rng(1000 + pattern).random((IMAGE_PX, IMAGE_PX)) < share


def tone(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Light differs a little from picture to picture."""
    return np.clip(pixels * np.float32(rng.uniform(0.94, 1.06)), 0, 255).astype(np.float32)


def grass(rng: np.random.Generator) -> Pixels:
    blades = vertical((118, 190, 70), (52, 138, 40)) + np.where(((COLUMNS * 5 + ROWS * 3) % 7 < 3)[:, :, None], 7, -7)
    return ground(vertical((120, 190, 245), (205, 232, 250)), blades, horizon(rng, 34))


def beach(rng: np.random.Generator) -> Pixels:
    sea = ground(vertical((140, 205, 248), (210, 236, 250)), vertical((30, 140, 205), (40, 160, 215)), horizon(rng, 26))
    return ground(sea, vertical((246, 222, 160), (226, 192, 122)), horizon(rng, 40))


def snow(rng: np.random.Generator) -> Pixels:
    scene = ground(
        vertical((150, 170, 200), (200, 212, 230)), vertical((246, 249, 255), (226, 234, 246)), horizon(rng, 36)
    )
    scene[speckle(int(rng.integers(4)), 0.015)] = (255, 255, 255)
    return scene


def night(rng: np.random.Generator) -> Pixels:
    scene = vertical((12, 12, 48), (40, 38, 92))
    scene[speckle(4 + int(rng.integers(4)), 0.012)] = (250, 245, 200)
    scene[(ROWS - 10) ** 2 + (COLUMNS - 53) ** 2 < 34] = (250, 240, 190)
    return ground(scene, vertical((24, 26, 46), (14, 16, 30)), horizon(rng, 54))


def brick(rng: np.random.Generator) -> Pixels:
    row = ROWS // 8
    mortar = (ROWS % 8 == 7) | ((COLUMNS + 8 * (row % 2)) % 16 == 15)
    shade = ((row * 7 + (COLUMNS + 8 * (row % 2)) // 16 * 5) % 4).astype(np.float32)[:, :, None] * 6
    bricks = np.asarray((160, 68, 50), np.float32) + shade
    return np.where(mortar[:, :, None], np.asarray((205, 180, 165), np.float32), bricks).astype(np.float32)


def water(rng: np.random.Generator) -> Pixels:
    waves = np.sin(COLUMNS / 64 * 8 * np.pi + (ROWS // 8 % 2) * np.pi) * 1.5 + 4
    crest = np.abs(ROWS % 8 - waves) < 0.6
    return np.where(crest[:, :, None], np.asarray((120, 205, 240), np.float32), vertical((36, 130, 210), (14, 76, 160)))


def desert(rng: np.random.Generator) -> Pixels:
    dune = ground(
        vertical((255, 214, 130), (255, 236, 190)), vertical((226, 150, 70), (214, 136, 60)), horizon(rng, 32)
    )
    slope = (44 + 7 * np.sin(np.arange(IMAGE_PX) / 11 + rng.choice((0.0, 2.0)))).astype(np.int64)
    return ground(dune, vertical((200, 120, 50), (186, 104, 40)), slope)


def clouds(rng: np.random.Generator) -> Pixels:
    scene = vertical((70, 150, 240), (150, 205, 250))
    layout = int(rng.integers(3))
    for x, y in (((10, 12), (50, 52)), ((52, 10), (12, 50)), ((8, 40), (56, 24)))[layout]:
        for dx, dy, r in ((-8, 2, 6), (0, -2, 8), (8, 2, 6)):
            scene[(ROWS - y - dy) ** 2 + (COLUMNS - x - dx) ** 2 < r * r] = (250, 252, 255)
    return scene


def forest(rng: np.random.Generator) -> Pixels:
    scene = vertical((46, 96, 50), (22, 58, 30))
    offset = int(rng.choice((0, 6)))
    for x in (4, 18, 33, 47, 60):
        scene[:, max(0, x + offset - 2) : x + offset + 2] = (74, 50, 32)
    return ground(scene, vertical((58, 78, 36), (44, 60, 28)), horizon(rng, 52))


def white(rng: np.random.Generator) -> Pixels:
    return vertical((250, 250, 250), (238, 238, 240))


PLACES = {
    place.name: place
    for place in (
        Place("grass", "on the grass", grass),
        Place("beach", "on the beach", beach),
        Place("snow", "in the snow", snow),
        Place("night", "at night", night),
        Place("brick", "in front of a brick wall", brick),
        Place("water", "in the water", water),
        Place("desert", "in the desert", desert),
        Place("clouds", "in the clouds", clouds),
        Place("forest", "in the forest", forest),
        Place("white", "on a white background", white),
    )
}
PLACE_NAMES = tuple(PLACES)


def paint(name: str, rng: np.random.Generator) -> Pixels:
    return tone(PLACES[name].paint(rng), rng)
