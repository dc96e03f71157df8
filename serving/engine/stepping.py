"""One denoising step of one batch: a forward of its rows, then each sample's step of its own schedule."""

import time
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from serving.config import EngineSpec
from serving.engine.forward import Forward
from serving.engine.job import EngineStats, Sample
from serving.engine.samplers import ScheduleLines
from serving.engine.scheduler import Scheduler
from serving.engine.tiers.adapters import Adapters
from training.base.base import Base


class Stepper:
    """Keeps the last forward of every kind, so that samples which go on together are laid out once."""

    def __init__(
        self, base: Base, spec: EngineSpec, adapters: Adapters, scheduler: Scheduler[Sample], stats: EngineStats
    ) -> None:
        self._base = base
        self._spec = spec
        self._adapters = adapters
        self._scheduler = scheduler
        self._stats = stats
        self._forwards: dict[tuple[Hashable, ...], Forward] = {}

    def step(self, batch: Sequence[Sample]) -> None:
        """One forward of the batch, and its step; if it raises, no sample has changed."""
        forward = self.forward(batch)
        order = forward.order
        began = time.perf_counter()
        with self._stats.timed("denoise"):
            lines = ScheduleLines.gather([s.job.schedule for s in order], [s.step for s in order], self._base.device)
            latents_NCHW = torch.stack([sample.at for sample in order])
            output_NCHW = forward(self._base, self._adapters.bank, latents_NCHW, lines)
            first = order[0]  # if it is wide, it is alone
            if first.wide and first.plain is None:
                first.plain = output_NCHW[0]
            else:
                self._advance(order, lines, latents_NCHW, output_NCHW)
            if self._base.device.type == "cuda":  # waits for the device: else many steps would be queued on it
                torch.cuda.synchronize(self._base.device)
        rows = sum(sample.rows for sample in order)
        self._scheduler.pace.saw(batch[0].kind, rows, time.perf_counter() - began)
        self._stats.steps += 1
        self._stats.rows += forward.rows

    def forget(self, kind: tuple[Hashable, ...]) -> None:
        """Drops the forward of a kind: one of its samples has left."""
        self._forwards.pop(kind, None)

    def forward(self, batch: Sequence[Sample]) -> Forward:
        """The forward of these samples: the last one of their kind, if it is of the same samples and bank's layers."""
        kind, layout = batch[0].kind, self._adapters.bank.layout
        forward = self._forwards.get(kind)
        same = forward is not None and forward.layout is layout and set(forward.order) == set(batch)
        if forward is None or not same or batch[0].wide:  # a wide image's forwards alternate between its prompts
            fixed_rows = self._scheduler.step_rows(batch[0].cells) if self._spec.fixed_rows else None
            forward = Forward.make(
                batch, self._adapters.bank, self._base, empty=self._adapters.empty, fixed_rows=fixed_rows
            )
            self._forwards[kind] = forward
        return forward

    def _advance(
        self, order: Sequence[Sample], lines: ScheduleLines, latents_NCHW: Tensor, output_NCHW: Tensor
    ) -> None:
        """Takes the samples' steps by their predictions; those of a wide one are guided here."""
        plain_CHW = order[0].plain
        if plain_CHW is not None:
            output_NCHW = plain_CHW + order[0].job.request.guidance_scale * (output_NCHW - plain_CHW)
        before_NCHW = torch.stack([sample.guess for sample in order])
        latents_NCHW, clean_NCHW = lines.step(latents_NCHW, output_NCHW, before_NCHW, self._fresh_noise(order))
        for sample, latents, clean in zip(order, latents_NCHW, clean_NCHW, strict=True):
            sample.latents, sample.clean, sample.plain = latents, clean, None
            sample.step += 1

    def _fresh_noise(self, samples: Sequence[Sample]) -> Tensor | None:
        """What ancestral samplers add, [N, C, h, w]; zero for rows of the others, None if nobody draws."""
        if not any(sample.job.schedule.draws for sample in samples):
            return None
        channels = self._base.facts.channels
        blank = torch.zeros(channels, *samples[0].size)
        noise = [sample.draw(channels) if sample.job.schedule.draws else blank for sample in samples]
        return torch.stack(noise).to(self._base.device)
