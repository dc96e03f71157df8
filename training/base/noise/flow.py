"""The flow-matching process (rectified flow): the denoiser predicts the velocity from clean to noise.

Sources: Liu et al. 2022, Lipman et al. 2022, Esser et al. 2024 (densities and shifts). A place is a sigma: 0 clean, 1
noise. The sigmas of a run are read off diffusers' `FlowMatchEulerDiscreteScheduler`.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from training.base.facts import FLOW_SAMPLERS, SamplerName
from training.base.noise.process import (
    BEFORE,
    CLEAN,
    CLEAN_OUT,
    CLEAN_X,
    NOISE,
    OUT,
    SMALLEST,
    Density,
    Levels,
    Schedule,
    Size,
    Solved,
    X,
    empty_table,
    steps_left,
)
from training.errors import UserError

Mu = Callable[[Size, int], float]  # the exponent of the shift of a run: of the latent's size and the number of steps

USUAL_STEPS = 50  # where training takes the shift of a run whose shift depends on its steps


def linear_mu(config: dict[str, Any], patch: int) -> Mu:
    """The exponent as FLUX.1's pipeline takes it: linear in the number of tokens, of `patch` x `patch` cells each."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)

    def mu(size: Size, steps: int) -> float:
        tokens = (size[0] // patch) * (size[1] // patch)
        return float(least + (tokens - low) * (most - least) / (high - low))

    return mu


def empirical_mu(size: Size, steps: int) -> float:
    """The exponent as FLUX.2's pipelines take it: fitted by its makers to the number of cells and of steps."""
    cells = size[0] * size[1]
    at_200 = 0.00016927 * cells + 0.45666666
    if cells > 4300:
        return at_200
    at_10 = 8.73809524e-05 * cells + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope


class Flow:
    """The process of a flow-matching scheduler's config.

    `linspace`: whether the pipeline hands its scheduler sigmas from 1 to 1/steps, as all but the first families do;
    `mu`: the exponent of the shift, where the config asks for a dynamic one.
    """

    samplers = FLOW_SAMPLERS

    def __init__(self, config: dict[str, Any], *, linspace: bool = True, mu: Mu | None = None) -> None:
        self._config = config
        self._linspace = linspace
        self._mu = mu
        self.schedule = lru_cache(maxsize=256)(self._schedule)

    def draw(self, generator: torch.Generator, sizes: Sequence[Size], density: Density) -> list[float]:
        """A random sigma for each row, in (0, 1)."""
        if density.kind == "uniform":
            drawn = torch.rand(len(sizes), generator=generator)
        else:
            drawn = torch.sigmoid(density.mean + density.std * torch.randn(len(sizes), generator=generator))
        return [self._shifted(s, size, density) for s, size in zip(drawn.tolist(), sizes, strict=True)]

    def _shifted(self, sigma: float, size: Size, density: Density) -> float:
        k = self._shift(size) if density.shift == "resolution" else density.shift
        return k * sigma / (1 + (k - 1) * sigma)

    def _shift(self, size: Size) -> float:
        """The shift that the base samples with at this size."""
        if self._mu is not None and self._config.get("use_dynamic_shifting"):
            return math.exp(self._mu(size, USUAL_STEPS))
        return float(self._config.get("shift", 1.0))

    def spread(self, count: int) -> list[float]:
        """`count` sigmas, evenly spread."""
        return [(index + 0.5) / count for index in range(count)]

    def at(self, share: float) -> float:
        """The sigma itself."""
        return share

    def levels(self, places: Sequence[float], dtype: torch.dtype) -> Levels:
        """See `Process`."""
        sigma_N = torch.tensor(places, dtype=torch.float64)
        ones_N = torch.ones_like(sigma_N)
        snr_N = ((1 - sigma_N) / sigma_N) ** 2
        coefficients = (1 - sigma_N, sigma_N, ones_N, -ones_N, snr_N)
        return Levels((sigma_N * 1000).to(torch.float32), *(values.to(dtype) for values in coefficients))

    def snr_weights(self, snr_N: Tensor, gamma_N: Tensor) -> Tensor:
        """Raises ValueError: min-SNR weights the steps of a DDPM."""
        raise ValueError("min-SNR weights have no meaning under flow matching")

    def stepper(self, steps: int, size: Size) -> Solved:
        """diffusers' Euler steps, as the family's pipeline sets them up."""
        scheduler = self._scheduler(steps, size)
        return Solved(scheduler, scheduler.timesteps, 1.0)

    def _scheduler(self, steps: int, size: Size) -> Any:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(copy.deepcopy(self._config))
        settings: dict[str, Any] = {}
        if self._linspace:
            settings["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        if scheduler.config.use_dynamic_shifting:
            assert self._mu is not None, "a dynamic shift needs the family's mu"
            settings["mu"] = self._mu(size, steps)
        scheduler.set_timesteps(steps, **settings)
        return scheduler

    def _schedule(
        self, sampler: SamplerName, steps: int, strength: float | None = None, size: Size = SMALLEST
    ) -> Schedule:
        if sampler not in self.samplers:
            raise UserError(
                f"Scheduler '{sampler}' is not for this base, which is sampled by flow matching. "
                f"Use one of {', '.join(self.samplers)}."
            )
        scheduler = self._scheduler(steps, size)
        start = steps_left(steps, strength)
        if start >= steps:
            raise UserError(
                f"Scheduler '{sampler}' cannot take steps {steps} with strength {strength}: that leaves no step. "
                "Raise one of them."
            )
        sigmas_T = scheduler.sigmas.double()
        table_TK = _TABLES[sampler](sigmas_T[start:]).to(torch.float32)
        sigma = float(sigmas_T[start])
        signal, noise = (0.0, 1.0) if strength is None else (1 - sigma, sigma)
        then_T = sigmas_T[start + 1 :]
        after_T2 = torch.stack([1 - then_T, then_T], dim=1).to(torch.float32)
        return Schedule(table_TK, signal, noise, sampler == "euler_a", after_T2)


def _begin(sigmas_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A table whose clean prediction is filled in, and the sigma before and after each step."""
    now, then = sigmas_T[:-1], sigmas_T[1:]
    table_TK = empty_table(now * 1000)
    table_TK[:, CLEAN_X], table_TK[:, CLEAN_OUT] = 1.0, -now
    return table_TK, now, then


def _euler(sigmas_T: Tensor) -> Tensor:
    table_TK, now, then = _begin(sigmas_T)
    table_TK[:, X], table_TK[:, OUT] = 1.0, then - now
    return table_TK


def _euler_a(sigmas_T: Tensor) -> Tensor:
    """The clean prediction noised anew: diffusers' `stochastic_sampling`."""
    table_TK, _, then = _begin(sigmas_T)
    table_TK[:, CLEAN], table_TK[:, NOISE] = 1 - then, then
    return table_TK


def _dpm(sigmas_T: Tensor) -> Tensor:
    """DPM-Solver++ (2M) for x = (1 - s) clean + s noise, as diffusers' multistep solver does it with flow sigmas."""
    table_TK, now, then = _begin(sigmas_T)
    table_TK[:, X] = then / now
    # (1 - then) (1 - exp(-h)), h = log-SNR after less before
    gain = (1 - then) - then / now * (1 - now)
    table_TK[:, CLEAN] = gain
    # the first step has no history, and the last one ends at sigma 0, where history has no weight
    for step in range(1, len(now) - 1):
        h = _log_snr(then[step]) - _log_snr(now[step])
        h_before = _log_snr(now[step]) - _log_snr(now[step - 1])  # infinite after sigma 1: no bend
        bend = 0.5 * gain[step] * h / h_before
        table_TK[step, CLEAN] += bend
        table_TK[step, BEFORE] = -bend
    return table_TK


def _log_snr(sigma: Tensor) -> Tensor:
    return ((1 - sigma) / sigma).log()


_TABLES = {"euler": _euler, "euler_a": _euler_a, "dpm++_2m": _dpm}
