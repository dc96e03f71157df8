"""Optimizers over a bank: every slot has its own step, learning rates and settings.

`SlotAdamW` is torch's AdamW, vectorised over slots: the same arithmetic, so a subject equals its single run. `PerSlot`
runs an ordinary optimizer per slot, for those that cannot be vectorised (8-bit, Prodigy).
Shape suffixes: S slots, P parameters of a slot, D slots that are due.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from training.base.transfer import constant
from training.errors import SubjectFailed
from training.manifest.subject import TrainSpec

SlotRates = Sequence[tuple[slice, float]]  # learning rates by column range
Rates = Mapping[int, SlotRates]


@dataclass(slots=True)
class OptimizerState:
    """What one slot's optimizer remembers: rows laid out like the slot, tensors of other shapes, and numbers."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


class SlotOptimizer(Protocol):
    """What a pack asks of an optimizer."""

    def join(self, slot: int, spec: TrainSpec, state: OptimizerState | None) -> None:
        """Starts a slot; `state` is its saved state, None at the first step."""

    def state(self, slot: int) -> OptimizerState:
        """What is remembered of a slot, on the CPU."""

    def numbers(self, slots: Sequence[int], rates: Rates) -> Tensor:
        """What the next step of the slots takes from the host, on the CPU; `rates[slot]` by column range."""

    def step(self, slots: Sequence[int], rates: Rates, numbers: Tensor, sound_D: Tensor) -> None:
        """One step of the given slots, but for those whose gradient is not sound. `numbers` are on the device."""

    def retract(self, slot: int) -> None:
        """A slot was not sound in the last step: it counts as not taken."""

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

    def numbers(self, slots: Sequence[int], rates: Rates) -> Tensor:
        """[5 + 2 C, D]: 1 - beta1, beta2, 1 - beta2, epsilon, the root of the second moment's correction, and for each
        of C column ranges the decay and the size of the step."""
        specs = [spec for slot in slots if (spec := self._specs[slot]) is not None]
        steps = [self._steps[slot] + 1 for slot in slots]
        beta1, beta2 = self._line([s.adam_beta1 for s in specs]), self._line([s.adam_beta2 for s in specs])
        lines = [1 - beta1, beta2, 1 - beta2, self._line([spec.adam_epsilon for spec in specs])]
        lines.append(self._line([(1 - spec.adam_beta2**step) ** 0.5 for spec, step in zip(specs, steps, strict=True)]))
        correction = [1 - spec.adam_beta1**step for spec, step in zip(specs, steps, strict=True)]
        for part in range(len(rates[slots[0]])):
            rate = [rates[slot][part][1] for slot in slots]
            decay = [1 - lr * spec.adam_weight_decay for lr, spec in zip(rate, specs, strict=True)]
            size = [lr / by for lr, by in zip(rate, correction, strict=True)]
            lines += [self._line(decay), self._line(size)]
        return torch.stack(lines)

    @torch.no_grad()
    def step(self, slots: Sequence[int], rates: Rates, numbers: Tensor, sound_D: Tensor) -> None:
        """See `SlotOptimizer`; the rows of other slots stay as they are, and of unsound ones too."""
        every = list(slots) == list(range(self.weights_SP.shape[0]))
        index = slice(None) if every else constant(tuple(slots), torch.long, self.weights_SP.device)
        assert self.weights_SP.grad is not None
        weights_DP, gradient_DP = self.weights_SP.detach()[index], self.weights_SP.grad[index]
        average_DP, square_DP = self.average_SP[index], self.square_SP[index]
        for slot in slots:
            self._steps[slot] += 1
        nothing = constant((0, 1, 0, 1, 1, *(1, 0) * len(rates[slots[0]])), numbers.dtype, numbers.device)
        numbers = torch.where(sound_D, numbers, nothing[:, None])
        fresh1, beta2, fresh2, epsilon, root, *ranges = numbers.unsqueeze(2)
        average_DP.lerp_(gradient_DP, fresh1)  # an unsound gradient is zero
        square_DP.mul_(beta2).addcmul_(gradient_DP * fresh2, gradient_DP)
        update_DP = average_DP / ((square_DP.sqrt() / root).add_(epsilon))
        for (columns, _), decay, size in zip(rates[slots[0]], ranges[::2], ranges[1::2], strict=True):
            weights_DP[:, columns].mul_(decay).sub_(update_DP[:, columns] * size)
        if not every:
            self.weights_SP.detach()[index] = weights_DP
            self.average_SP[index], self.square_SP[index] = average_DP, square_DP

    def retract(self, slot: int) -> None:
        """See `SlotOptimizer`."""
        self._steps[slot] -= 1

    def _line(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(self.weights_SP.dtype)


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

    def numbers(self, slots: Sequence[int], rates: Rates) -> Tensor:
        """See `SlotOptimizer`: none."""
        return torch.empty(0)

    def retract(self, slot: int) -> None:
        """See `SlotOptimizer`: it is not called where it is not sound."""

    def step(self, slots: Sequence[int], rates: Rates, numbers: Tensor, sound_D: Tensor) -> None:
        """See `SlotOptimizer`. The host waits for the device here."""
        assert self.weights_SP.grad is not None
        for slot in itertools.compress(slots, sound_D.tolist()):
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
