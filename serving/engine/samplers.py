"""One sampler step of a batch whose rows each have their own sampler, number of steps and position.

Every sampler's step is one line of its request's table (`training.base.noise`); a batch gathers one line a row. Knows
nothing about adapters, prompts or requests. Shape suffixes: N rows, K coefficients; CHW a latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.base.noise.process import BEFORE, CLEAN, CLEAN_OUT, CLEAN_X, INPUT, NOISE, OUT, TIMESTEP, Schedule, X


@dataclass(frozen=True, slots=True)
class ScheduleLines:
    """One line of each row's table, on the device of the latents."""

    coefficients_NK: Tensor

    @classmethod
    def gather(cls, schedules: Sequence[Schedule], steps: Sequence[int], device: torch.device) -> "ScheduleLines":
        """Line `steps[n]` of `schedules[n]` for each row n, on `device`."""
        lines = torch.stack([schedule.table_TK[step] for schedule, step in zip(schedules, steps, strict=True)])
        return cls(lines.to(device, non_blocking=True))

    @property
    def timesteps_N(self) -> Tensor:
        """The time of each row, as the denoiser takes it."""
        return self.coefficients_NK[:, TIMESTEP]

    def model_input(self, latents_NCHW: Tensor) -> Tensor:
        """The latents [N, C, h, w] scaled as the denoiser takes them."""
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
        return self.coefficients_NK[:, index].view(-1, 1, 1, 1)
