"""One denoiser forward over samples that each have their own timestep, adapters, prompt and guidance.

A `Forward` holds what stays the same while the same samples step together: their embeddings, guidance and the bank's
routes. A guided sample is two neighbouring rows, negative prompt and prompt (a wide one has one row in each
of two forwards); guided samples come first, the rows of the prompts of regions last. Samples are in the order of their
slots: rows that wear the same share one delta, and slots without a gap are not even copied.

Shape suffixes: N samples, G guided ones, M rows; L tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.covering import cover_rows
from serving.engine.job import Sample
from serving.engine.own_prompts import OwnPrompts
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
    weights: tuple[tuple[float, ...], ...]  # of the samples' adapters
    own: OwnPrompts

    @classmethod
    def make(
        cls, samples: Sequence[Sample], bank: Bank, base: Base, *, empty: int, fixed_rows: int | None
    ) -> "Forward":
        """The forward of samples that have started.

        `empty` is the bank's slot of zeros; `fixed_rows` pads the forward with rows that nobody reads.
        """
        order = sorted(samples, key=lambda sample: (not sample.paired, sample.slots or ()))
        guided = sum(sample.paired for sample in order)
        rows = [sample for sample in order[:guided] for _ in range(2)] + order[guided:]
        conds = [cond for sample in order for cond in sample.conds]
        slots: list[tuple[int, ...]] = [sample.slots or () for sample in rows]
        weights: list[tuple[float, ...]] = [sample.weights for sample in rows]
        places = [row for sample in order for row in sample.places]
        pictures = [None if sample.job.where is None else sample.job.where.at(sample.size) for sample in rows]
        own = OwnPrompts.of(order, base.device)
        rows, conds = rows + [row.sample for row in own.rows], conds + [row.cond for row in own.rows]
        slots, weights = slots + [row.slots for row in own.rows], weights + [row.weights for row in own.rows]
        fill = max(0, (fixed_rows or 0) - len(rows))
        conds += conds[:1] * fill
        shown = [one for sample in order for one in sample.image_prompts] + [row.image_prompts for row in own.rows]
        facts = [
            RowFacts(guidance=sample.job.request.guidance_scale, image_prompts=one)
            for sample, one in zip(rows, shown, strict=True)
        ]
        facts += [RowFacts(guidance=facts[0].guidance)] * fill
        routes = make_routes(bank, [base.facts.denoiser], slots + [()] * fill, weights + [()] * fill, empty)
        everywhere = [None] * (len(own.rows) + fill)
        further = order[0].more_cells
        routes = cover_rows(routes, bank, base, [*pictures, *everywhere], [*places, *everywhere], further)
        guidance = torch.tensor([sample.job.request.guidance_scale for sample in order[:guided]])
        return cls(
            order=tuple(order),
            rows=len(rows) + fill,
            conds=tuple(conds),
            facts=tuple(facts),
            guidance_G=guidance.to(base.device).view(-1, 1, 1, 1),
            routes=tuple(routes),
            layout=bank.layout,
            weights=tuple(sample.weights for sample in order),
            own=own,
        )

    def fits(self, layout: Layout) -> bool:
        """Whether it serves its samples' next step, too: on a bank of `layout`, if no weight has changed since."""
        return self.layout is layout and all(
            sample.weights == weights for sample, weights in zip(self.order, self.weights, strict=True)
        )

    def __call__(self, base: Base, bank: Bank, latents_NCHW: Tensor, lines: ScheduleLines) -> Tensor:
        """The guided prediction [N, C, h, w] in float32, for scaled latents in `order`; of wide samples their row's."""
        guided = len(self.guidance_G)
        x_MCHW = self._rows(lines.model_input(latents_NCHW))
        with bank.using(*self.routes):
            times_M = self._rows(lines.timesteps_N)
            output = base.predict(x_MCHW.to(base.dtype), times_M, self.conds, self._steered()).float()
        plain, prompted = output[: 2 * guided].unflatten(0, (guided, 2)).unbind(1)
        after = guided + len(self.order)
        said = self.own.blend(torch.cat([prompted, output[2 * guided : after]]), output[after:])
        pushed = plain + self.guidance_G * (said[:guided] - plain)
        return torch.cat([pushed, said[guided:]])

    def _steered(self) -> tuple[RowFacts, ...]:
        """`facts` with the ControlNets of this step; rows that nobody reads have none."""
        steers = [sample.steers for sample in self.order]
        if not any(steers):
            return self.facts
        guided = len(self.guidance_G)
        of_rows = [one for one in steers[:guided] for _ in range(2)] + steers[guided:]
        of_rows += [row.sample.steers for row in self.own.rows]
        facts = zip(self.facts, of_rows, strict=False)
        return (*(fact._replace(steers=one) for fact, one in facts), *self.facts[len(of_rows) :])

    def _rows(self, samples_NX: Tensor) -> Tensor:
        """One line a sample, laid out as rows."""
        guided = len(self.guidance_G)
        rows = torch.cat([samples_NX[:guided].repeat_interleave(2, 0), samples_NX[guided:]])
        if self.own.rows:
            rows = torch.cat([rows, samples_NX[self.own.of_E]])
        fill = self.rows - len(rows)
        return torch.cat([rows, rows.new_zeros((fill, *rows.shape[1:]))]) if fill else rows
