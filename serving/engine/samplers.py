"""Samplers over a batch in which every row has its own sampler, length and position.

A step of every sampler here is linear in the row's latents, the model's output, the last two predictions of the clean
image and fresh noise. So a request's whole run is one table of coefficients, read off the diffusers scheduler of that
name, and a batch takes one fused step by gathering one line of each row's table. Knows nothing about adapters,
prompts or requests.

Shape suffixes: N rows, T steps, C coefficients; CHW a latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor

from serving.engine.request import SamplerName
from training.errors import UserError

KARRAS = "_karras"  # ends the name of a sampler whose noise levels are spaced as Karras et al. (2022) do
Kind = Literal["ddim", "euler", "euler_a", "dpm++_2m"]
# the columns of a table; "clean" is the model's prediction of the finished latents
TIMESTEP, INPUT, CLEAN_X, CLEAN_OUT, X, OUT, CLEAN, BEFORE, NOISE = range(9)


@dataclass(frozen=True, slots=True)
class Schedule:
    """One request's run: `table_TC` float32, and how its first latents are mixed.

    The latents before the first step are `signal` x the image's latents (image-to-image) + `noise` x unit noise.
    """

    table_TC: Tensor
    signal: float
    noise: float
    draws: bool  # whether a step takes fresh noise

    @property
    def steps(self) -> int:
        return self.table_TC.shape[0]


class Samplers:
    """The schedules of one base. `config` is the base's own scheduler config, whatever class it names."""

    def __init__(self, config: dict[str, Any]) -> None:
        if config.get("thresholding"):
            raise UserError("This base asks for dynamic thresholding, which latent diffusion does not use.")
        # what diffusers' Stable Diffusion pipelines make of any scheduler that they are given
        self._config = {**config, "clip_sample": False, "steps_offset": 1}
        self.schedule = lru_cache(maxsize=256)(self._schedule)

    def _schedule(self, name: SamplerName, steps: int, strength: float | None = None) -> Schedule:
        """The run of `steps` steps; with `strength` the last part of it that image-to-image does."""
        kind = cast(Kind, name.removesuffix(KARRAS))
        scheduler = _make(kind, self._config, karras=name.endswith(KARRAS))
        start = 0
        if strength is not None:
            start = max(steps - min(int(steps * strength), steps), 0)
        try:
            scheduler.set_timesteps(steps)
            table = _TABLES[kind](scheduler, start).to(torch.float32)
        except (IndexError, ValueError):  # more steps than the noise schedule has
            table = torch.full((1, 1), torch.nan)
        if not len(table) or not torch.isfinite(table).all():
            raise UserError(
                f"Scheduler '{name}' cannot take steps {steps}"
                + (f" with strength {strength}" if strength is not None else "")
                + f" on this base, whose noise schedule has {scheduler.config.num_train_timesteps}. Use other numbers."
            )
        signal, noise = _first_mix(kind, scheduler, start, from_image=strength is not None)
        return Schedule(table, signal, noise, kind == "euler_a")


def _make(kind: Kind, config: dict[str, Any], *, karras: bool) -> Any:
    config = {**config, "use_karras_sigmas": True} if karras else config
    if kind == "dpm++_2m":
        return DPMSolverMultistepScheduler.from_config(
            config, solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint"
        )
    if karras:  # of an ancestral run only the noise levels are read, so Euler's do for both
        return EulerDiscreteScheduler.from_config(config)
    classes = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "euler_a": EulerAncestralDiscreteScheduler}
    return classes[kind].from_config(config)


def _first_mix(kind: Kind, scheduler: Any, start: int, *, from_image: bool) -> tuple[float, float]:
    if not from_image:
        return 0.0, float(scheduler.init_noise_sigma)
    if kind in ("euler", "euler_a"):
        return 1.0, float(scheduler.sigmas[start])
    if kind == "ddim":
        alpha = float(scheduler.alphas_cumprod.double()[int(scheduler.timesteps[start])])
        return alpha**0.5, (1 - alpha) ** 0.5
    sigma = float(scheduler.sigmas.double()[start])
    return 1 / (sigma**2 + 1) ** 0.5, sigma / (sigma**2 + 1) ** 0.5


def _empty(scheduler: Any, start: int) -> Tensor:
    """A table of the steps from `start` on, its timesteps filled in."""
    timesteps_T = scheduler.timesteps[start:].double()
    table_TC = torch.zeros(len(timesteps_T), 9, dtype=torch.float64)
    table_TC[:, TIMESTEP] = timesteps_T
    table_TC[:, INPUT] = 1.0
    return table_TC


def _ddim(scheduler: Any, start: int) -> Tensor:
    table = _empty(scheduler, start)
    times = scheduler.timesteps[start:]
    # the stride counts from the whole run's length, as in diffusers, also where "trailing" does not divide evenly
    before = times - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alphas = scheduler.alphas_cumprod.double()
    now = alphas[times]
    then = torch.where(before >= 0, alphas[before.clamp(min=0)], scheduler.final_alpha_cumprod.double())
    signal, noise, noise_then = now.sqrt(), (1 - now).sqrt(), (1 - then).sqrt()
    _predict_clean(table, scheduler, signal, noise)
    table[:, CLEAN] = then.sqrt()
    if scheduler.config.prediction_type == "epsilon":
        table[:, OUT] = noise_then
    else:
        table[:, OUT] = noise_then * signal
        table[:, X] = noise_then * noise
    return table


