"""LyCORIS' LoKr and LoHa files, converted to plain LoRA: each change in full, and the nearest of a lower rank to it.

LoKr is a Kronecker product, LoHa an elementwise product of two low-rank matrices (Yeh et al. 2023). Names of layers are
kohya's, ai-toolkit's or diffusers'.
"""

import re
from collections.abc import Mapping, Sequence

import torch

from training.adapters.adapter import AdapterError, LowRank
from training.adapters.formats.parts import ImportedFile

RANK = 32  # of what is made, unless the user gives another
_PART = re.compile(r"(?P<layer>.+)\.(?P<part>lokr_(?:w[12](?:_[ab])?|t2)|hada_(?:w[12]_[ab]|t[12])|alpha)")
LycorisParts = Mapping[str, torch.Tensor]


def is_lycoris(keys: Sequence[str]) -> bool:
    """Whether a file with `keys` is one of these."""
    return any(".lokr_" in key or ".hada_" in key for key in keys)


def as_lora(source: ImportedFile, rank: int) -> tuple[ImportedFile, float]:
    """The same file with plain LoRA of at most `rank`, under kohya's names of its parts, and the relative error.

    The error is that of all changes together (Frobenius norm). Raises AdapterError for parts that are not read.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in source.tensors.items():
        match = _PART.fullmatch(key)
        if match is None:
            raise AdapterError(f"{source.name}: key {key} is no part of a LoKr or LoHa layer that is read.")
        layers.setdefault(match["layer"], {})[match["part"]] = tensor.float()
    tensors, lost, whole = dict[str, torch.Tensor](), 0.0, 0.0
    for layer, parts in layers.items():
        change = _change(f"{source.name}: layer {layer}", parts)
        low = nearest(change, rank)
        tensors[f"{layer}.lora_down.weight"], tensors[f"{layer}.lora_up.weight"] = low
        lost += float((low.delta() - change).square().sum())
        whole += float(change.square().sum())
    made = ImportedFile(source.name, tensors, source.metadata, source.config)
    return made, (lost / whole) ** 0.5 if whole else 0.0


def nearest(change: torch.Tensor, rank: int) -> LowRank:
    """The nearest to a change of a weight (least squares) of at most `rank`."""
    u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
    kept = max(1, min(rank, int((s > s[0] * 1e-6).sum())))
    root = s[:kept].sqrt()
    down = (root[:, None] * vh[:kept]).reshape(kept, *change.shape[1:])
    return LowRank(down, (u[:, :kept] * root).reshape(change.shape[0], kept, *(1,) * (change.ndim - 2)))


def _change(what: str, parts: LycorisParts) -> torch.Tensor:
    """The change of a weight that a layer's parts stand for, scaled by alpha."""
    if any(name in parts for name in ("lokr_t2", "hada_t1", "hada_t2")):
        raise AdapterError(f"{what} is a Tucker-decomposed convolution, which is not read. Save it without.")
    try:
        if "hada_w1_a" in parts:
            rank = parts["hada_w1_b"].shape[0]
            first = parts["hada_w1_a"] @ parts["hada_w1_b"].flatten(1)
            second = parts["hada_w2_a"] @ parts["hada_w2_b"].flatten(1)
            return first * second * _scale(parts, rank)
        first, one = _factor(parts, "w1")
        second, two = _factor(parts, "w2")
    except KeyError as error:
        raise AdapterError(f"{what} has no {error.args[0]}. The file is incomplete.") from None
    rank = two or one
    if second.ndim == 4:
        first = first[:, :, None, None]
    return torch.kron(first, second) * (_scale(parts, rank) if rank else 1.0)


def _factor(parts: LycorisParts, name: str) -> tuple[torch.Tensor, int]:
    """A factor of LoKr, and its rank if it is decomposed itself, else 0."""
    if f"lokr_{name}" in parts:
        return parts[f"lokr_{name}"], 0
    left, right = parts[f"lokr_{name}_a"], parts[f"lokr_{name}_b"]
    return (left @ right.flatten(1)).reshape(left.shape[0], *right.shape[1:]), right.shape[0]


def _scale(parts: LycorisParts, rank: int) -> float:
    return float(parts["alpha"]) / rank if "alpha" in parts else 1.0
