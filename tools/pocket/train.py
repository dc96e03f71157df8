"""The long training of UNet and text encoder: batches, rates, snapshots, the curve and pictures on the way.

Stopped at any moment it goes on from its last snapshot; from exported weights alone it starts warm.
"""

import csv
import json
import logging
import math
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel

from tools.pocket import caption, latents, snapshot, tokenizer, vae
from tools.pocket.composite import Labels
from tools.pocket.drawings import CLASSES
from tools.pocket.places import PLACE_NAMES
from tools.pocket.recipe import BASE, NARROW_POOL, SEED, TIGHT_CHUNKS, UNET, WORK
from tools.pocket.sampler import generate, grid, pipeline
from tools.pocket.team import Seat, run
from tools.pocket.unet import Pocket
from tools.pocket.vae import Averaged

log = logging.getLogger(__name__)

SNAPSHOT = WORK / "unet.pt"
COOLED = WORK / "unet-cooled.pt"
CURVE = WORK / "unet.csv"
GRIDS = WORK / "grids"
SAVE_EVERY_S = 240
LOG_EVERY_STEPS = 50
AVERAGE_EVERY_STEPS = 4
LOOK_AT = (3_200, 10_000, 20_000, 40_000, 60_000, 80_000)
LOOK_EVERY = 50_000


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

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng = np.random.default_rng((SEED, 5, step, self.seat.rank))
        tight = step * UNET.batch_size < UNET.tight_images
        limit = TIGHT_CHUNKS * NARROW_POOL.chunk_size if tight else len(self.latents)
        picked = rng.integers(limit, size=self.size)
        tokens = [self.tokens(row, rng) for row in self.labels[picked]]
        noise = rng.standard_normal((self.size, *self.latents.shape[1:]), dtype=np.float32)
        # Stratified: each batch covers all noise levels, which steadies the gradient.
        levels = ((np.arange(self.size) + rng.random(self.size)) / self.size * 1000).astype(np.int64)
        arrays = (self.latents[picked].astype(np.float32), np.asarray(tokens), noise, levels)
        latents_, tokens_, noise_, levels_ = (torch.from_numpy(a).to(self.seat.device) for a in arrays)
        return latents_, tokens_, noise_, levels_

    def tokens(self, row: NDArray[np.uint8], rng: np.random.Generator) -> list[int]:
        if rng.random() < UNET.caption_drop:
            return tokenizer.encode("")
        noun, place, colour, style = (int(v) for v in row)
        return tokenizer.encode(caption.caption(Labels(noun=noun, place=place, colour=colour, style=style), rng))


@dataclass(frozen=True, slots=True)
class Cooldown:
    """A copy of the run whose rate falls to zero over `images`; the run itself goes on untouched."""

    images: int

    def rate(self, done: int) -> float:
        return UNET.learning_rate * max(0.0, 1 - done / self.images)


class Training:
    """What a snapshot holds: weights, their average, the optimizer and the step."""

    def __init__(self, seat: Seat) -> None:
        torch.manual_seed(SEED)
        self.seat, self.step = seat, 0
        self.model = Pocket().to(seat.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=UNET.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        decay = 1 - AVERAGE_EVERY_STEPS * UNET.batch_size / UNET.ema_images
        self.averaged = Averaged(self.model, decay)

    def restore(self, path: Path) -> bool:
        state = snapshot.load(path)
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averaged.weights = {k: v.to(self.seat.device) for k, v in state["ema"].items()}
        self.step = int(state["step"])
        return True

    def warm_start(self, images: int) -> None:
        """From exported weights: the optimizer starts anew, the data goes on behind the images already seen."""
        self.model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(BASE / "unet").float().state_dict())
        self.model.text.load_state_dict(CLIPTextModel.from_pretrained(BASE / "text_encoder").float().state_dict())
        self.averaged = Averaged(self.model, self.averaged.decay)
        self.step = images // UNET.batch_size

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        snapshot.save(path, state | {"ema": self.averaged.weights, "step": self.step})

    def update(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.seat.device.type, torch.bfloat16):
            loss = self.model.loss(*batch)
        loss.backward()
        self.seat.average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.seat.leads and self.step % AVERAGE_EVERY_STEPS == 0:
            self.averaged.follow(self.model, self.step // AVERAGE_EVERY_STEPS)
        return float(loss.detach())

    @property
    def images(self) -> int:
        return self.step * UNET.batch_size


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


def note(images: int, loss: float, rate: float) -> None:
    fresh = not CURVE.exists()
    with CURVE.open("a", newline="") as file:
        rows = csv.writer(file)
        if fresh:
            rows.writerow(("images", "loss", "images_per_s"))
        rows.writerow((images, f"{loss:.5f}", f"{rate:.1f}"))


def warmup(images: int) -> float:
    return UNET.learning_rate * min(1.0, (images + UNET.batch_size) / UNET.warmup_images)


def is_due(images: int) -> bool:
    """Whether this step passed one of the counts at which to look."""
    before = images - UNET.batch_size
    return any(before < at <= images for at in LOOK_AT) or images // LOOK_EVERY > before // LOOK_EVERY


def train(seat: Seat, images: int, warm_images: int = 0, cooldown: Cooldown | None = None) -> None:
    training, batch = Training(seat), Batch(seat)
    if not training.restore(SNAPSHOT) and warm_images:
        training.warm_start(warm_images)
    stopping: list[int] = []
    # SIGINT is also what a worker gets when the process that started it ends.
    for wish in (signal.SIGTERM, signal.SIGINT):
        signal.signal(wish, lambda number, frame: stopping.append(number))
    first = training.images
    target = first + cooldown.images if cooldown else images
    losses: list[float] = []
    last_save = last_log = time.monotonic()
    while training.images < target:
        done = training.images - first
        rate = cooldown.rate(done) if cooldown else warmup(done if warm_images else training.images)
        losses.append(training.update(batch.draw(training.step), rate))
        if training.step % 10 == 0 and seat.agree(bool(stopping)):
            break
        if not seat.leads:
            continue
        if len(losses) == LOG_EVERY_STEPS:
            now = time.monotonic()
            speed = len(losses) * UNET.batch_size / (now - last_log)
            loss, left = math.fsum(losses) / len(losses), (target - training.images) / speed / 60
            log.info(f"unet {training.images} images, loss {loss:.4f}, {speed:.0f} images/s, {left:.0f} min left")
            if not cooldown:
                note(training.images, loss, speed)
            losses, last_log = [], now
        if not cooldown and time.monotonic() - last_save > SAVE_EVERY_S:
            training.save(SNAPSHOT)
            last_save = time.monotonic()
        if not cooldown and is_due(training.images):
            look(training.averaged.weights, training.images)
    if seat.leads:
        if cooldown:
            # Small steps average by themselves; the running average would still hold the weights of the large ones.
            training.averaged = Averaged(training.model, training.averaged.decay)
        training.save(COOLED if cooldown else SNAPSHOT)


def make(images: int = UNET.images, warm: bool = False) -> None:
    """Trains until `images` have been seen, from the last snapshot; `warm`: without one, from the exported weights."""
    state = snapshot.load(SNAPSHOT)
    if state is None or int(state["step"]) * UNET.batch_size < images:
        warm_images = int(json.loads((BASE / "scores.json").read_text())["images"]) if warm else 0
        run(partial(train, images=images, warm_images=warm_images))


def cool(images: int = UNET.cooldown_images) -> None:
    """Forks the run's last snapshot into COOLED; small steps at the end sharpen what large ones blur."""
    run(partial(train, images=0, cooldown=Cooldown(images)))
