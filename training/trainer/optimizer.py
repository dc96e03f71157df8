"""Optimizers over a bank: every slot has its own step, learning rates and settings.

`SlotAdamW` is torch's AdamW, vectorised over slots: the same arithmetic, so a subject equals its single run. `PerSlot`
runs an ordinary optimizer per slot, for those that cannot be vectorised (8-bit, Prodigy).
Shape suffixes: S slots, P parameters of a slot, D slots that are due.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from training.errors import SubjectFailed
from training.manifest.subject import TrainSpec


@dataclass(slots=True)
class OptimizerState:
    """What one slot's optimizer remembers: rows laid out like the slot, tensors of other shapes, and numbers."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


class SlotOptimizer(Protocol):
    """What a pack asks of an optimizer. `rates_P` of `step` are learning rates by column range."""

    def join(self, slot: int, spec: TrainSpec, state: OptimizerState | None) -> None:
        """Starts a slot; `state` is its saved state, None at the first step."""

    def state(self, slot: int) -> OptimizerState:
        """What is remembered of a slot, on the CPU."""

    def step(self, slots: Sequence[int], rates: Mapping[int, Sequence[tuple[slice, float]]]) -> None:
        """One step of the given slots; `rates[slot]` are learning rates by column range."""

    def leave(self, slot: int) -> None:
        """Forgets a slot."""


class SlotAdamW:
    """AdamW (Loshchilov and Hutter 2019) over the rows of `weights_SP`, whose `.grad` must be set."""

    def __init__(self, weights_SP: Tensor) -> None:
        self.weights_SP = weights_SP
        self.average_SP = torch.zeros_like(weights_SP, requires_grad=False)
        self.square_SP = torch.zeros_like(weights_SP, requires_grad=False)
        slots = weights_SP.shape[0]
        self._steps = [0] * slots
        self._specs: list[TrainSpec | None] = [None] * slots

    def join(self, slot: int, spec: TrainSpec, state: OptimizerState | None) -> None:
        """See `SlotOptimizer`."""
        self.leave(slot)
        self._specs[slot] = spec
        if state is not None:
            self.average_SP[slot].copy_(state.rows["exp_avg"])
            self.square_SP[slot].copy_(state.rows["exp_avg_sq"])
            self._steps[slot] = int(state.numbers["step"])

    def leave(self, slot: int) -> None:
        """See `SlotOptimizer`."""
        self.average_SP[slot].zero_()
        self.square_SP[slot].zero_()
        self._steps[slot] = 0
        self._specs[slot] = None

    def state(self, slot: int) -> OptimizerState:
        """See `SlotOptimizer`."""
        rows = {"exp_avg": self.average_SP[slot].cpu().clone(), "exp_avg_sq": self.square_SP[slot].cpu().clone()}
        return OptimizerState(rows, numbers={"step": float(self._steps[slot])})

    @torch.no_grad()
    def step(self, slots: Sequence[int], rates: Mapping[int, Sequence[tuple[slice, float]]]) -> None:
        """One step of the given slots; the rows of the others stay as they are."""
        every = list(slots) == list(range(self.weights_SP.shape[0]))
        index = slice(None) if every else torch.tensor(slots, device=self.weights_SP.device)
        assert self.weights_SP.grad is not None
        weights_DP, gradient_DP = self.weights_SP.detach()[index], self.weights_SP.grad[index]
        average_DP, square_DP = self.average_SP[index], self.square_SP[index]
        specs = [spec for slot in slots if (spec := self._specs[slot]) is not None]
        for slot in slots:
            self._steps[slot] += 1
        steps = [self._steps[slot] for slot in slots]
        beta1, beta2 = self._column([s.adam_beta1 for s in specs]), self._column([s.adam_beta2 for s in specs])
        average_DP.lerp_(gradient_DP, 1 - beta1)
        square_DP.mul_(beta2).addcmul_(gradient_DP * (1 - beta2), gradient_DP)
        root = [(1 - spec.adam_beta2**step) ** 0.5 for spec, step in zip(specs, steps, strict=True)]
        update_DP = average_DP / (
            (square_DP.sqrt() / self._column(root)).add_(self._column([s.adam_epsilon for s in specs]))
        )
        correction = [1 - spec.adam_beta1**step for spec, step in zip(specs, steps, strict=True)]
        for part in range(len(rates[slots[0]])):
            columns = rates[slots[0]][part][0]
            rate = [rates[slot][part][1] for slot in slots]
            decay = [1 - lr * spec.adam_weight_decay for lr, spec in zip(rate, specs, strict=True)]
            size = [lr / by for lr, by in zip(rate, correction, strict=True)]
            weights_DP[:, columns].mul_(self._column(decay)).sub_(update_DP[:, columns] * self._column(size))
        if not every:
            self.weights_SP.detach()[index] = weights_DP
            self.average_SP[index], self.square_SP[index] = average_DP, square_DP

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(self.weights_SP)[:, None]


