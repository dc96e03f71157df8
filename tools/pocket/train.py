"""The long training of UNet and text encoder."""

import json
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel

from tools.pocket import caption, latents, snapshot, tokenizer, vae
from tools.pocket.composite import Labels
from tools.pocket.course import Cooldown, Course, train
from tools.pocket.drawings import CLASSES
from tools.pocket.places import PLACE_NAMES
from tools.pocket.recipe import BASE, NARROW_POOL, SEED, TIGHT_CHUNKS, UNET, WORK
from tools.pocket.sampler import generate, grid, pipeline
from tools.pocket.team import Seat, run
from tools.pocket.unet import Pocket

GRIDS = WORK / "grids"


class Batch:
    """Draws batches from the latents; pictures, captions and noise depend on (seed, step, rank) only."""

    def __init__(self, seat: Seat) -> None:
        self.seat, self.size = seat, UNET.batch_size // seat.size
        chunks = []
        for chunk in range(NARROW_POOL.chunks):
            with np.load(latents.path(chunk)) as held:
                chunks.append((held["latents"], held["labels"]))
        self.latents: NDArray[np.float16] = np.concatenate([c[0] for c in chunks])
        self.labels: NDArray[np.uint8] = np.concatenate([c[1] for c in chunks])

    def draw(self, step: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng((SEED, 5, step, self.seat.rank))
        tight = step * UNET.batch_size < UNET.tight_images
        limit = TIGHT_CHUNKS * NARROW_POOL.chunk_size if tight else len(self.latents)
        picked = rng.integers(limit, size=self.size)
        tokens = [self.tokens(row, rng) for row in self.labels[picked]]
        noise = rng.standard_normal((self.size, *self.latents.shape[1:]), dtype=np.float32)
        # Stratified: each batch covers all noise levels, which steadies the gradient.
        levels = ((np.arange(self.size) + rng.random(self.size)) / self.size * 1000).astype(np.int64)
        arrays = (self.latents[picked].astype(np.float32), np.asarray(tokens), noise, levels)
        return tuple(torch.from_numpy(a).to(self.seat.device) for a in arrays)

    def tokens(self, row: NDArray[np.uint8], rng: np.random.Generator) -> list[int]:
        if rng.random() < UNET.caption_drop:
            return tokenizer.encode("")
        noun, place, colour, style = (int(v) for v in row)
        return tokenizer.encode(caption.caption(Labels(noun=noun, place=place, colour=colour, style=style), rng))


def models_of(weights: dict[str, Tensor]) -> Pocket:
    pocket = Pocket()
    pocket.load_state_dict(weights)
    return pocket.eval()


def shown() -> list[tuple[str, str]]:
    """The class and place of each picture in a grid, row by row."""
    return [(n, PLACE_NAMES[(i + 3 * row) % len(PLACE_NAMES)]) for row in range(2) for i, n in enumerate(CLASSES)]


def look(weights: dict[str, Tensor], images: int) -> None:
    """A grid of all classes, each in two places, by eye."""
    pocket = models_of(weights)
    frozen = AutoencoderKL.from_pretrained(vae.FOLDER).eval()
    with torch.autocast("cpu", torch.bfloat16):
        made = generate(pipeline(pocket.unet, pocket.text, frozen), [caption.prompt(n, p) for n, p in shown()])
    GRIDS.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid(made, len(CLASSES))).save(GRIDS / f"{images:08}.png")


def warm(pocket: Pocket) -> None:
    """The exported weights."""
    pocket.unet.load_state_dict(UNet2DConditionModel.from_pretrained(BASE / "unet").float().state_dict())
    pocket.text.load_state_dict(CLIPTextModel.from_pretrained(BASE / "text_encoder").float().state_dict())


COURSE = Course(name="unet", spec=UNET, folder=WORK, build=Pocket, draws=Batch, warm=warm, look=look)
SNAPSHOT, COOLED, CURVE = COURSE.snapshot, COURSE.cooled, COURSE.curve


def make(images: int = UNET.images, warm: bool = False) -> None:
    """Trains until `images` have been seen, from the last snapshot; `warm`: without one, from the exported weights."""
    state = snapshot.load(SNAPSHOT)
    if state is None or int(state["step"]) * UNET.batch_size < images:
        warm_images = int(json.loads((BASE / "scores.json").read_text())["images"]) if warm else 0
        run(partial(train, course=COURSE, images=images, warm_images=warm_images))


def cool(images: int = UNET.cooldown_images) -> None:
    """Forks the run's last snapshot into COOLED; small steps at the end sharpen what large ones blur."""
    run(partial(train, course=COURSE, images=0, cooldown=Cooldown(images)))
