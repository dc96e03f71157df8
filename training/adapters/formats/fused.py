"""Layers that a family's own programs have as one and diffusers as several: adapters joined for them, and split again.

Joined, the low-rank changes of several layers are one of a higher rank: their `down` stacked, their `up` on the
diagonal. diffusers' readers know that form and split it back; so does `split`.
"""

from collections.abc import Mapping, Sequence

import torch

from training.adapters.adapter import LowRank
from training.base.originals import FusedLayer


def joined(modules: Mapping[str, LowRank], originals: Mapping[str, FusedLayer]) -> dict[str, LowRank]:
    """`modules` by the keys of the original's layers; those that have none there keep their own."""
    made, left = dict[str, LowRank](), dict(modules)
    for name, fused in originals.items():
        parts = [left.pop(key, None) for key in fused.modules]
        if all(part is None for part in parts):
            continue
        low = _join(parts, fused.rows)
        made[name] = LowRank(low.down, _swap(low.up)) if fused.swapped else low
    return made | left


def split(name: str, low: LowRank, originals: Mapping[str, FusedLayer]) -> dict[str, LowRank]:
    """The changes of the base's own layers that the change of a layer `name`, theirs or the original's, is made of.

    Of a fused layer each part keeps what its own outputs use; a part that uses nothing has none, unless all are so.
    """
    fused = originals.get(name)
    if fused is None:
        return {name: low}
    up = _swap(low.up) if fused.swapped else low.up
    if len(fused.modules) == 1:
        return {fused.modules[0]: LowRank(low.down, up)}
    parts = dict(zip(fused.modules, up.split(fused.rows), strict=True))
    used = {key: part.any(dim=0) for key, part in parts.items()}  # only linear layers are fused
    if not up.any():
        return {key: LowRank(low.down, part) for key, part in parts.items()}
    return {
        key: LowRank(low.down[used[key]].contiguous(), part[:, used[key]].contiguous())
        for key, part in parts.items()
        if used[key].any()
    }


def _join(parts: Sequence[LowRank | None], rows: Sequence[int]) -> LowRank:
    there = [part for part in parts if part is not None]
    first = there[0]
    if len(parts) == 1:
        return first
    alike = [part.down.shape == first.down.shape and torch.equal(part.down, first.down) for part in there]
    if len(there) == len(parts) and all(alike):
        return LowRank(first.down, torch.cat([part.up for part in there]))
    rank = max(part.rank for part in there)  # one for all: readers cut the sum into equal parts
    down = first.down.new_zeros(len(parts) * rank, *first.down.shape[1:])
    up = first.up.new_zeros(sum(rows), len(parts) * rank)
    for place, part in enumerate(parts):
        if part is not None:
            start, row = place * rank, sum(rows[:place])
            down[start : start + part.rank] = part.down
            up[row : row + rows[place], start : start + part.rank] = part.up
    return LowRank(down, up)


def _swap(up: torch.Tensor) -> torch.Tensor:
    return torch.cat(up.chunk(2)[::-1])
