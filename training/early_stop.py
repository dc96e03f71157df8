"""When a subject may stop: its loss on one fixed batch no longer varies (DVAR, Voronov et al., NeurIPS 2023).

The loss of a training step says little, because its images, noise and timesteps are drawn anew; on a batch that never
changes the learning itself is what is left. All subjects that are looked at share one forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from training.bank import Bank
from training.base import Base
from training.choose import has_settled
from training.latents import LatentSet
from training.loss import add_noise, row_losses, target
from training.manifest import SubjectSpec
from training.stream import shuffled, stream

EVERY = 10  # steps between looks; a look costs a forward of ROWS rows
ROWS = 8


@dataclass
class _Fixed:
    """A subject's batch, the same at every look, and the losses so far."""

    spec: SubjectSpec
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: list[str]
    losses: list[float] = field(default_factory=list)


class Watch:
    """The subjects of a pack that asked for an early stop. Looks start over when a subject resumes."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._fixed: dict[str, _Fixed] = {}

    def join(self, spec: SubjectSpec, images: LatentSet) -> None:
        """Draws the subject's fixed batch; nothing happens for one that did not ask."""
        if not spec.evaluate.early_stop:
            return
        generator = stream(spec.train.seed, "fixed")
        picked = shuffled(spec.train.seed, "fixed", len(images), 0, ROWS)
        latents = images.draw(picked, generator)
        steps = len(self._base.alphas_cumprod)
        # evenly spread, so that no look depends on which noise levels were drawn
        timesteps = ((torch.arange(ROWS) + 0.5) / ROWS * steps).long()
        noise = torch.randn(latents.shape, generator=generator)
        self._fixed[spec.id] = _Fixed(spec, latents, noise, timesteps, [images.prompts[index] for index in picked])

    def leave(self, id: str) -> None:
        self._fixed.pop(id, None)

    def is_due(self, id: str, step: int) -> bool:
        return id in self._fixed and step % EVERY == 0

    @torch.no_grad()
    def settled(self, bank: Bank, wearing: Mapping[str, tuple[int, float]]) -> list[str]:
        """Looks at the subjects in `wearing` (slot and scale each) and answers those that may stop."""
        for id, loss in self._look(bank, wearing).items():
            self._fixed[id].losses.append(loss)
        return [id for id in wearing if self._has_settled(self._fixed[id])]

    def _has_settled(self, fixed: _Fixed) -> bool:
        asked = fixed.spec.evaluate
        window = max(2, asked.early_stop_window // EVERY)
        return has_settled(fixed.losses, window=window, share=asked.early_stop_variance)

    def _look(self, bank: Bank, wearing: Mapping[str, tuple[int, float]]) -> dict[str, float]:
        """The mean loss of each subject on its batch."""
        base, batches = self._base, [self._fixed[id] for id in wearing]
        slots = torch.tensor([[slot] for slot, _ in wearing.values() for _ in range(ROWS)])
        scales = torch.tensor([[scale] for _, scale in wearing.values() for _ in range(ROWS)])
        wide = bank.weights_SP.dtype
        latents = torch.cat([batch.latents for batch in batches]).to(base.device, wide)
        noise = torch.cat([batch.noise for batch in batches]).to(base.device, wide)
        timesteps = torch.cat([batch.timesteps for batch in batches])
        alphas = base.alphas_cumprod[timesteps].to(base.device, wide)
        goal = target(base.prediction_type, latents, noise, alphas)
        with bank.using(*(bank.route(component, slots, scales, base.dtype) for component in bank.sites)):
            embeddings = base.encode_prompts([prompt for batch in batches for prompt in batch.prompts])
            noisy = add_noise(latents, noise, alphas).to(base.dtype)
            said = base.unet(noisy, timesteps.to(base.device), encoder_hidden_states=embeddings).sample
        means = row_losses(said, goal).reshape(len(batches), ROWS).mean(1).tolist()
        return dict(zip(wearing, means, strict=True))
