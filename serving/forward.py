"""One denoiser forward over samples that each have their own timestep, adapters, prompt and guidance.

A `Forward` holds what stays the same while the same samples step together: their embeddings, guidance and the bank's
routes. Rows are laid out as [negative prompts of the guided samples | prompts of all samples], guided samples first.

Shape suffixes: N samples, G guided ones, M rows; L tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.job import Sample
from serving.prompts import make_routes
from serving.samplers import Lines
from training.bank import Bank, Route
from training.base import Base


@dataclass(frozen=True, slots=True)
class Forward:
    """What samples of one size need to step together. `order` are the samples, guided first."""

    order: tuple[Sample, ...]
    rows: int
    states_MLC: Tensor
    guidance_G: Tensor
    routes: tuple[Route, ...]

    @classmethod
    def make(
        cls, samples: Sequence[Sample], bank: Bank, base: Base, *, empty: int, fixed_rows: int | None
    ) -> "Forward":
        """`empty` is the bank's slot of zeros; `fixed_rows` fills the forward up with rows that nobody reads."""
        order = sorted(samples, key=lambda sample: not sample.job.guided)
        guided = [sample for sample in order if sample.job.guided]
        rows = [*guided, *order]
        states = [_states(sample)[1] for sample in guided] + [_states(sample)[0] for sample in order]
        fill = max(0, (fixed_rows or 0) - len(rows))
        states += [torch.zeros_like(states[0])] * fill
        slots: list[tuple[int, ...]] = [sample.slots or () for sample in rows]
        weights: list[tuple[float, ...]] = [sample.job.weights for sample in rows]
        routes = make_routes(bank, [base.family.denoiser], slots + [()] * fill, weights + [()] * fill, empty)
        guidance = torch.tensor([sample.job.request.guidance_scale for sample in guided])
        return cls(
            order=tuple(order),
            rows=len(rows) + fill,
            states_MLC=torch.stack(states),
            guidance_G=guidance.to(base.device).view(-1, 1, 1, 1),
            routes=tuple(routes),
        )

    def __call__(self, base: Base, bank: Bank, latents_NCHW: Tensor, lines: Lines) -> Tensor:
        """The guided prediction [N, C, h, w] in float32, for scaled latents in `order`."""
        guided = len(self.guidance_G)
        x = lines.model_input(latents_NCHW)
        x_MCHW = torch.cat([x[:guided], x])
        timesteps_M = torch.cat([lines.timesteps_N[:guided], lines.timesteps_N])
        if fill := self.rows - len(x_MCHW):
            x_MCHW = torch.cat([x_MCHW, x_MCHW.new_zeros((fill, *x_MCHW.shape[1:]))])
            timesteps_M = torch.cat([timesteps_M, timesteps_M.new_zeros(fill)])
        with bank.using(*self.routes):
            output = base.unet(x_MCHW.to(base.dtype), timesteps_M, encoder_hidden_states=self.states_MLC).sample.float()
        plain, prompted = output[:guided], output[guided : guided + len(self.order)]
        if not guided:
            return prompted
        pushed = plain + self.guidance_G * (prompted[:guided] - plain)
        return torch.cat([pushed, prompted[guided:]])


def _states(sample: Sample) -> tuple[Tensor, Tensor]:
    assert sample.job.states is not None
    prompt, negative = sample.job.states
    return prompt, prompt if negative is None else negative