class PerSlot:
    """An ordinary optimizer for each slot, over that slot's row as its one parameter."""

    def __init__(
        self, weights_SP: Tensor, make: Callable[[Tensor, TrainSpec], torch.optim.Optimizer], *, one_rate: bool
    ) -> None:
        self.weights_SP = weights_SP
        self._make = make
        self._one_rate = one_rate
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._rows: dict[int, Tensor] = {}

    def join(self, slot: int, spec: TrainSpec, state: OptimizerState | None) -> None:
        """See `SlotOptimizer`."""
        row_P = self.weights_SP.detach()[slot].requires_grad_(True)
        optimizer = self._make(row_P, spec)
        self._rows[slot], self._optimizers[slot] = row_P, optimizer
        if state is not None:
            device = row_P.device
            optimizer.state[row_P] = {
                **{name: row.to(device) for name, row in (state.rows | state.tensors).items()},
                **{name[6:]: number for name, number in state.numbers.items() if name.startswith("state.")},
            }
            for name, number in state.numbers.items():
                if name.startswith("group."):
                    kind = type(optimizer.param_groups[0].get(name[6:], number))
                    optimizer.param_groups[0][name[6:]] = kind(number)

    def leave(self, slot: int) -> None:
        """See `SlotOptimizer`."""
        self._optimizers.pop(slot, None)
        self._rows.pop(slot, None)

    def state(self, slot: int) -> OptimizerState:
        """See `SlotOptimizer`."""
        optimizer, found = self._optimizers[slot], OptimizerState()
        for name, value in optimizer.state[self._rows[slot]].items():
            if isinstance(value, Tensor) and value.shape == self._rows[slot].shape:
                found.rows[name] = value.cpu().clone()
            elif isinstance(value, Tensor) and value.numel() > 1:
                found.tensors[name] = value.cpu().clone()
            else:
                found.numbers[f"state.{name}"] = float(value)
        for name, value in optimizer.param_groups[0].items():
            if isinstance(value, int | float | Tensor) and not isinstance(value, bool) and name != "lr":
                found.numbers[f"group.{name}"] = float(value)
        return found

    def step(self, slots: Sequence[int], rates: Mapping[int, Sequence[tuple[slice, float]]]) -> None:
        """See `SlotOptimizer`."""
        assert self.weights_SP.grad is not None
        for slot in slots:
            optimizer, row_P = self._optimizers[slot], self._rows[slot]
            before = row_P.detach().clone()
            row_P.grad = self.weights_SP.grad[slot]
            optimizer.param_groups[0]["lr"] = base = rates[slot][0][1]
            optimizer.step()
            if self._one_rate or base == 0:
                continue
            # the step is proportional to the learning rate, so a part with another rate takes its share of it
            for columns, rate in rates[slot][1:]:
                row_P.detach()[columns] = torch.lerp(before[columns], row_P.detach()[columns], rate / base)


def prodigy(row_P: Tensor, spec: TrainSpec) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko and Defazio 2023): it finds the learning rate itself, `learning_rate` multiplies it."""
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise SubjectFailed(
            "optimizer 'prodigy' needs the package prodigyopt: pip install 'dreamfleet[prodigy]'"
        ) from None
    return Prodigy(
        [row_P],
        lr=spec.learning_rate,
        betas=(spec.adam_beta1, spec.adam_beta2),
        eps=spec.adam_epsilon,
        weight_decay=spec.adam_weight_decay,
        decouple=True,
        use_bias_correction=True,
        safeguard_warmup=True,
    )


def adamw8bit(row_P: Tensor, spec: TrainSpec) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments (Dettmers et al. 2022); only where CUDA and bitsandbytes are."""
    if row_P.device.type != "cuda":
        raise SubjectFailed("optimizer 'adamw8bit' needs a CUDA device; on a CPU take 'adamw'")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise SubjectFailed("optimizer 'adamw8bit' needs bitsandbytes: pip install 'dreamfleet[cuda]'") from None
    return AdamW8bit(
        [row_P],
        lr=spec.learning_rate,
        betas=(spec.adam_beta1, spec.adam_beta2),
        eps=spec.adam_epsilon,
        weight_decay=spec.adam_weight_decay,
    )


def make_optimizers(weights_SP: Tensor) -> dict[str, Callable[[], SlotOptimizer]]:
    """How to make each optimizer of the manifest over one bank; made when the first subject asks for it."""

    def per_slot(make: Callable[[Tensor, TrainSpec], Any], one_rate: bool) -> Callable[[], SlotOptimizer]:
        return lambda: PerSlot(weights_SP, make, one_rate=one_rate)

    return {
        "adamw": lambda: SlotAdamW(weights_SP),
        "adamw8bit": per_slot(adamw8bit, one_rate=False),
        "prodigy": per_slot(prodigy, one_rate=True),
    }
