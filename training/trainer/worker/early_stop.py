"""When a subject may stop: its loss on one fixed batch no longer varies (DVAR, Voronov et al., NeurIPS 2023).

The loss of a training step says little, because its images, noise and timesteps are drawn anew; on a batch that never
changes, only what the subject has learned changes it. All subjects that are looked at share forwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from training.adapters.bank import Bank
from training.base.base import Base
from training.base.family import RowFacts
from training.base.noise.process import row_losses
from training.base.stream import shuffled, stream
from training.evaluation.choose import has_settled
from training.manifest.subject import SubjectSpec
from training.trainer.latents import LatentSet, same_sizes

EVERY = 10  # steps between looks; a look costs a forward of ROWS rows
ROWS = 8


@dataclass
class _Fixed:
    """A subject's batch, the same at every look, and the losses so far."""

    spec: SubjectSpec
    latents: list[Tensor]  # [C, h, w] each
    noise: list[Tensor]
    places: list[float]
    prompts: list[str]
    rows: list[RowFacts]
    losses: list[float] = field(default_factory=list)


class Watch:
    """The subjects of a pack that asked for an early stop. Looks start over when a subject resumes."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._fixed: dict[str, _Fixed] = {}

    def join(self, id: str, spec: SubjectSpec, images: LatentSet) -> None:
        """Begins to look at a subject: draws its fixed batch."""
        generator = stream(spec.train.seed, "fixed")
        picked = shuffled(spec.train.seed, "fixed", len(images), 0, ROWS)
        latents = images.draw(picked, generator)
        # evenly spread, so that no look depends on which noise levels were drawn
        places = self._base.process.spread(ROWS)
        noise = [torch.randn(latent.shape, generator=generator) for latent in latents]
        prompts = [images.prompts[index] for index in picked]
        rows = [images.images[index].row for index in picked]
        self._fixed[id] = _Fixed(spec, latents, noise, places, prompts, rows)

    def leave(self, id: str) -> None:
        """Forgets a subject."""
        self._fixed.pop(id, None)

    def is_due(self, id: str, step: int) -> bool:
        """Whether the subject asked for early stop and is to be looked at after this step."""
        return id in self._fixed and step % EVERY == 0

    @torch.no_grad()
    def settled(self, bank: Bank, wearing: Mapping[str, tuple[int, float]]) -> list[str]:
        """Looks at the subjects in `wearing` (slot and scale each) and returns those that may stop."""
        for id, loss in self._look(bank, wearing).items():
            self._fixed[id].losses.append(loss)
        return [id for id in wearing if self._has_settled(self._fixed[id])]

    def _has_settled(self, fixed: _Fixed) -> bool:
        asked = fixed.spec.evaluate
        window = max(2, asked.early_stop_window // EVERY)
        return has_settled(fixed.losses, window=window, share=asked.early_stop_variance)

    def _look(self, bank: Bank, wearing: Mapping[str, tuple[int, float]]) -> dict[str, float]:
        """The mean loss of each subject on its batch."""
        batches = [self._fixed[id] for id in wearing]
        losses_N = torch.zeros(ROWS * len(batches))
        latents = [latent for batch in batches for latent in batch.latents]
        for places in same_sizes(latents):
            rows = [(list(wearing.values())[place // ROWS], batches[place // ROWS], place % ROWS) for place in places]
            losses_N[places] = self._losses(bank, rows).float().cpu()
        return dict(zip(wearing, losses_N.reshape(-1, ROWS).mean(1).tolist(), strict=True))

    def _losses(self, bank: Bank, rows: Sequence[tuple[tuple[int, float], _Fixed, int]]) -> Tensor:
        """The losses of rows of one size: each (slot and scale), batch and place in it."""
        base, wide = self._base, bank.weights_SP.dtype
        slots = torch.tensor([[slot] for (slot, _), _, _ in rows])
        scales = torch.tensor([[scale] for (_, scale), _, _ in rows])
        latents = torch.stack([batch.latents[place] for _, batch, place in rows]).to(base.device, wide)
        noise = torch.stack([batch.noise[place] for _, batch, place in rows]).to(base.device, wide)
        levels = base.process.levels([batch.places[place] for _, batch, place in rows], wide).on(base.device)
        goal = levels.target(latents, noise)
        with bank.using(*(bank.route(component, slots, scales, base.dtype) for component in bank.sites)):
            words = [bank.words(slot) for (slot, _), _, _ in rows]
            conds = base.encode([batch.prompts[place] for _, batch, place in rows], words)
            facts = [batch.rows[place] for _, batch, place in rows]
            said = base.predict(levels.noisy(latents, noise).to(base.dtype), levels.times_N, conds, facts)
        return row_losses(said, goal)
