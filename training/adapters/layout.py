"""How an adapter lies in a slot of a bank: which layers, which columns, and an adapter to a row and back.

Shape suffixes: X any leading axes, P values of one slot, R rank, W columns of a component, I and O a layer's inputs and
outputs, V textual-inversion vectors, D their width.

A slot is laid out component by component and, inside of one, rank by rank: [R, W], where W joins each layer's inputs
and outputs. So an adapter of a lower rank is the front of its slot. Textual-inversion vectors come last.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import torch
from torch import Tensor, nn

from training.adapters.adapter import Adapter, LowRank
from training.base.names import canonical
from training.errors import UserError

Layer = nn.Linear | nn.Conv2d
WORDS = "words"  # the columns of the textual-inversion vectors, as if they were a component


@dataclass(frozen=True, slots=True)
class Site:
    """One layer that can wear a delta. `key` is its canonical name; `down` the shape behind the rank of its A."""

    key: str
    layer: Layer
    down: tuple[int, ...]  # (I,) of a Linear, (I, kh, kw) of a Conv2d
    out: int

    @property
    def widths(self) -> tuple[int, int]:
        """The columns of its inputs and of its outputs."""
        return prod(self.down), self.out

    def size(self, rank: int) -> int:
        """How many values a delta of `rank` has."""
        return rank * sum(self.widths)


def find_sites(component: str, model: nn.Module, targets: Sequence[str]) -> tuple[Site, ...]:
    """The layers of `model` whose names end in one of `targets` (whole name parts), in module order."""
    ends = tuple(f".{target}" for target in targets)
    sites = []
    for name, layer in model.named_modules():
        if not isinstance(layer, Layer) or not f".{name}".endswith(ends):
            continue
        if isinstance(layer, nn.Linear):
            sites.append(Site(canonical(component, name), layer, (layer.in_features,), layer.out_features))
        elif layer.groups == 1:
            sites.append(
                Site(canonical(component, name), layer, (layer.in_channels, *layer.kernel_size), layer.out_channels)
            )
    return tuple(sites)


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """One adapter laid out by `layout`.

    `parts[component]`: [rank, W]; `parts[WORDS]`: textual-inversion vectors [V, D]. `worn[component]`: indices of the
    sites it changes. `words`: word -> its number of vectors, in order.
    """

    layout: "Layout"
    parts: Mapping[str, Tensor]
    worn: Mapping[str, frozenset[int]]
    words: Mapping[str, int]
    rank: int

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True, eq=False)
class Layout:
    """The layers `sites` of each component at up to `rank`, and up to `vectors` textual-inversion vectors of `width`.

    A layout never changes: `grown` returns another one that begins with the same layers.
    """

    sites: Mapping[str, tuple[Site, ...]]
    rank: int
    vectors: int = 0
    width: int = 0

    @cached_property
    def widths(self) -> dict[str, list[int]]:
        """Of each component, the widths of its layers' inputs and outputs, in turn."""
        return {name: [width for site in found for width in site.widths] for name, found in self.sites.items()}

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Where in a slot the values of each component, and of WORDS, are."""
        sizes = [*(self.rank * sum(widths) for widths in self.widths.values()), self.vectors * self.width]
        ends = list(accumulate(sizes))
        return {name: slice(end - size, end) for name, end, size in zip((*self.sites, WORDS), ends, sizes, strict=True)}

    @property
    def size(self) -> int:
        """P: how many values a slot has."""
        return self.columns[WORDS].stop

    @cached_property
    def _places(self) -> dict[str, tuple[str, int, int]]:
        """Of each layer, by its key: component, index, first column."""
        found = {}
        for component, sites in self.sites.items():
            start = 0
            for index, site in enumerate(sites):
                found[site.key] = component, index, start
                start += sum(site.widths)
        return found

    # -- other layouts --

    def grown(self, sites: Mapping[str, Sequence[Site]]) -> "Layout":
        """This layout with those of `sites` that it lacks behind its own; itself if it lacks none."""
        fresh = {name: [site for site in found if site.key not in self._places] for name, found in sites.items()}
        if not any(fresh.values()):
            return self
        joined = {name: (*self.sites.get(name, ()), *fresh.get(name, ())) for name in {**self.sites, **sites}}
        return Layout(joined, self.rank, self.vectors, self.width)

    def only(self, keys: Collection[str]) -> "Layout":
        """This layout without the layers that are not in `keys`."""
        kept = {name: tuple(site for site in found if site.key in keys) for name, found in self.sites.items()}
        return Layout(kept, self.rank, self.vectors, self.width)

    # -- views of values --

    def ranked(self, values_XP: Tensor, component: str) -> Tensor:
        """A view of a component's columns, [..., rank, W]."""
        return values_XP[..., self.columns[component]].unflatten(-1, (self.rank, sum(self.widths[component])))

    def vectors_of(self, values_P: Tensor) -> Tensor:
        """A view of a slot's textual-inversion vectors, [V, D]."""
        return values_P[self.columns[WORDS]].view(self.vectors, self.width)

    # -- an adapter to a row, a row to values, and back --

    def pack(self, adapter: Adapter, dtype: torch.dtype) -> AdapterRow:
        """Lays an adapter out, on the CPU.

        Raises UserError naming what does not fit: a module without a layer here, too high a rank, a shape.
        """
        rank = adapter.rank
        if rank > self.rank:
            raise UserError(f"The adapter has rank {rank}; here it takes rank <= {self.rank}.")
        parts = {name: torch.zeros(rank, sum(widths), dtype=dtype) for name, widths in self.widths.items()}
        worn: dict[str, set[int]] = {component: set() for component in self.sites}
        left = dict(adapter.modules)
        for component, index, down_RI, up_RO in self._views(parts):
            site = self.sites[component][index]
            low = left.pop(site.key, None)
            if low is None:
                continue
            if low.down.shape[1:] != site.down or low.up.shape[0] != site.out:
                raise UserError(
                    f"Adapter module '{site.key}' has shapes {tuple(low.down.shape)} and {tuple(low.up.shape)}; here "
                    f"it takes [rank, {', '.join(map(str, site.down))}] and [{site.out}, rank]."
                )
            down_RI[: low.rank].copy_(low.down.flatten(1))
            up_RO[: low.rank].copy_(low.up.flatten(1).T)
            worn[component].add(index)
        if left:
            raise UserError(f"{len(left)} adapter modules have no layer in this base, the first is '{min(left)}'.")
        words, parts[WORDS] = self._pack_words(adapter, dtype)
        return AdapterRow(self, parts, {component: frozenset(found) for component, found in worn.items()}, words, rank)

    def _pack_words(self, adapter: Adapter, dtype: torch.dtype) -> tuple[dict[str, int], Tensor]:
        named = {word: vectors.reshape(-1, vectors.shape[-1]) for word, vectors in sorted(adapter.embeddings.items())}
        words = {word: len(vectors_VD) for word, vectors_VD in named.items()}
        if sum(words.values()) > self.vectors or any(v.shape[1] != self.width for v in named.values()):
            raise UserError(
                f"The adapter's words {', '.join(words)} take {sum(words.values())} vectors; here a slot holds "
                f"{self.vectors} of width {self.width}."
            )
        empty = torch.zeros(0, self.width, dtype=dtype)
        return words, torch.cat([empty, *(vectors_VD.to(empty) for vectors_VD in named.values())])

    def worn(self, row: AdapterRow) -> dict[str, frozenset[int]]:
        """The indices of the sites that a row, of whatever layout, changes here.

        Raises KeyError for a layer that is not here.
        """
        return {name: frozenset(self._places[site.key][1] for site in _worn_sites(row, name)) for name in row.worn}

    def write(self, values_P: Tensor, row: AdapterRow, clear_to: int = 0) -> None:
        """A row, of whatever layout, into the values of a slot. Its ranks are written, those up to `clear_to` cleared.

        Copies between a pinned row and a device do not wait. Raises KeyError for a layer that is not here.
        """
        for component in self.sites:
            ranked_RW = self.ranked(values_P, component)
            if row.layout is self:
                ranked_RW[: row.rank].copy_(row.parts[component], non_blocking=True)
            else:
                ranked_RW[: row.rank].zero_()
                for there, here in self._moves(row, component):
                    ranked_RW[: row.rank, here].copy_(row.parts[component][:, there], non_blocking=True)
            ranked_RW[row.rank : clear_to].zero_()
        self.vectors_of(values_P)[: len(row.parts[WORDS])].copy_(row.parts[WORDS], non_blocking=True)

    def _moves(self, row: AdapterRow, component: str) -> list[tuple[slice, slice]]:
        """The columns of what a row wears, in its layout and in this one; neighbours that stay neighbours as one."""
        moves: list[tuple[slice, slice]] = []
        for site in _worn_sites(row, component):
            there, here = (_span(layout._places[site.key][2], site) for layout in (row.layout, self))
            if moves and (there.start, here.start) == (moves[-1][0].stop, moves[-1][1].stop):
                moves[-1] = slice(moves[-1][0].start, there.stop), slice(moves[-1][1].start, here.stop)
            else:
                moves.append((there, here))
        return moves

    def read(
        self, values_P: Tensor, worn: Mapping[str, frozenset[int]], words: Mapping[str, int], rank: int
    ) -> AdapterRow:
        """The inverse of `write`: a copy of a slot's values as a row of this layout, on the CPU."""
        parts = {name: self.ranked(values_P, name)[:rank].to("cpu", copy=True) for name in self.sites}
        parts[WORDS] = self.vectors_of(values_P)[: sum(words.values())].to("cpu", copy=True)
        return AdapterRow(self, parts, worn, words, rank)

    def _views(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """For every layer: component, index, `down_RI` and `up_RO`, views of a row's parts."""
        for component, widths in self.widths.items():
            if not widths:
                continue
            pieces = parts[component].split(widths, dim=1)
            for index in range(len(self.sites[component])):
                yield component, index, pieces[2 * index], pieces[2 * index + 1]


def unpack(row: AdapterRow, rank: int | None = None, scale: float = 1.0) -> Adapter:
    """The inverse of `Layout.pack`: the first `rank` ranks of the layers the row changes, `scale` folded into up."""
    rank = row.rank if rank is None else rank
    modules = {}
    for component, index, down_RI, up_RO in row.layout._views(row.parts):
        if index in row.worn.get(component, ()):
            site = row.layout.sites[component][index]
            tail = (1,) * (len(site.down) - 1)
            down = down_RI[:rank].clone().reshape(rank, *site.down)
            modules[site.key] = LowRank(down, (up_RO[:rank].T * scale).reshape(site.out, rank, *tail).contiguous())
    vectors = row.parts[WORDS].split(list(row.words.values())) if row.words else ()
    return Adapter(modules, {word: found.clone() for word, found in zip(row.words, vectors, strict=True)})


def _worn_sites(row: AdapterRow, component: str) -> list[Site]:
    """The layers of a component that a row changes, in its order."""
    return [row.layout.sites[component][index] for index in sorted(row.worn.get(component, ()))]


def _span(start: int, site: Site) -> slice:
    return slice(start, start + sum(site.widths))
