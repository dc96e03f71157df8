"""What learns: the weights a step reads, and what a backward and an optimizer step do to them.

`LocalLearner` keeps all of it on one device; `zero.py` has the one that is spread over several.
Shape suffixes: M members that are due, S slots, P parameters of a slot.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from training.adapters.bank import Bank
from training.base.transfer import constant
from training.manifest.subject import TrainSpec
from training.trainer.member import Member
from training.trainer.optimizer import OptimizerState, Rates, SlotOptimizer, make_optimizers


class StepOutcome(NamedTuple):
    """What the host learns of a step: both losses of every member, over all processes, and the norms of those due.

    Norms are of gradients before clipping.
    """

    instance: list[float]
    prior: list[float]
    norms: list[float]


class Learner(Protocol):
    """The weights of a bank's slots and how they are trained."""

    def join(self, slot: int, spec: TrainSpec, state: OptimizerState | None) -> None:
        """Starts to train a slot that has just been filled; `state` is its optimizer's."""

    def leave(self, slot: int, spec: TrainSpec) -> None:
        """Forgets a slot."""

    def weights(self) -> Tensor:
        """The weights [S, P]; gradients flow from them to what is trained."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of a loss; `last` of the optimizer step's micro-batches."""

    def numbers(self, due: Sequence[Member], rates: Rates) -> list[Tensor]:
        """What the members' next step takes beside gradients, on the CPU: it travels with the batch."""

    def step(
        self,
        losses_2M: Tensor,
        due: Mapping[int, Member],
        rates: Rates,
        numbers: Sequence[Tensor],
    ) -> StepOutcome:
        """Clips and applies the gradients of the members that are due, by their place among all M, and forgets them.

        `losses_2M` are the losses of all in this process. Where a member's loss or norm is not finite nothing is
        applied. The host waits here for the device, once.
        """

    def restart(self) -> None:
        """Forgets all gradients."""

    def state(self, slot: int, spec: TrainSpec) -> OptimizerState:
        """What the slot's optimizer remembers."""

    def show(self) -> None:
        """Writes what has been learned into the bank's slots, if it is not there already."""


class LocalLearner:
    """The bank's own buffer is what is trained; each optimizer of the manifest is made when it is first asked for."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        bank.weights_SP.requires_grad_(True)
        bank.weights_SP.grad = torch.zeros_like(bank.weights_SP)
        self._makers = make_optimizers(bank.weights_SP)
        self._optimizers: dict[str, SlotOptimizer] = {}

    def join(self, slot: int, spec: TrainSpec, state: OptimizerState | None) -> None:
        """See `Learner`."""
        self._optimizer(spec).join(slot, spec, state)

    def leave(self, slot: int, spec: TrainSpec) -> None:
        """See `Learner`."""
        self._optimizer(spec).leave(slot)
        self._gradient()[slot].zero_()

    def weights(self) -> Tensor:
        """See `Learner`."""
        return self._bank.weights_SP

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Learner`."""
        loss.backward()

    def numbers(self, due: Sequence[Member], rates: Rates) -> list[Tensor]:
        """See `Learner`: a tensor for each optimizer that is due, by name."""
        return [
            self._optimizers[name].numbers([m.slot for m in these], rates) for name, these in _by_optimizer(due).items()
        ]

    @torch.no_grad()
    def step(
        self,
        losses_2M: Tensor,
        due: Mapping[int, Member],
        rates: Rates,
        numbers: Sequence[Tensor],
    ) -> StepOutcome:
        """See `Learner`."""
        if not due:
            instance, prior = losses_2M.tolist()
            return StepOutcome(instance, prior, [])
        gradient_SP = self._gradient()
        members = list(due.values())
        slots = constant(tuple(member.slot for member in members), torch.long, gradient_SP.device)
        every = len(members) == gradient_SP.shape[0]  # members are in the order of their slots: no copy
        gradient_DP = gradient_SP if every else gradient_SP[slots]
        unscale = _like(gradient_SP, [1 / member.loss_scale for member in members])
        norms_D = gradient_DP.norm(dim=1) * unscale
        places = constant(tuple(due), torch.long, losses_2M.device)
        sound_D = norms_D.isfinite() & losses_2M.sum(0)[places].isfinite()
        limits = _like(gradient_SP, [member.train.max_grad_norm or math.inf for member in members])
        clip = (limits / (norms_D + 1e-6)).clamp(max=1.0)
        scale_D = torch.where(sound_D, clip * unscale, 0.0)
        gradient_DP.masked_fill_(~sound_D[:, None], 0.0).mul_(scale_D[:, None])
        if not every:
            gradient_SP[slots] = gradient_DP
        for (name, these), values in zip(_by_optimizer(members).items(), numbers, strict=True):
            sound_E = sound_D
            if len(these) < len(members):
                sound_E = sound_D[constant(tuple(map(members.index, these)), torch.long, sound_D.device)]
            self._optimizers[name].step([m.slot for m in these], rates, values, sound_E)
        gradient_SP.zero_() if every else gradient_SP.index_fill_(0, slots, 0.0)
        count = losses_2M.shape[1]
        read = torch.cat([losses_2M.flatten().double(), norms_D.double()]).tolist()
        instance, prior, norms = read[:count], read[count : 2 * count], read[2 * count :]
        for (place, member), norm in zip(due.items(), norms, strict=True):
            if not math.isfinite(instance[place] + prior[place] + norm):
                self._optimizer(member.train).retract(member.slot)
        return StepOutcome(instance, prior, norms)

    def restart(self) -> None:
        """See `Learner`."""
        self._gradient().zero_()

    def state(self, slot: int, spec: TrainSpec) -> OptimizerState:
        """See `Learner`."""
        return self._optimizer(spec).state(slot)

    def show(self) -> None:
        """Nothing to do: the bank's slots are what is trained."""

    def _optimizer(self, spec: TrainSpec) -> SlotOptimizer:
        if spec.optimizer not in self._optimizers:
            self._optimizers[spec.optimizer] = self._makers[spec.optimizer]()
        return self._optimizers[spec.optimizer]

    def _gradient(self) -> Tensor:
        assert self._bank.weights_SP.grad is not None
        return self._bank.weights_SP.grad


def _by_optimizer(members: Iterable[Member]) -> dict[str, list[Member]]:
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(member.train.optimizer, []).append(member)
    return found


def _like(tensor: Tensor, values: Sequence[float]) -> Tensor:
    return constant(tuple(values), tensor.dtype, tensor.device)
