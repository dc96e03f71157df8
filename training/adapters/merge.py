"""Adapters made of adapters: several as one, and one at a lower rank. Pure tensor maths on the form in memory."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from training.adapters.adapter import Adapter, AdapterError, LowRank, some


class Error(NamedTuple):
    """How far one adapter is from another, as a share of the latter's size (Frobenius norm of all deltas)."""

    all: float
    worst: float
    worst_module: str  # empty if there is none


def merge_adapters(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The weighted sum of adapters, exact: ranks are concatenated and the weights folded into `up`, in float32.

    Metadata that all parts share is kept. Raises AdapterError if shapes differ or a token means two things.
    """
    if not parts:
        raise AdapterError("Nothing to merge. Name at least one adapter.")
    names = sorted({name for adapter, _ in parts for name in adapter.modules})
    modules = {
        name: _concatenate(name, [(a.modules[name], weight) for a, weight in parts if name in a.modules])
        for name in names
    }
    embeddings: dict[str, torch.Tensor] = {}
    for adapter, _ in parts:
        for token, vectors in adapter.embeddings.items():
            if token in embeddings and not torch.equal(embeddings[token], vectors):
                raise AdapterError(f"Token {token} has different embeddings in two of the adapters. Rename one.")
            embeddings[token] = vectors
    first = parts[0][0].metadata
    shared = {k: v for k, v in first.items() if all(a.metadata.get(k) == v for a, _ in parts)}
    return Adapter(modules, embeddings, shared)


def reduce_rank(adapter: Adapter, rank: int) -> Adapter:
    """The nearest adapter (least squares, per module) of at most `rank`; modules at or below it stay as they are."""
    if rank < 1:
        raise AdapterError(f"Bad rank {rank}: expected at least 1.")
    modules = {name: low if low.rank <= rank else _nearest(low, rank) for name, low in adapter.modules.items()}
    return Adapter(modules, dict(adapter.embeddings), dict(adapter.metadata))


def relative_error(adapter: Adapter, made: Adapter) -> Error:
    """How far the deltas of `made`, an adapter of the same modules, are from those of `adapter`."""
    norms, gaps = dict[str, float](), dict[str, float]()
    for name, low in adapter.modules.items():
        delta = low.delta()
        norms[name] = float(delta.norm())
        gaps[name] = float((made.modules[name].delta() - delta).norm())
    shares = {name: gap / norms[name] for name, gap in gaps.items() if norms[name]}
    worst = max(shares, key=lambda name: shares[name], default="")
    return Error(math.hypot(*gaps.values()) / (math.hypot(*norms.values()) or 1.0), shares.get(worst, 0.0), worst)


def _concatenate(name: str, parts: Sequence[tuple[LowRank, float]]) -> LowRank:
    shapes = {(low.up.shape[0], *low.down.shape[1:]) for low, _ in parts}
    if len(shapes) > 1:
        found = some([str(shape) for shape in sorted(shapes)])
        raise AdapterError(f"Module {name} has the shapes {found}: the adapters are for different bases.")
    down = torch.cat([low.down.float() for low, _ in parts], dim=0)
    up = torch.cat([low.up.float() * weight for low, weight in parts], dim=1)
    return LowRank(down, up)


def _nearest(low: LowRank, rank: int) -> LowRank:
    """The truncated SVD of `up @ down`, without forming that product; the singular values go half to each side."""
    left_OR, core_left_RR = torch.linalg.qr(low.up.double().flatten(1))
    right_IR, core_right_RR = torch.linalg.qr(low.down.double().flatten(1).T)
    u, s, vh = torch.linalg.svd(core_left_RR @ core_right_RR.T)
    root = s[:rank].sqrt()
    up = (left_OR @ u[:, :rank] * root).float()
    down = ((right_IR @ vh[:rank].T) * root).T.float()
    return LowRank(
        down.reshape(-1, *low.down.shape[1:]).contiguous(), up.reshape(-1, up.shape[1], *low.up.shape[2:]).contiguous()
    )