def _predict_clean(table: Tensor, scheduler: Any, signal: Tensor, noise: Tensor) -> None:
    """clean = CLEAN_X x latents + CLEAN_OUT x output, for latents = signal x clean + noise x epsilon."""
    if scheduler.config.prediction_type == "epsilon":
        table[:, CLEAN_X], table[:, CLEAN_OUT] = 1 / signal, -noise / signal
    elif scheduler.config.prediction_type == "v_prediction":
        table[:, CLEAN_X], table[:, CLEAN_OUT] = signal, -noise
    else:
        raise UserError(
            f"This base predicts '{scheduler.config.prediction_type}'; served are epsilon and v_prediction."
        )


def _scaled_input(table: Tensor, scheduler: Any, sigma: Tensor) -> None:
    """Euler's latents are clean + sigma x noise, and the model sees them divided by sqrt(sigma^2 + 1)."""
    scale = 1 / (sigma**2 + 1).sqrt()
    table[:, INPUT] = scale
    _predict_clean(table, scheduler, scale, sigma * scale)
    table[:, CLEAN_X] *= scale


def _euler(scheduler: Any, start: int) -> Tensor:
    table = _empty(scheduler, start)
    sigmas = scheduler.sigmas.double()[start:]
    sigma, then = sigmas[:-1], sigmas[1:]
    _scaled_input(table, scheduler, sigma)
    # latents + (latents - clean) / sigma x (then - sigma)
    table[:, X], table[:, CLEAN] = then / sigma, 1 - then / sigma
    return table


def _euler_a(scheduler: Any, start: int) -> Tensor:
    table = _empty(scheduler, start)
    sigmas = scheduler.sigmas.double()[start:]
    sigma, then = sigmas[:-1], sigmas[1:]
    _scaled_input(table, scheduler, sigma)
    up = (then**2 * (sigma**2 - then**2) / sigma**2).sqrt()
    down = (then**2 - up**2).clamp(min=0).sqrt()
    table[:, X], table[:, CLEAN], table[:, NOISE] = down / sigma, 1 - down / sigma, up
    return table


def _dpm(scheduler: Any, start: int) -> Tensor:
    table = _empty(scheduler, start)
    sigmas = scheduler.sigmas.double()[start:]
    sigma, then = sigmas[:-1], sigmas[1:]
    signal, signal_then = 1 / (sigma**2 + 1).sqrt(), 1 / (then**2 + 1).sqrt()
    _predict_clean(table, scheduler, signal, sigma * signal)
    table[:, X] = then * signal_then / (sigma * signal)
    gain = signal_then * (1 - then / sigma)  # alpha x (1 - exp(-h)), where h = log(sigma / then)
    table[:, CLEAN] = gain
    for step in range(1, len(sigma)):
        if _first_order(scheduler, start + step):
            continue
        last, now, following = sigmas[step - 1 : step + 2]
        bend = 0.5 * gain[step] * (now / following).log() / (last / now).log()
        table[step, CLEAN] += bend
        table[step, BEFORE] = -bend
    return table


def _first_order(scheduler: Any, step: int) -> bool:
    """Whether DPM-Solver++ takes step `step` of the whole run without history."""
    config, steps = scheduler.config, len(scheduler.timesteps)
    return step == steps - 1 and (
        config.euler_at_final or (config.lower_order_final and steps < 15) or config.final_sigmas_type == "zero"
    )


_TABLES = {"ddim": _ddim, "euler": _euler, "euler_a": _euler_a, "dpm++_2m": _dpm}


@dataclass(frozen=True, slots=True)
class Lines:
    """One line of each row's table, on the device of the latents."""

    coefficients_NC: Tensor

    @classmethod
    def gather(cls, schedules: Sequence[Schedule], steps: Sequence[int], device: torch.device) -> "Lines":
        lines = torch.stack([schedule.table_TC[step] for schedule, step in zip(schedules, steps, strict=True)])
        return cls(lines.to(device, non_blocking=True))

    @property
    def timesteps_N(self) -> Tensor:
        return self.coefficients_NC[:, TIMESTEP]

    def model_input(self, latents_NCHW: Tensor) -> Tensor:
        return latents_NCHW * self._column(INPUT)

    def step(
        self, latents_NCHW: Tensor, output_NCHW: Tensor, before_NCHW: Tensor, noise_NCHW: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The next latents and the predicted clean latents. All in float32; `before` is the last step's clean."""
        clean = latents_NCHW * self._column(CLEAN_X) + output_NCHW * self._column(CLEAN_OUT)
        following = latents_NCHW * self._column(X) + output_NCHW * self._column(OUT) + clean * self._column(CLEAN)
        following += before_NCHW * self._column(BEFORE)
        if noise_NCHW is not None:
            following += noise_NCHW * self._column(NOISE)
        return following, clean

    def _column(self, index: int) -> Tensor:
        return self.coefficients_NC[:, index].view(-1, 1, 1, 1)
