"""One denoiser forward over samples that each have their own timestep, adapters, prompt and guidance.

A `Forward` holds what stays the same while the same samples step together: their embeddings, guidance and the bank's
routes. A guided sample is two neighbouring rows, negative prompt and prompt (a wide one has one row in each
of two forwards); guided samples come first. Samples are in the order of their slots: rows that wear the same share one
delta, and slots without a gap are not even copied.

Shape suffixes: N samples, G guided ones, M rows; L tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.job import Sample
from serving.engine.prompts import make_routes
from serving.engine.samplers import ScheduleLines
from training.adapters.bank import Bank, Route
from training.adapters.layout import Layout
from training.base.base import Base
from training.base.family import Cond, RowFacts


@dataclass(frozen=True, slots=True)
class Forward:
    """What samples of one kind need to step together. `order` are the samples, guided first.

    `layout` is the bank's when the routes were made: in another one they would keep its old weights in memory.
    """

    order: tuple[Sample, ...]
    rows: int
    conds: tuple[Cond, ...]
    facts: tuple[RowFacts, ...]
    guidance_G: Tensor
    routes: tuple[Route, ...]
    layout: Layout

    @classmethod
    def make(
        cls, samples: Sequence[Sample], bank: Bank, base: Base, *, empty: int, fixed_rows: int | None
    ) -> "Forward":
        """The forward of samples that have started.

        `empty` is the bank's slot of zeros; `fixed_rows` pads the forward with rows that nobody reads.
        """
        order = sorted(samples, key=lambda sample: (sample.rows == 1, sample.slots or ()))
        guided = sum(sample.rows == 2 for sample in order)
        rows = [sample for sample in order[:guided] for _ in range(2)] + order[guided:]
        conds = [cond for sample in order for cond in sample.conds]
        fill = max(0, (fixed_rows or 0) - len(rows))
        conds += conds[:1] * fill
        pictures = [shown for sample in order for shown in sample.image_prompts]
        facts = [
            RowFacts(guidance=sample.job.request.guidance_scale, image_prompts=shown)
            for sample, shown in zip(rows, pictures, strict=True)
        ]
        facts += [RowFacts(guidance=facts[0].guidance)] * fill
        slots: list[tuple[int, ...]] = [sample.slots or () for sample in rows]
        weights: list[tuple[float, ...]] = [sample.job.weights for sample in rows]
        routes = make_routes(bank, [base.facts.denoiser], slots + [()] * fill, weights + [()] * fill, empty)
        guidance = torch.tensor([sample.job.request.guidance_scale for sample in order[:guided]])
        return cls(
            order=tuple(order),
            rows=len(rows) + fill,
            conds=tuple(conds),
            facts=tuple(facts),
            guidance_G=guidance.to(base.device).view(-1, 1, 1, 1),
            routes=tuple(routes),
            layout=bank.layout,
        )

    def __call__(self, base: Base, bank: Bank, latents_NCHW: Tensor, lines: ScheduleLines) -> Tensor:
        """The guided prediction [N, C, h, w] in float32, for scaled latents in `order`; of wide samples their row's."""
        guided = len(self.guidance_G)
        x_MCHW = self._rows(lines.model_input(latents_NCHW))
        with bank.using(*self.routes):
            times_M = self._rows(lines.timesteps_N)
            output = base.predict(x_MCHW.to(base.dtype), times_M, self.conds, self._steered()).float()
        plain, prompted = output[: 2 * guided].unflatten(0, (guided, 2)).unbind(1)
        pushed = plain + self.guidance_G * (prompted - plain)
        return torch.cat([pushed, output[2 * guided : guided + len(self.order)]])

    def _steered(self) -> tuple[RowFacts, ...]:
        """`facts` with the ControlNets of this step; rows that nobody reads have none."""
        steers = [sample.steers for sample in self.order]
        if not any(steers):
            return self.facts
        guided = len(self.guidance_G)
        of_rows = [one for one in steers[:guided] for _ in range(2)] + steers[guided:]
        facts = zip(self.facts, of_rows, strict=False)
        return (*(fact._replace(steers=one) for fact, one in facts), *self.facts[len(of_rows) :])

    def _rows(self, samples_NX: Tensor) -> Tensor:
        """One line a sample, laid out as rows."""
        guided = len(self.guidance_G)
        rows = torch.cat([samples_NX[:guided].repeat_interleave(2, 0), samples_NX[guided:]])
        fill = self.rows - len(rows)
        return torch.cat([rows, rows.new_zeros((fill, *rows.shape[1:]))]) if fill else rows
