"""Scores: what the judge reads in the base's own pictures, and the VAE's fidelity.

Owns the questions (each class in places and colours) and the file of the curve.
"""

import csv
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from tools.pocket import caption, snapshot, train, vae
from tools.pocket.composite import COLOUR_NAMES
from tools.pocket.drawings import CLASSES
from tools.pocket.places import PLACE_NAMES
from tools.pocket.recipe import IMAGE_PX, UNET, WORK
from tools.pocket.sampler import generate, pipeline
from training.evaluation.judges.pocket import load_judge

log = logging.getLogger(__name__)

SCORES = WORK / "scores.csv"
GUIDANCES = (2.0, 3.0, 5.0)
PER_CLASS = 16


@dataclass(frozen=True, slots=True)
class Question:
    noun: str
    place: str
    colour: str | None

    @property
    def prompt(self) -> str:
        return caption.prompt(self.noun, self.place, self.colour)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Shares of pictures read as asked; colour only where one was asked for."""

    guidance: float
    noun: float
    place: float
    colour: float
    per_noun: dict[str, float]


def questions(per_class: int = PER_CLASS) -> list[Question]:
    """Each class in turn through all places; every second picture asks for a colour."""
    return [
        Question(
            noun,
            PLACE_NAMES[(i + at) % len(PLACE_NAMES)],
            COLOUR_NAMES[(i // 2 + at) % len(COLOUR_NAMES)] if i % 2 else None,
        )
        for at, noun in enumerate(CLASSES)
        for i in range(per_class)
    ]


def ask(pipe: StableDiffusionPipeline, guidance: float, per_class: int = PER_CLASS, steps: int = 20) -> Score:
    asked = questions(per_class)
    with torch.autocast("cpu", torch.bfloat16):
        made = generate(pipe, [q.prompt for q in asked], guidance=guidance, steps=steps)
    readings = load_judge().read([Image.fromarray(picture) for picture in made])
    per_noun: dict[str, list[bool]] = defaultdict(list)
    for question, reading in zip(asked, readings, strict=True):
        per_noun[question.noun].append(reading.noun == question.noun)
    pairs = list(zip(asked, readings, strict=True))
    return Score(
        guidance=guidance,
        noun=float(np.mean([r.noun == q.noun for q, r in pairs])),
        place=float(np.mean([r.place == q.place for q, r in pairs])),
        colour=float(np.mean([r.colour == q.colour for q, r in pairs if q.colour])),
        per_noun={noun: float(np.mean(right)) for noun, right in per_noun.items()},
    )


def note(images: int, weights: str, score: Score, psnr: float) -> None:
    fresh = not SCORES.exists()
    with SCORES.open("a", newline="") as file:
        rows = csv.writer(file)
        if fresh:
            rows.writerow(("images", "weights", "guidance", "class", "place", "colour", "vae_psnr", "per_class"))
        shares = (f"{share:.4f}" for share in (score.noun, score.place, score.colour))
        rows.writerow((images, weights, score.guidance, *shares, f"{psnr:.2f}", json.dumps(score.per_noun)))
    log.info(
        f"{images} images ({weights}), guidance {score.guidance}: class {score.noun:.3f} place {score.place:.3f} "
        f"colour {score.colour:.3f}; {' '.join(f'{n} {s:.2f}' for n, s in score.per_noun.items())}"
    )


def average_of(path: Path) -> tuple[StableDiffusionPipeline, int]:
    """A pipeline of the averaged weights in a snapshot, and the images behind them."""
    state = snapshot.load(path)
    if state is None:
        raise FileNotFoundError(f"No snapshot {path}. Run `python -m tools.pocket unet` first.")
    pocket = train.models_of(state["ema"])
    frozen = AutoencoderKL.from_pretrained(vae.FOLDER).eval()
    return pipeline(pocket.unet, pocket.text, frozen), int(state["step"]) * UNET.batch_size


def make() -> None:
    """Scores the run's last snapshot."""
    pipe, images = average_of(train.SNAPSHOT)
    psnr = vae.psnr(pipe.vae, vae.unseen_composites())
    for guidance in GUIDANCES:
        note(images, "average", ask(pipe, guidance), psnr)


def glance(path: Path) -> tuple[float, float]:
    """Class and place read right in one of the grids that training leaves behind."""
    grid, side = Image.open(path), IMAGE_PX
    tiles = [
        grid.crop((x, y, x + side, y + side)) for y in range(0, grid.height, side) for x in range(0, grid.width, side)
    ]
    readings = load_judge().read(tiles)
    pairs = list(zip(train.shown(), readings, strict=True))
    return float(np.mean([r.noun == n for (n, _), r in pairs])), float(np.mean([r.place == p for (_, p), r in pairs]))


def exported(folder: Path, per_class: int = PER_CLASS, guidances: Sequence[float] = GUIDANCES) -> dict[str, object]:
    """Scores an exported folder as any user would load it."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    found = [ask(pipe, guidance, per_class) for guidance in guidances]
    best = max(found, key=lambda score: score.noun + score.place + score.colour)
    return {
        "class": best.noun,
        "place": best.place,
        "colour": best.colour,
        "guidance": best.guidance,
        "per_class": best.per_noun,
        "by_guidance": {str(s.guidance): {"class": s.noun, "place": s.place, "colour": s.colour} for s in found},
        "pictures_per_class": per_class,
        "vae_psnr_unseen_composites_db": round(vae.psnr(pipe.vae, vae.unseen_composites()), 2),
        "vae_psnr_unseen_drawings_db": round(vae.psnr(pipe.vae, vae.unseen_drawings()), 2),
    }
