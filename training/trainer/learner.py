"""What learns: the weights a step reads, and what a backward and an optimizer step do to them.

`LocalLearner` keeps all of it on one device; `zero.py` has the one that is spread over several.
Shape suffixes: M members that are due, S slots, P parameters of a slot.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from training.adapters.bank import Bank
from training.manifest.subject import TrainSpec
from training.trainer.member import Member
from training.trainer.optimizer import OptimizerState, SlotOptimizer, make_optimizers

Rates = Sequence[tuple[slice, float]]  # learning rates by column range


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

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes."""

    def step(self, due: Sequence[Member], rates: Mapping[int, Rates]) -> list[float]:
        """Clips and applies the gradients of the members and forgets them; returns each one's norm before clipping.

        Where a norm is not finite nothing is applied.
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

    def total(self, values: Sequence[float]) -> list[float]:
        """See `Learner`."""
        return list(values)

    def step(self, due: Sequence[Member], rates: Mapping[int, Rates]) -> list[float]:
        """See `Learner`."""
        gradient_SP = self._gradient()
        slots = torch.tensor([member.slot for member in due], device=gradient_SP.device)
        unscale = gradient_SP.new_tensor([1 / member.loss_scale for member in due])
        norms_M = gradient_SP[slots].norm(dim=1) * unscale
        limits = gradient_SP.new_tensor([member.train.max_grad_norm or math.inf for member in due])
        clip = (limits / (norms_M + 1e-6)).clamp(max=1.0)
        gradient_SP[slots] *= (clip * unscale)[:, None]
        norms = norms_M.tolist()
        ready = [member for member, norm in zip(due, norms, strict=True) if math.isfinite(norm)]
        for name in {member.train.optimizer for member in ready}:
            these = [member for member in ready if member.train.optimizer == name]
            self._optimizers[name].step([m.slot for m in these], {m.slot: rates[m.slot] for m in these})
        gradient_SP[slots] = 0
        return norms

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
