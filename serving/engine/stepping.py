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
            lines = ScheduleLines.gather([s.schedule for s in order], [s.step for s in order], self._base.device)
            latents_NCHW = torch.stack([sample.at for sample in order])
            output_NCHW = forward(self._base, self._adapters.bank, latents_NCHW, lines)
            if any(sample.wide for sample in order):
                self._advance_wide(order, lines, latents_NCHW, output_NCHW)
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
        turns = any(sample.wide for sample in batch)  # a wide image's forwards take turns with its prompts
        if forward is None or not same or turns:
            fixed_rows = self._scheduler.step_rows(batch[0].cells) if self._spec.fixed_rows else None
            forward = Forward.make(
                batch, self._adapters.bank, self._base, empty=self._adapters.empty, fixed_rows=fixed_rows
            )
            self._forwards[kind] = forward
        return forward

    def _advance_wide(
        self, order: Sequence[Sample], lines: ScheduleLines, latents_NCHW: Tensor, output_NCHW: Tensor
    ) -> None:
        """Takes the steps of the samples whose last row this was; wide ones that lack rows keep what it said."""
        outputs = [
            sample.combined(output_CHW) if sample.wide else output_CHW
            for sample, output_CHW in zip(order, output_NCHW, strict=True)
        ]
        ready = [n for n, output_CHW in enumerate(outputs) if output_CHW is not None]
        if ready:
            found_NCHW = torch.stack([output_CHW for output_CHW in outputs if output_CHW is not None])
            some = ScheduleLines(lines.coefficients_NK[ready])
            self._advance([order[n] for n in ready], some, latents_NCHW[ready], found_NCHW)
        for sample, output_CHW, found_CHW in zip(order, output_NCHW, outputs, strict=True):
            sample.said = [] if found_CHW is not None else [*sample.said, output_CHW]

    def _advance(
        self, order: Sequence[Sample], lines: ScheduleLines, latents_NCHW: Tensor, output_NCHW: Tensor
    ) -> None:
        """Takes the samples' steps by their guided predictions."""
        before_NCHW = torch.stack([sample.guess for sample in order])
        latents_NCHW, clean_NCHW = lines.step(latents_NCHW, output_NCHW, before_NCHW, self._fresh_noise(order))
        for sample, latents, clean in zip(order, latents_NCHW, clean_NCHW, strict=True):
            if sample.kept is not None:
                signal, noise = sample.schedule.after_T2[sample.step].tolist()
                latents = sample.kept.put_back(latents, signal, noise)
            sample.latents, sample.clean = latents, clean
            sample.step += 1

    def _fresh_noise(self, samples: Sequence[Sample]) -> Tensor | None:
        """What ancestral samplers add, [N, C, h, w]; zero for rows of the others, None if nobody draws."""
        if not any(sample.schedule.draws for sample in samples):
            return None
        channels = self._base.facts.channels
        blank = torch.zeros(channels, *samples[0].size)
        noise = [sample.draw(channels) if sample.schedule.draws else blank for sample in samples]
        return torch.stack(noise).to(self._base.device)
