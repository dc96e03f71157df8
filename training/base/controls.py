"""ControlNets: networks beside the denoiser that read a picture (edges, depth, a pose) and steer rows by it.

Each runs on its own rows only; what it adds to the denoiser's layers is zero for the others, so that rows with
different ControlNets, or none, share a forward. `Controls` is a family's part of it. Source: Zhang et al. 2023.
Shape suffixes: N rows of a forward, R of one network.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from training.base.files.weights import find_weights, load_model, read_header
from training.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from training.base.family import Parts, RowFacts


class Steer(NamedTuple):
    """What one ControlNet is told for one row: its picture as `Controls.hint` makes it, and how much it counts."""

    network: "nn.Module"
    hint: "Tensor"
    scale: float


class Controls(Protocol):
    """The ControlNets of one base, as its family takes them."""

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """The end of a sentence on why a network of this `config.json` is none for the base; None if it is one."""

    def load(self, folder: Path, dtype: "torch.dtype") -> "nn.Module":
        """The network in a diffusers folder, on the CPU, frozen, in eval mode. Raises UserError if it is not whole."""

    def hint(self, parts: "Parts", network: "nn.Module", pixels_3HW: "Tensor") -> "Tensor":
        """A picture, uint8, as the network takes it, on the base's device."""


class SteeredRows(NamedTuple):
    """The rows of a forward that one network runs on; a row is there once for each picture that it has for it."""

    network: Any
    rows_R: "Tensor"
    hints_R: "Tensor"
    scales_R: "Tensor"


def steered_rows(rows: Sequence["RowFacts"], like: "Tensor") -> list[SteeredRows]:
    """The networks that a forward's rows have, each with its rows; tensors are on the device and in the dtype `like`.

    Their order is the rows' own: sums of residuals are the same whatever rows are beside.
    """
    import torch

    from training.base.transfer import constant

    asked: dict[int, list[tuple[int, Steer]]] = {}
    for index, row in enumerate(rows):
        for steer in row.steers:
            asked.setdefault(id(steer.network), []).append((index, steer))
    return [
        SteeredRows(
            found[0][1].network,
            constant(tuple(index for index, _ in found), torch.long, like.device),
            torch.stack([steer.hint for _, steer in found]).to(like),
            constant(tuple(steer.scale for _, steer in found), like.dtype, like.device),
        )
        for found in asked.values()
    ]


def scattered(total_N: "Tensor | None", part_R: "Tensor", rows_R: "Tensor", rows: int) -> "Tensor":
    """`total_N`, or zeros, with `part_R` added at its rows."""
    if total_N is None:
        total_N = part_R.new_zeros((rows, *part_R.shape[1:]))
    return total_N.index_add_(0, rows_R, part_R)


def load_network(kind: Any, folder: Path, dtype: "torch.dtype") -> "nn.Module":
    """A network of class `kind` from the safetensors files of a diffusers folder, as `Controls.load` gives it."""
    network = load_model(kind, folder, "", dtype)
    held = {name for file in find_weights(folder, "").files for name in read_header(file)}
    lacking = sorted(name for name in network.state_dict() if name not in held)
    if lacking:  # diffusers would draw them at random
        raise UserError(f"its files lack {len(lacking)} tensors, the first is '{lacking[0]}'. Download them again.")
    made: nn.Module = network.requires_grad_(False).eval()
    return made


def differing(config: Mapping[str, Any], base: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The end of a sentence on the first of `keys` that a network's config and its base's do not have alike."""
    for key in keys:
        own, wanted = _plain(config.get(key)), _plain(base.get(key))
        if own != wanted:
            return f"it has `{key}: {own}`, and the base has {wanted}"
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
