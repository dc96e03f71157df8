"""A long training: rates, snapshots, the curve and pictures on the way, whatever model it is.

Stopped at any moment it goes on from its last snapshot; from exported weights alone it starts warm.
"""

import csv
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tools.pocket import snapshot
from tools.pocket.recipe import SEED, LoopSpec
from tools.pocket.team import Seat
from tools.pocket.vae import Averaged

log = logging.getLogger(__name__)

SAVE_EVERY_S = 240
LOG_EVERY_STEPS = 50
AVERAGE_EVERY_STEPS = 4
LOOK_AT = (3_200, 10_000, 20_000, 40_000, 60_000, 80_000)
LOOK_EVERY = 50_000


class Draws(Protocol):
    """Where batches come from: what one holds depends on (seed, step, seat) only."""

    def draw(self, step: int) -> tuple[Tensor, ...]:
        """The arguments of the model's loss."""


def _cold(model: Any) -> None:
    raise ValueError("This model has no exported weights to start from. Go on from its snapshot.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What is trained, on what, and where it leaves its files. `build()` is a module with a `loss(*batch)`.

    `warm(model)` loads exported weights; `look(weights, images)` draws pictures by averaged weights.
    """

    name: str
    spec: LoopSpec
    folder: Path
    build: Callable[[], nn.Module]
    draws: Callable[[Seat], Draws]
    look: Callable[[dict[str, Tensor], int], None]
    warm: Callable[[Any], None] = _cold

    @property
    def snapshot(self) -> Path:
        return self.folder / f"{self.name}.pt"

    @property
    def cooled(self) -> Path:
        return self.folder / f"{self.name}-cooled.pt"

    @property
    def curve(self) -> Path:
        return self.folder / f"{self.name}.csv"


@dataclass(frozen=True, slots=True)
class Cooldown:
    """A copy of the run whose rate falls to zero over `images`; the run itself goes on untouched."""

    images: int


class Training:
    """What a snapshot holds: weights, their average, the optimizer and the step."""

    def __init__(self, course: Course, seat: Seat) -> None:
        torch.manual_seed(SEED)
        self.course, self.seat, self.step = course, seat, 0
        self.model: Any = course.build().to(seat.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=course.spec.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        decay = 1 - AVERAGE_EVERY_STEPS * course.spec.batch_size / course.spec.ema_images
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
        self.course.warm(self.model)
        self.averaged = Averaged(self.model, self.averaged.decay)
        self.step = images // self.course.spec.batch_size

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        snapshot.save(path, state | {"ema": self.averaged.weights, "step": self.step})

    def update(self, batch: tuple[Tensor, ...], rate: float) -> float:
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
        return self.step * self.course.spec.batch_size


def note(path: Path, images: int, loss: float, rate: float) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        rows = csv.writer(file)
        if fresh:
            rows.writerow(("images", "loss", "images_per_s"))
        rows.writerow((images, f"{loss:.5f}", f"{rate:.1f}"))


def rate_of(spec: LoopSpec, done: int, cooldown: Cooldown | None) -> float:
    """The learning rate `done` images after the start: warmed up, or falling to zero."""
    if cooldown:
        return spec.learning_rate * max(0.0, 1 - done / cooldown.images)
    return spec.learning_rate * min(1.0, (done + spec.batch_size) / spec.warmup_images)


def is_due(images: int, batch_size: int) -> bool:
    """Whether this step passed one of the counts at which to look."""
    before = images - batch_size
    return any(before < at <= images for at in LOOK_AT) or images // LOOK_EVERY > before // LOOK_EVERY


def train(seat: Seat, course: Course, images: int, warm_images: int = 0, cooldown: Cooldown | None = None) -> None:
    """Trains until `images` have been seen, or cools a copy down."""
    training, draws = Training(course, seat), course.draws(seat)
    if not training.restore(course.snapshot) and warm_images:
        training.warm_start(warm_images)
    stopping: list[int] = []
    # SIGINT is also what a worker gets when the process that started it ends.
    for wish in (signal.SIGTERM, signal.SIGINT):
        signal.signal(wish, lambda number, frame: stopping.append(number))
    first = training.images
    target = first + cooldown.images if cooldown else images
    diary = Diary(training, target, quiet=cooldown is not None)
    while training.images < target:
        since = training.images - (first if cooldown or warm_images else 0)
        loss = training.update(draws.draw(training.step), rate_of(course.spec, since, cooldown))
        if training.step % 10 == 0 and seat.agree(bool(stopping)):
            break
        if seat.leads:
            diary.after(loss)
    if seat.leads:
        if cooldown:
            # Small steps average by themselves; the running average would still hold the weights of the large ones.
            training.averaged = Averaged(training.model, training.averaged.decay)
        training.save(course.cooled if cooldown else course.snapshot)


class Diary:
    """What the leader writes down on the way: the log and, unless `quiet`, the curve, snapshots and pictures."""

    def __init__(self, training: Training, target: int, *, quiet: bool) -> None:
        self.training, self.target, self.quiet = training, target, quiet
        self.losses: list[float] = []
        self.last_save = self.last_log = time.monotonic()

    def after(self, loss: float) -> None:
        """After each step."""
        training, course = self.training, self.training.course
        self.losses.append(loss)
        if len(self.losses) == LOG_EVERY_STEPS:
            now = time.monotonic()
            speed = len(self.losses) * course.spec.batch_size / (now - self.last_log)
            mean, left = math.fsum(self.losses) / len(self.losses), (self.target - training.images) / speed / 60
            log.info(
                f"{course.name} {training.images} images, loss {mean:.4f}, {speed:.0f} images/s, {left:.0f} min left"
            )
            if not self.quiet:
                note(course.curve, training.images, mean, speed)
            self.losses, self.last_log = [], now
        if not self.quiet and time.monotonic() - self.last_save > SAVE_EVERY_S:
            training.save(course.snapshot)
            self.last_save = time.monotonic()
        if not self.quiet and is_due(training.images, course.spec.batch_size):
            course.look(training.averaged.weights, training.images)
