"""The DDPM process: epsilon and v prediction under a table of cumulative alphas, and its samplers.

Sources: Ho et al. 2020 (epsilon), Salimans and Ho 2022 (v), Hang et al. 2023 (min-SNR); the tables are read off the
diffusers scheduler of each sampler's name.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor

from training.base.facts import SAMPLERS, SamplerName
from training.base.noise.process import (
    BEFORE,
    CLEAN,
    CLEAN_OUT,
    CLEAN_X,
    INPUT,
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

PREDICTION_TYPES = ("epsilon", "v_prediction")
FORCED: Mapping[str, Any] = {"clip_sample": False, "steps_offset": 1}  # by diffusers' StableDiffusionPipeline
KARRAS = "_karras"  # ends the name of a sampler whose noise levels are spaced as Karras et al. (2022) do
Solver = Literal["ddim", "euler", "euler_a", "dpm++_2m"]


class Ddpm:
    """The process of a scheduler config, whatever class it names. A place is a timestep.

    `forced`: settings that the base's pipeline gives any scheduler it samples with.
    """

    samplers = SAMPLERS

    def __init__(self, config: dict[str, Any], *, forced: Mapping[str, Any] = FORCED) -> None:
        if config.get("thresholding"):
            raise UserError("This base asks for dynamic thresholding, which latent diffusion does not use.")
        self.prediction_type = str(config.get("prediction_type", "epsilon"))
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"This base predicts '{self.prediction_type}'; supported are {' and '.join(PREDICTION_TYPES)}."
            )
        self.config = config
        self._sampling = {**config, **forced}
        # [T] in float64 on the CPU, zero-terminal-SNR applied where configured
        self.alphas_cumprod: Tensor = DDPMScheduler.from_config(config).alphas_cumprod.double()
        self.schedule = lru_cache(maxsize=256)(self._schedule)

    def draw(self, generator: torch.Generator, sizes: Sequence[Size], density: Density) -> list[float]:
        """A random timestep for each row; the density is uniform."""
        return [float(t) for t in torch.randint(0, len(self.alphas_cumprod), (len(sizes),), generator=generator)]

    def spread(self, count: int) -> list[float]:
        """`count` timesteps, evenly spread."""
        places = ((torch.arange(count) + 0.5) / count * len(self.alphas_cumprod)).long()
        return [float(place) for place in places]

    def at(self, share: float) -> float:
        """The timestep at a share of the way from clean to noise."""
        return float(round(share * (len(self.alphas_cumprod) - 1)))

    def levels(self, places: Sequence[float], dtype: torch.dtype) -> Levels:
        """See `Process`."""
        times_N = torch.tensor(places, dtype=torch.float32)
        alphas_N = self.alphas_cumprod[times_N.long()].to(dtype)
        signal_N, noise_N = alphas_N.sqrt(), (1 - alphas_N).sqrt()
        ones_N = torch.ones_like(alphas_N)
        goal = (ones_N, ones_N * 0) if self.prediction_type == "epsilon" else (signal_N, -noise_N)
        return Levels(times_N, signal_N, noise_N, *goal, alphas_N / (1 - alphas_N))

    def snr_weights(self, snr_N: Tensor, gamma_N: Tensor) -> Tensor:
        """See `Process`."""
        floor = torch.finfo(snr_N.dtype).tiny  # a zero-terminal-SNR schedule really reaches 0
        clipped = torch.minimum(snr_N, gamma_N)
        weights = clipped / snr_N.clamp(min=floor) if self.prediction_type == "epsilon" else clipped / (snr_N + 1)
        return torch.where(gamma_N.isinf(), torch.ones_like(snr_N), weights)

    def stepper(self, steps: int, size: Size) -> Solved:
        """diffusers' DDIM, as the base's config sets it up."""
        scheduler = DDIMScheduler.from_config(self.config)
        scheduler.set_timesteps(steps)
        return Solved(scheduler, scheduler.timesteps, scheduler.init_noise_sigma)

    def _schedule(
        self, sampler: SamplerName, steps: int, strength: float | None = None, size: Size = SMALLEST
    ) -> Schedule:
        kind = cast(Solver, sampler.removesuffix(KARRAS))
        scheduler = _make(kind, self._sampling, karras=sampler.endswith(KARRAS))
        start = steps_left(steps, strength)
        try:
            scheduler.set_timesteps(steps)
            table = _TABLES[kind](scheduler, start).to(torch.float32)
        except (IndexError, ValueError):  # more steps than the noise schedule has
            table = torch.full((1, 1), torch.nan)
        if not len(table) or not torch.isfinite(table).all():
            raise UserError(
                f"Scheduler '{sampler}' cannot take steps {steps}"
                + (f" with strength {strength}" if strength is not None else "")
                + f" on this base, whose noise schedule has {scheduler.config.num_train_timesteps}. Use other numbers."
            )
        signal, noise = _first_mix(kind, scheduler, start, from_image=strength is not None)
        after = [_first_mix(kind, scheduler, step, from_image=True) for step in range(start + 1, start + len(table))]
        return Schedule(table, signal, noise, kind == "euler_a", torch.tensor([*after, (1.0, 0.0)]))


def _make(kind: Solver, config: dict[str, Any], *, karras: bool) -> Any:
    config = {**config, "use_karras_sigmas": True} if karras else config
    if kind == "dpm++_2m":
        return DPMSolverMultistepScheduler.from_config(
            config, solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint"
        )
    if karras:  # of an ancestral run only the noise levels are read, so Euler's do for both
        return EulerDiscreteScheduler.from_config(config)
    classes = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "euler_a": EulerAncestralDiscreteScheduler}
    return classes[kind].from_config(config)


def _first_mix(kind: Solver, scheduler: Any, start: int, *, from_image: bool) -> tuple[float, float]:
    if not from_image:
        return 0.0, float(scheduler.init_noise_sigma)
    if kind in ("euler", "euler_a"):
        return 1.0, float(scheduler.sigmas[start])
    if kind == "ddim":
        alpha = float(scheduler.alphas_cumprod.double()[int(scheduler.timesteps[start])])
        return alpha**0.5, (1 - alpha) ** 0.5
    sigma = float(scheduler.sigmas.double()[start])
    return 1 / (sigma**2 + 1) ** 0.5, sigma / (sigma**2 + 1) ** 0.5


def _ddim(scheduler: Any, start: int) -> Tensor:
    table = empty_table(scheduler.timesteps[start:])
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
    else:
        table[:, CLEAN_X], table[:, CLEAN_OUT] = signal, -noise


def _scaled_input(table: Tensor, scheduler: Any, sigma: Tensor) -> None:
    """Euler's latents are clean + sigma x noise, and the model sees them divided by sqrt(sigma^2 + 1)."""
    scale = 1 / (sigma**2 + 1).sqrt()
    table[:, INPUT] = scale
    _predict_clean(table, scheduler, scale, sigma * scale)
    table[:, CLEAN_X] *= scale


def _euler(scheduler: Any, start: int) -> Tensor:
    table = empty_table(scheduler.timesteps[start:])
    sigmas = scheduler.sigmas.double()[start:]
    sigma, then = sigmas[:-1], sigmas[1:]
    _scaled_input(table, scheduler, sigma)
    # latents + (latents - clean) / sigma x (then - sigma)
    table[:, X], table[:, CLEAN] = then / sigma, 1 - then / sigma
    return table


def _euler_a(scheduler: Any, start: int) -> Tensor:
    table = empty_table(scheduler.timesteps[start:])
    sigmas = scheduler.sigmas.double()[start:]
    sigma, then = sigmas[:-1], sigmas[1:]
    _scaled_input(table, scheduler, sigma)
    up = (then**2 * (sigma**2 - then**2) / sigma**2).sqrt()
    down = (then**2 - up**2).clamp(min=0).sqrt()
    table[:, X], table[:, CLEAN], table[:, NOISE] = down / sigma, 1 - down / sigma, up
    return table


def _dpm(scheduler: Any, start: int) -> Tensor:
    table = empty_table(scheduler.timesteps[start:])
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
