"""The figures of docs/pocket.md: what the base draws, what its VAE keeps, and the scores against images trained."""

import csv
import shutil

import matplotlib
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from matplotlib import pyplot
from PIL import Image, ImageDraw

from tools.pocket import caption, score, train, vae
from tools.pocket.composite import COLOUR_NAMES, Bytes
from tools.pocket.drawings import CLASSES
from tools.pocket.places import PLACE_NAMES
from tools.pocket.pool import UNSEEN, narrow
from tools.pocket.recipe import BASE, DOCS, IMAGE_PX
from tools.pocket.sampler import generate
from tools.pocket.subjects import SUBJECTS, picture

MARGIN_PX = 16


def sheet(rows: list[tuple[str, list[Bytes]]], columns: list[str], scale: int = 1) -> Image.Image:
    """Pictures in rows with a word before each row and above each column."""
    left, side = 70, IMAGE_PX * scale
    made = Image.new("RGB", (left + side * len(rows[0][1]), MARGIN_PX + side * len(rows)), "white")
    pen = ImageDraw.Draw(made)
    for x, word in enumerate(columns):
        pen.text((left + x * side + 3, 2), word, fill="black")
    for y, (word, pictures) in enumerate(rows):
        pen.text((3, MARGIN_PX + y * side + side // 2 - 6), word, fill="black")
        for x, drawn in enumerate(pictures):
            tile = Image.fromarray(drawn).resize((side, side), Image.Resampling.BICUBIC)
            made.paste(tile, (left + x * side, MARGIN_PX + y * side))
    return made


def drawn(pipe: StableDiffusionPipeline, guidance: float) -> None:
    """Every class in every place, and every class in every colour."""
    prompts = [caption.prompt(noun, place) for noun in CLASSES for place in PLACE_NAMES]
    pictures = list(generate(pipe, prompts, guidance=guidance))
    width = len(PLACE_NAMES)
    rows = [(noun, pictures[i * width : (i + 1) * width]) for i, noun in enumerate(CLASSES)]
    sheet(rows, list(PLACE_NAMES)).save(DOCS / "places.jpg", quality=90)
    prompts = [caption.prompt(n, "white", colour) for n in CLASSES for colour in COLOUR_NAMES]
    pictures, width = list(generate(pipe, prompts, guidance=guidance, seed=1)), len(COLOUR_NAMES)
    rows = [(noun, pictures[i * width : (i + 1) * width]) for i, noun in enumerate(CLASSES)]
    sheet(rows, list(COLOUR_NAMES)).save(DOCS / "colours.jpg", quality=90)


@torch.no_grad()
def kept(pipe: StableDiffusionPipeline) -> None:
    """Composites and unseen drawings beside what the VAE makes of them."""
    seen = list(narrow(UNSEEN, 10)[0])
    unseen = [np.asarray(picture(subject, "snow", 9)) for subject in SUBJECTS]
    rows = []
    for word, pictures in (("composites", seen), ("unseen", unseen)):
        made = pipe.vae.decode(pipe.vae.encode(vae.to_tensor(np.stack(pictures))).latent_dist.mean).sample
        pixels = (made.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        rows += [(word, pictures), ("after VAE", list(pixels))]
    sheet(rows, []).save(DOCS / "vae.jpg", quality=90)


def keep_curves() -> None:
    """Copies the run's own curves beside the figures, and reads each grid that the run left behind."""
    for source in (vae.CURVE, train.CURVE, score.SCORES):
        if source.exists():
            shutil.copyfile(source, DOCS / source.name)
    grids = sorted(train.GRIDS.glob("*.png"))
    if not grids:
        return
    with (DOCS / "grids.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("images", "class", "place"))
        for path in grids:
            noun, place = score.glance(path)
            rows.writerow((int(path.stem), f"{noun:.4f}", f"{place:.4f}"))


def columns_of(name: str) -> dict[str, list[float]]:
    """A CSV's columns of numbers."""
    with (DOCS / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows] for key in rows[0]}


def curve() -> None:
    """Loss and the judge's readings against images trained."""
    loss, read = columns_of("unet.csv"), columns_of("grids.csv")
    matplotlib.use("Agg")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([i / 1000 for i in loss["images"]], loss["loss"], linewidth=0.9)
    left.set(xlabel="thousand images", ylabel="weighted v-loss", title="training loss", ylim=(0.15, 0.6))
    for name in ("class", "place"):
        right.plot([i / 1000 for i in read["images"]], read[name], marker=".", label=name)
    right.set(xlabel="thousand images", ylabel="share read as asked", title="the judge, guidance 3", ylim=(0, 1.02))
    right.legend()
    figure.savefig(DOCS / "curve.png", dpi=90)
    pyplot.close(figure)


def make() -> None:
    DOCS.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(BASE)
    with torch.autocast("cpu", torch.bfloat16):
        drawn(pipe, guidance=3.0)
    kept(pipe)
    keep_curves()
    curve()
