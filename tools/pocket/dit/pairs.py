"""Two things side by side: their pictures, captions and latents.

A pair is captioned from left to right ("a dog and a cat on the beach"), so that the order can be learned.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from tools.pocket import vae
from tools.pocket.caption import LEADS, article_for, thing, where
from tools.pocket.composite import COLOUR_NAMES, COLOURS, NO_COLOUR, Bytes, Floats, Labels, ramp, scaled
from tools.pocket.drawings import CLASSES, STYLES, VENDORS, seen
from tools.pocket.places import PLACE_NAMES, PLACES, paint
from tools.pocket.recipe import DIT_WORK, IMAGE_PX, PAIR_POOL, SEED
from tools.pocket.team import Seat, run

log = logging.getLogger(__name__)

SMALLEST_PX, LARGEST_PX, SHIFT_PX = 27, 30, 1


@dataclass(frozen=True, slots=True)
class Pair:
    """The thing on the left and the one on the right; both are in one place."""

    left: Labels
    right: Labels


def picture(index: int, seed: int = SEED) -> tuple[Bytes, Pair]:
    """Picture number `index` of the pairs; no class stands beside itself."""
    rng = np.random.default_rng((seed, 7, index))
    place = int(rng.integers(len(PLACE_NAMES)))
    nouns = rng.choice(len(CLASSES), 2, replace=False)
    scene, labels = paint(PLACE_NAMES[place], rng), []
    for side, noun in enumerate(nouns):
        sprite, label = _one(int(noun), place, rng)
        _lay(sprite, scene, side, rng)
        labels.append(label)
    return np.clip(np.rint(scene), 0, 255).astype(np.uint8), Pair(*labels)


def _one(noun: int, place: int, rng: np.random.Generator) -> tuple[Floats, Labels]:
    colour = int(rng.integers(len(COLOUR_NAMES))) if rng.random() < 0.35 else NO_COLOUR
    drawings = seen(CLASSES[noun])
    drawing = drawings[int(rng.integers(len(drawings)))]
    sprite = scaled(drawing, int(rng.integers(SMALLEST_PX, LARGEST_PX + 1)))
    if rng.random() < 0.5:
        sprite = sprite[:, ::-1]
    if colour != NO_COLOUR:
        sprite = ramp(sprite, COLOURS[COLOUR_NAMES[colour]])
    style = STYLES.index(VENDORS[drawing.vendor].style)
    return sprite, Labels(noun=noun, place=place, colour=colour, style=style)


def _lay(sprite: Floats, scene: Floats, side: int, rng: np.random.Generator) -> None:
    """In the middle of its half, on a common line a little below the middle."""
    height, width = sprite.shape[:2]
    shift_y, shift_x = rng.integers(-SHIFT_PX, SHIFT_PX + 1, 2)
    top = IMAGE_PX // 2 + 17 - height + int(shift_y)
    left = int(np.clip(IMAGE_PX // 4 + side * IMAGE_PX // 2 - width // 2 + shift_x, 0, IMAGE_PX - width))
    window = scene[top : top + height, left : left + width]
    alpha = sprite[:, :, 3:] / 255
    window[:] = sprite[:, :, :3] * alpha + window * (1 - alpha)


def caption(pair: Pair, rng: np.random.Generator) -> str:
    """From left to right; the look is named only where both have the same."""
    roll, alike = rng.random(), pair.left.style == pair.right.style
    lead = STYLES[pair.left.style] if roll < 0.4 and alike else str(rng.choice(LEADS, p=(0.7, 0.15, 0.15)))
    opening = "" if roll > 0.9 else f"{article_for(lead)} {lead} of "
    return f"{opening}{thing(pair.left, rng)} and {thing(pair.right, rng)} {where(pair.left, rng)}".strip()


def prompt(left: str, right: str, place: str) -> str:
    """The plain prompt that grids use."""
    named = f"{article_for(left)} {left} and {article_for(right)} {right}"
    return f"a photo of {named} {PLACES[place].phrase}"


def path(chunk: int) -> Path:
    return DIT_WORK / "pairs" / f"{chunk:03}.npz"


def unpack(row: NDArray[np.uint8]) -> Pair:
    """The pair of a row of labels: noun, colour and style of each, and the place."""
    noun, colour, style, noun2, colour2, style2, place = (int(value) for value in row)
    return Pair(
        Labels(noun=noun, place=place, colour=colour, style=style),
        Labels(noun=noun2, place=place, colour=colour2, style=style2),
    )


def _row(pair: Pair) -> tuple[int, ...]:
    sides = (pair.left, pair.right)
    return (*(n for side in sides for n in (side.noun, side.colour, side.style)), pair.left.place)


def _drawn(index: int) -> tuple[Bytes, tuple[int, ...]]:
    pixels, pair = picture(index)
    return pixels, _row(pair)


def missing() -> list[int]:
    return [chunk for chunk in range(PAIR_POOL.chunks) if not path(chunk).exists()]


@torch.no_grad()
def encode(seat: Seat) -> None:
    """Draws and encodes the chunks that are missing, each by one seat."""
    frozen = AutoencoderKL.from_pretrained(vae.FOLDER).eval().to(seat.device)
    size = PAIR_POOL.chunk_size
    for chunk in missing():
        if chunk % seat.size != seat.rank:
            continue
        drawn = [_drawn(index) for index in range(chunk * size, (chunk + 1) * size)]
        pixels = np.stack([one for one, _ in drawn])
        parts = [
            frozen.encode(vae.to_tensor(part).to(seat.device)).latent_dist.mean.cpu()
            for part in np.array_split(pixels, size // 64)
        ]
        staged = path(chunk).with_suffix(".part.npz")
        np.savez(
            staged, latents=torch.cat(parts).half().numpy(), labels=np.asarray([row for _, row in drawn], np.uint8)
        )
        staged.replace(path(chunk))
        log.info(f"pairs {chunk + 1}/{PAIR_POOL.chunks}")


def make() -> None:
    """The pairs' latents, once."""
    path(0).parent.mkdir(parents=True, exist_ok=True)
    if missing():
        run(encode)
