"""The noise process of a base: how pictures are noised for training, and the steps that take the noise away again.

Every process here noises by `x = a clean + b noise` and trains towards `c noise + d clean`, and every sampler's step is
linear, so a request's whole run is one table of coefficients. `ddpm.py` and `flow.py` have the processes.

Shape suffixes: N rows, C, H, W a latent's; T steps, K coefficients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from training.base.facts import SamplerName
from training.base.transfer import send

Size = tuple[int, int]  # of a latent: cells down, cells across

SMALLEST: Size = (1, 1)  # for processes whose schedule does not depend on the size

# the columns of a schedule's table; "clean" is the prediction of the finished latents, BEFORE that of the step before
TIMESTEP, INPUT, CLEAN_X, CLEAN_OUT, X, OUT, CLEAN, BEFORE, NOISE = range(9)


@dataclass(frozen=True, slots=True)
class Density:
    """How training draws noise levels, where the process leaves a choice.

    `shift` moves the mass towards noise: s' = k s / (1 + (k - 1) s); `resolution` takes the k the base samples with.
    """

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float | Literal["resolution"] = 1.0


class Levels(NamedTuple):
    """The noise levels of N rows: coefficients [N] of what they see and of what they learn, and their ratio.

    `times_N` (fp32) is what the denoiser is told.
    """

    times_N: Tensor
    a_N: Tensor
    b_N: Tensor
    c_N: Tensor
    d_N: Tensor
    snr_N: Tensor

    def on(self, device: torch.device) -> "Levels":
        """The same, on a device."""
        return Levels(*send(device, self))

    def noisy(self, latents_NCHW: Tensor, noise_NCHW: Tensor) -> Tensor:
        """The noised latents [N, C, H, W]."""
        return _rows(self.a_N) * latents_NCHW + _rows(self.b_N) * noise_NCHW

    def target(self, latents_NCHW: Tensor, noise_NCHW: Tensor) -> Tensor:
        """What the denoiser should return for them, [N, C, H, W]."""
        return _rows(self.c_N) * noise_NCHW + _rows(self.d_N) * latents_NCHW


@dataclass(frozen=True, slots=True)
class Schedule:
    """One request's run: `table_TK` float32, and how its first latents are mixed.

    The latents before the first step are `signal` x the image's latents (image-to-image) + `noise` x unit noise;
    `after_T2` has these two numbers of the latents after each step: 1 and 0 after the last.
    """

    table_TK: Tensor
    signal: float
    noise: float
    draws: bool  # whether a step takes fresh noise
    after_T2: Tensor = field(default_factory=lambda: torch.zeros(0, 2))

    @property
    def steps(self) -> int:
        """Denoiser calls of the run."""
        return self.table_TK.shape[0]


class Solved(NamedTuple):
    """A diffusers scheduler for rows that step together: `times` [T], and the size of the first noise."""

    scheduler: Any
    times: Tensor
    first: float

    def step(self, output_NCHW: Tensor, time: Tensor, latents_NCHW: Tensor) -> Tensor:
        """The latents after the step at `time`."""
        stepped: Tensor = self.scheduler.step(output_NCHW, time, latents_NCHW).prev_sample
        return stepped


class Process(Protocol):
    """What training and sampling ask of a noise process. A *place* is one number: where between clean and noise."""

    samplers: tuple[SamplerName, ...]

    def draw(self, generator: torch.Generator, sizes: Sequence[Size], density: Density) -> list[float]:
        """A random place for each row, whose latents have `sizes`."""

    def spread(self, count: int) -> list[float]:
        """`count` places, evenly spread from clean to noise."""

    def at(self, share: float) -> float:
        """The place at a share of the way from clean (0) to noise (1)."""

    def levels(self, places: Sequence[float], dtype: torch.dtype) -> Levels:
        """The levels at `places`, on the CPU; coefficients in `dtype`."""

    def snr_weights(self, snr_N: Tensor, gamma_N: Tensor) -> Tensor:
        """The min-SNR weight of each row, [N]; rows whose gamma is infinite weigh 1. Raises ValueError if the process
        has no such weight."""

    def stepper(self, steps: int, size: Size) -> Solved:
        """The steps of rows that all begin and end together."""

    def schedule(
        self, sampler: SamplerName, steps: int, strength: float | None = None, size: Size = SMALLEST
    ) -> Schedule:
        """The run of `steps` steps; with `strength` the last part of it that image-to-image does.

        Raises UserError for what the process cannot do.
        """


def row_losses(prediction_NCHW: Tensor, target_NCHW: Tensor, weights_N1HW: Tensor | None = None) -> Tensor:
    """Mean squared error of each row, [N], at least in fp32; `weights_N1HW` of its cells."""
    wide = torch.promote_types(prediction_NCHW.dtype, torch.float32)
    squares_NCHW = (prediction_NCHW.to(wide) - target_NCHW.to(wide)).square()
    if weights_N1HW is not None:
        squares_NCHW = squares_NCHW * weights_N1HW.to(squares_NCHW)
    return squares_NCHW.flatten(1).mean(1)


def _rows(values_N: Tensor) -> Tensor:
    return values_N.view(-1, 1, 1, 1)


def empty_table(times_T: Tensor) -> Tensor:
    """A table of the steps at `times_T`, float64 [T, 9]; the input is not scaled."""
    table_TK = torch.zeros(len(times_T), 9, dtype=torch.float64)
    table_TK[:, TIMESTEP] = times_T.double()
    table_TK[:, INPUT] = 1.0
    return table_TK


def steps_left(steps: int, strength: float | None) -> int:
    """The index of the first step that is taken: image-to-image leaves out the first part of a run."""
    return 0 if strength is None else max(steps - min(int(steps * strength), steps), 0)
