"""Where a subject's training stands, and the file that holds it.

The file is laid out by layer name, not by slot: a subject resumes in another pack, another slot, beside others. One
safetensors file is one checkpoint, so it is there as a whole or not at all.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from training.adapters.adapter import Adapter, LowRank
from training.errors import UserError
from training.run.run import RunStore

FORMAT = "dreamfleet-checkpoint-1"
HISTORY = ("step", "loss", "instance_loss", "prior_loss", "learning_rate", "grad_norm")


@dataclass
class SubjectState:
    """Everything that decides how a subject goes on. `history`: fp64 [steps, len(HISTORY)].

    `averaged` is the moving average of the adapter, where one is kept.
    """

    step: int
    adapter: Adapter
    optimizer_rows: dict[str, Adapter] = field(default_factory=dict)
    optimizer_tensors: dict[str, Tensor] = field(default_factory=dict)
    optimizer_numbers: dict[str, float] = field(default_factory=dict)
    loss_scale: float = 1.0
    history: Tensor = field(default_factory=lambda: torch.zeros(0, len(HISTORY), dtype=torch.float64))
    averaged: Adapter | None = None

    @property
    def learned(self) -> Adapter:
        """What is judged and published of it."""
        return self.adapter if self.averaged is None else self.averaged


def dump_state(state: SubjectState) -> bytes:
    """The checkpoint file of a state."""
    tensors = _named("adapter", state.adapter)
    if state.averaged is not None:
        tensors |= _named("averaged", state.averaged)
    for name, rows in state.optimizer_rows.items():
        tensors |= _named(f"optimizer.{name}", rows)
    tensors |= {f"tensor/{name}": tensor.contiguous() for name, tensor in state.optimizer_tensors.items()}
    tensors["history"] = state.history
    numbers = {"step": state.step, "loss_scale": state.loss_scale, "optimizer": state.optimizer_numbers}
    # safetensors orders its metadata by hash; one key keeps the same state the same bytes
    return save(tensors, {"dreamfleet": json.dumps({"format": FORMAT, **numbers}, sort_keys=True)})


def load_state(data: bytes) -> SubjectState:
    """The inverse of `dump_state`, exact. Raises UserError for a file that is torn or something else."""
    try:
        length = int.from_bytes(data[:8], "little")
        numbers = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["dreamfleet"])
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"This is no whole checkpoint ({type(error).__name__}). Delete it; an earlier one is used."
        ) from None
    groups: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if name.count("/") == 2:
            group, module, half = name.split("/")
            groups.setdefault(group, {}).setdefault(module, {})[half] = tensor
    adapters = {group: _adapter(parts) for group, parts in groups.items()}
    return SubjectState(
        step=int(numbers["step"]),
        adapter=adapters.pop("adapter", Adapter(modules={})),
        averaged=adapters.pop("averaged", None),
        optimizer_rows={group.removeprefix("optimizer."): rows for group, rows in adapters.items()},
        optimizer_tensors={n.removeprefix("tensor/"): t for n, t in tensors.items() if n.startswith("tensor/")},
        optimizer_numbers={name: float(value) for name, value in numbers["optimizer"].items()},
        loss_scale=float(numbers["loss_scale"]),
        history=tensors["history"],
    )


def read_states(
    run: RunStore, id: str, torn: Callable[[int, UserError], None] = lambda step, error: None
) -> Iterator[tuple[int, SubjectState]]:
    """Step and state of each whole checkpoint of a subject, the latest first; `torn` is told of the others."""
    for step, data in run.load_checkpoints(id):
        try:
            state = load_state(data)
        except UserError as error:
            torn(step, error)
        else:
            yield step, state


def _named(group: str, adapter: Adapter) -> dict[str, Tensor]:
    named = {}
    for module, low_rank in adapter.modules.items():
        named[f"{group}/{module}/down"] = low_rank.down.contiguous()
        named[f"{group}/{module}/up"] = low_rank.up.contiguous()
    return named | {f"{group}/{word}/word": vectors.contiguous() for word, vectors in adapter.embeddings.items()}


def _adapter(parts: dict[str, dict[str, Tensor]]) -> Adapter:
    """The inverse of `_named` for one group."""
    return Adapter(
        modules={name: LowRank(part["down"], part["up"]) for name, part in parts.items() if "word" not in part},
        embeddings={name: part["word"] for name, part in parts.items() if "word" in part},
    )
