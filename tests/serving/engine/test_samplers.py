"""Every sampler against the diffusers pipeline with the scheduler of that name, alone and mixed in one batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from serving.engine.samplers import ScheduleLines
from tests.tiny import tiny_pipeline
from training.base.facts import SamplerName
from training.base.noise.ddpm import Ddpm
from training.base.noise.process import Schedule
from training.errors import UserError


class KarrasAncestral(EulerAncestralDiscreteScheduler):
    """Euler's ancestral steps over Karras' noise levels, which diffusers has for plain Euler only."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        plain = EulerDiscreteScheduler.from_config(self.config, use_karras_sigmas=True)
        plain.set_timesteps(num_inference_steps, device)
        self.sigmas, self.timesteps = plain.sigmas, plain.timesteps


CLASSES: dict[SamplerName, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpm++_2m": DPMSolverMultistepScheduler,
    "euler_karras": EulerDiscreteScheduler,
    "euler_a_karras": KarrasAncestral,
    "dpm++_2m_karras": DPMSolverMultistepScheduler,
}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# (prediction type, changes of the base's scheduler config)
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "epsilon": ("epsilon", {}),
    "epsilon-outdated": ("epsilon", {"clip_sample": True, "steps_offset": 0}),
    "epsilon-linspace": ("epsilon", {"timestep_spacing": "linspace"}),
    "v": ("v_prediction", {}),
    "v-zero-snr": ("v_prediction", ZERO_SNR),
}


@pytest.fixture(scope="module", params=BASES)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    prediction_type, changes = BASES[request.param]
    pipeline = tiny_pipeline(tmp_path_factory.mktemp("base"), prediction_type)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **changes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample(pipeline: StableDiffusionPipeline, schedules: list[Schedule], seeds: list[int], guidance: float) -> Tensor:
    """Our samplers over the pipeline's UNet, all rows together though each has its own length."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])
    latents = latents * torch.tensor([schedule.noise for schedule in schedules]).view(-1, 1, 1, 1)
    embeds, negative = pipeline.encode_prompt("a dog", torch.device("cpu"), 1, True)
    clean = torch.zeros_like(latents)
    for step in range(max(schedule.steps for schedule in schedules)):
        rows = [row for row, schedule in enumerate(schedules) if step < schedule.steps]
        lines = ScheduleLines.gather([schedules[row] for row in rows], [step] * len(rows), latents.device)
        states = torch.cat([negative, embeds]).repeat_interleave(len(rows), 0)
        output = pipeline.unet(
            lines.model_input(latents[rows]).repeat(2, 1, 1, 1), lines.timesteps_N.repeat(2), states
        ).sample
        plain, prompted = output.chunk(2)
        noise = torch.cat(
            [
                torch.randn(1, 4, 8, 8, generator=generators[row]) if schedules[row].draws else torch.zeros(1, 4, 8, 8)
                for row in rows
            ]
        )
        latents[rows], clean[rows] = lines.step(
            latents[rows], plain + guidance * (prompted - plain), clean[rows], noise
        )
    return latents


def reference(pipeline: StableDiffusionPipeline, name: SamplerName, steps: int, seed: int) -> Tensor:
    spacing = {"use_karras_sigmas": True} if name in ("euler_karras", "dpm++_2m_karras") else {}
    scheduler = CLASSES[name].from_config(pipeline.scheduler.config, **spacing)
    fresh = StableDiffusionPipeline(
        **{**pipeline.components, "scheduler": scheduler},
        requires_safety_checker=False,
    )
    fresh.set_progress_bar_config(disable=True)
    result = fresh(
        "a dog",
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    )
    latents: Tensor = result.images
    return latents


def tolerance(schedule: Schedule, expected: Tensor) -> float:
    """1e-4 of the latents' size. Euler starts a zero-SNR schedule at sigma 4096, and diffusers' way of writing its
    step cancels that size in fp32: there the reference itself is off by a rounding at 4096."""
    rounding = schedule.noise * 2**-22 if schedule.noise > 1000 else 0.0
    return 1e-4 * max(1.0, float(expected.abs().max())) + rounding


@pytest.mark.parametrize("name", CLASSES)
def test_a_row_equals_the_diffusers_pipeline(pipeline: StableDiffusionPipeline, name: SamplerName) -> None:
    samplers = Ddpm(dict(pipeline.scheduler.config))
    for steps in (1, 2, 7, 16):
        expected = reference(pipeline, name, steps, seed=steps)
        found = sample(pipeline, [samplers.schedule(name, steps)], [steps], 3.0)
        assert (found - expected).abs().max() <= tolerance(samplers.schedule(name, steps), expected), steps


def test_rows_of_different_samplers_and_lengths_step_together(pipeline: StableDiffusionPipeline) -> None:
    samplers = Ddpm(dict(pipeline.scheduler.config))
    wanted: list[tuple[SamplerName, int]] = [("ddim", 5), ("euler", 9), ("euler_a", 4), ("dpm++_2m", 16)]
    found = sample(pipeline, [samplers.schedule(name, steps) for name, steps in wanted], [0, 1, 2, 3], 3.0)
    for row, (name, steps) in enumerate(wanted):
        expected = reference(pipeline, name, steps, seed=row)[0]
        assert (found[row] - expected).abs().max() <= tolerance(samplers.schedule(name, steps), expected), name


def test_a_schedule_of_any_length_is_finite(tmp_path: Path) -> None:
    config = dict(tiny_pipeline(tmp_path, "v_prediction").scheduler.config) | ZERO_SNR
    samplers = Ddpm(config)
    for steps in range(1, 151):
        for name in CLASSES:
            assert samplers.schedule(name, steps).steps in (steps, steps + 1)


@pytest.mark.parametrize(("steps", "strength"), [(1000, None), (5000, None), (4, 0.1)])
def test_steps_that_a_schedule_cannot_take_are_refused(tmp_path: Path, steps: int, strength: float | None) -> None:
    samplers = Ddpm(dict(tiny_pipeline(tmp_path).scheduler.config))
    with pytest.raises(UserError, match=f"steps {steps}"):
        samplers.schedule("ddim", steps, strength)
