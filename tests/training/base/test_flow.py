"""Flow matching: every sampler against the diffusers scheduler that does the same steps, and training's draws."""

import math
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from serving.engine.samplers import ScheduleLines
from training.base.facts import SamplerName
from training.base.noise.flow import Flow, linear_mu
from training.base.noise.process import Density, Schedule
from training.base.stream import stream
from training.errors import UserError

STATIC: dict[str, Any] = {"shift": 3.0}
DYNAMIC: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SIZE = (32, 48)


def flow(config: dict[str, Any]) -> Flow:
    return Flow(config, mu=linear_mu(config, 2))


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """Some velocity that depends on both."""
    return torch.tanh(1.3 * x) + sigma * x.flip(-1)


def ours(schedule: Schedule, noise: Tensor, generator: torch.Generator) -> Tensor:
    x, before = noise * schedule.noise, torch.zeros_like(noise)
    for step in range(schedule.steps):
        lines = ScheduleLines.gather([schedule], [step], noise.device)
        fresh = torch.randn(noise.shape, generator=generator) if schedule.draws else None
        output = denoiser(lines.model_input(x), lines.timesteps_N / 1000)
        x, before = lines.step(x, output, before, fresh)
    return x


def theirs(name: SamplerName, process: Flow, steps: int, noise: Tensor, generator: torch.Generator) -> Tensor:
    """diffusers' steps over the sigmas of the base's own scheduler."""
    told: Any = process.stepper(steps, SIZE).scheduler
    if name == "dpm++_2m":
        scheduler: Any = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        scheduler.set_timesteps(steps)
        scheduler.sigmas, scheduler.timesteps = told.sigmas, told.timesteps
    else:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(told.config, stochastic_sampling=name == "euler_a")
        scheduler.sigmas, scheduler.timesteps = told.sigmas, told.timesteps
    x = noise
    for step, time in enumerate(scheduler.timesteps):
        output = denoiser(x, told.sigmas[step])
        x = scheduler.step(output, time, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("config", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["euler", "euler_a", "dpm++_2m"])
def test_a_run_equals_diffusers_steps(name: SamplerName, config: dict[str, Any]) -> None:
    process = flow(config)
    for steps in (1, 2, 7, 20):
        noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(steps))
        found = ours(process.schedule(name, steps, None, SIZE), noise, torch.Generator().manual_seed(9))
        expected = theirs(name, process, steps, noise, torch.Generator().manual_seed(9))
        assert (found - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max())), steps


def test_image_to_image_starts_in_the_middle() -> None:
    """As diffusers' `scale_noise` mixes the picture and the noise at the first sigma that is left."""
    process = flow(STATIC)
    whole, part = process.schedule("euler", 10), process.schedule("euler", 10, 0.4)
    assert part.steps == 4 and torch.equal(part.table_TK, whole.table_TK[6:])
    told: Any = process.stepper(10, SIZE).scheduler
    assert part.noise == pytest.approx(float(told.sigmas[6])) and part.signal == pytest.approx(1 - part.noise)
    with pytest.raises(UserError, match="no step"):
        process.schedule("euler", 4, 0.1)


def test_samplers_of_another_process_are_refused_in_words() -> None:
    with pytest.raises(UserError, match="'ddim'.*euler, euler_a, dpm"):
        flow(STATIC).schedule("ddim", 5)


def test_training_noises_towards_the_velocity() -> None:
    clean, noise = torch.randn(2, 2, 3, 4, 4).double().unbind()
    levels = flow(STATIC).levels([0.25, 0.8], torch.float64)
    s = torch.tensor([0.25, 0.8]).double().view(2, 1, 1, 1)
    assert torch.allclose(levels.noisy(clean, noise), (1 - s) * clean + s * noise, atol=1e-7)
    assert torch.equal(levels.target(clean, noise), noise - clean)
    assert levels.times_N.tolist() == pytest.approx([250, 800])
    with pytest.raises(ValueError, match="flow matching"):
        flow(STATIC).snr_weights(levels.snr_N, torch.ones(2))


@pytest.mark.parametrize(
    ("density", "median"),
    [
        (Density(), 0.5),
        (Density("logit_normal"), 0.5),
        (Density("logit_normal", mean=1.0, std=0.5), 1 / (1 + math.exp(-1))),
        (Density(shift=3.0), 0.75),
        (Density(shift="resolution"), 0.75),  # the scheduler's own shift, where it is static
    ],
)
def test_densities_have_the_median_that_their_settings_say(density: Density, median: float) -> None:
    drawn = torch.tensor(flow(STATIC).draw(stream(0, "x"), [SIZE] * 20_000, density))
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1
    assert float(drawn.median()) == pytest.approx(median, abs=0.01)


def test_a_dynamic_shift_grows_with_the_picture() -> None:
    """FLUX.1's: 1.88 at 512 px, 3.16 at 1024 px (latents of 8 px cells)."""
    process = flow(DYNAMIC)
    shifts = [s / (1 - s) for s in process.draw(stream(0, "x"), [(64, 64), (128, 128)], Density(shift="resolution"))]
    plain = [s / (1 - s) for s in process.draw(stream(0, "x"), [(64, 64), (128, 128)], Density())]
    assert [k / p for k, p in zip(shifts, plain, strict=True)] == pytest.approx([1.8776, 3.1582], rel=1e-3)
