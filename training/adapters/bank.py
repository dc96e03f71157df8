"""The bank: low-rank deltas of several adapters over one frozen base, where every row of a batch wears its own.

Shape suffixes: S slots, P parameters of one slot, N rows of a batch, G groups of neighbouring rows that wear the same,
K adapters a row mixes, R rank, I and O a layer's inputs and outputs, T tokens.

The parameters of all adapters are one buffer `weights_SP`; a slot is one row of it, laid out rank by rank, so that an
adapter of a lower rank is the front of its slot. What a layer adds is a view of it, so joining, leaving, checkpointing,
publishing and swapping an adapter are one row copied. A `Route` says which slots each row of a batch wears; forward
hooks add the delta while a route is in use. The bank does not know which family of model it lies over, or whether it is
trained or served.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd, prod

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from training.adapters.adapter import Adapter, LowRank
from training.base.names import canonical
from training.errors import UserError

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True, slots=True)
class Site:
    """One layer that can wear a delta. `key` is its canonical name; `down` the shape behind the rank of its A."""

    key: str
    layer: Layer
    down: tuple[int, ...]  # (I,) of a Linear, (I, kh, kw) of a Conv2d
    out: int

    def size(self, rank: int) -> int:
        """Parameters of the layer at this rank."""
        return rank * (prod(self.down) + self.out)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one layer adds: `down` [G, R, I] (R = K x rank) and `up` [G, R, O], for G groups of neighbouring rows."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class Route:
    """Which deltas the rows of one component's next forward wear; index = site, None = no row changes that layer."""

    component: str
    rows: int
    deltas: tuple[Delta | None, ...]


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
class Row:
    """One adapter laid out for a slot.

    `parts[component]`: [rank, W], where W is the width of the component's layers, each its inputs then its outputs;
    `parts[Bank.WORDS]`: textual-inversion vectors [V, D]. `worn[component]`: indices of the layers it changes.
    `words`: word -> its number of vectors, in order.
    """

    parts: Mapping[str, Tensor]
    worn: Mapping[str, frozenset[int]]
    words: Mapping[str, int]
    rank: int

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


class Bank:
    """`slots` adapters of rank <= `rank` over the layers `sites` of each component. All slots start empty (zero).

    `weights_SP` is the one tensor that is trained or swapped; call `inject()` before the first forward. `vectors`:
    textual-inversion vectors a slot may hold beside the deltas, and their width.
    """

    WORDS = "words"  # the columns of the vectors, as if they were a component

    def __init__(
        self,
        sites: Mapping[str, Sequence[Site]],
        *,
        slots: int,
        rank: int,
        vectors: tuple[int, int] = (0, 0),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sites = {component: tuple(found) for component, found in sites.items()}
        self.slots = slots
        self.rank = rank
        # of each component, the widths of its layers' inputs and outputs, in turn
        self._widths = {
            c: [w for site in found for w in (prod(site.down), site.out)] for c, found in self.sites.items()
        }
        self._columns: dict[str, slice] = {}
        start = 0
        for component, widths in self._widths.items():
            self._columns[component] = slice(start, start + rank * sum(widths))
            start += rank * sum(widths)
        self._vectors, self._width = vectors
        self._columns[self.WORDS] = slice(start, start + self._vectors * self._width)
        self.weights_SP = torch.zeros(slots, self._columns[self.WORDS].stop, device=device, dtype=dtype)
        self._worn: list[Mapping[str, frozenset[int]]] = [{} for _ in range(slots)]
        self._words: list[Mapping[str, int]] = [{} for _ in range(slots)]
        self._ranks = [0] * slots
        self._weights_read = self.weights_SP
        self._using: dict[str, Route] = {}
        self._hooks: list[RemovableHandle] = []

    # -- laying the bank over the base, and taking it off --

    def inject(self) -> None:
        """Hooks the layers. Without a route in use, the base computes exactly what it did."""
        if self._hooks:
            return
        for component, sites in self.sites.items():
            for index, site in enumerate(sites):
                self._hooks.append(site.layer.register_forward_hook(self._hook(component, index)))

    def eject(self) -> None:
        """The inverse of `inject`: the base is as it was before, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, component: str, index: int) -> Callable[[Layer, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add_delta(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            route = self._using.get(component)
            delta = route.deltas[index] if route is not None else None
            if delta is None:
                return None
            if isinstance(layer, nn.Linear):
                return _add_linear(inputs[0], output, delta)
            return _add_conv(layer, inputs[0], output, delta)

        return add_delta

    # -- routing rows to slots --

    def columns(self, component: str) -> slice:
        """The columns of `weights_SP` that belong to one component, or to `Bank.WORDS`."""
        return self._columns[component]

    def words(self, slot: int) -> dict[str, Tensor]:
        """The textual-inversion words of a slot, each [vectors, width]; differentiable towards `weights_SP`.

        Raises IndexError for a slot that is not there, as all calls about one slot do.
        """
        words = self._words[self._known(slot)]
        if not words:
            return {}
        vectors_VD = self._weights_read[slot, self._columns[self.WORDS]].view(self._vectors, self._width)
        return dict(zip(words, vectors_VD[: sum(words.values())].split(list(words.values())), strict=True))

    def route(
        self, component: str, slots_NK: Tensor, weights_NK: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Route:
        """Gathers what N rows wear: row n adds the sum over k of weights[n, k] x adapter in slots[n, k].

        `slots_NK`: int64 [N, K] on the CPU; -1 wears nothing. `weights_NK`: [N, K], ones by default. Differentiable
        towards `weights_SP`. A route is a snapshot: make a new one when a slot changes. Neighbouring rows that wear the
        same share one gathered delta, and slots in order without a gap are not copied at all: keep rows in slot order.
        """
        if weights_NK is None:
            weights_NK = torch.ones(slots_NK.shape, dtype=torch.float64)
        weights_NK = weights_NK.double().cpu() * (slots_NK >= 0)
        run = _common_run(torch.cat([slots_NK.double(), weights_NK], dim=1))
        slots_GK, weights_GK = slots_NK[::run], weights_NK[::run]
        slots = slots_GK.flatten().tolist()
        active = frozenset[int]().union(*(self._worn[slot].get(component, ()) for slot in set(slots) if slot >= 0))
        first = slots[0]
        in_order = first >= 0 and slots_GK.shape[1] == 1 and slots == list(range(first, first + len(slots)))
        index_GK = slots_GK.clamp(min=0).to(self._weights_read.device)
        scale_GK11 = None if (weights_GK == 1).all() else weights_GK.to(self._weights_read)[:, :, None, None]
        # the ranks that nobody uses are neither gathered nor multiplied
        rank = max((self._ranks[slot] for slot in set(slots) if slot >= 0), default=0)
        pieces = self._ranked(self._weights_read, component)[:, :rank].split(self._widths[component], dim=2)
        g, k = slots_GK.shape
        deltas: list[Delta | None] = [None] * len(self.sites[component])
        for index in sorted(active):
            # [G, K, rank, I] and [G, K, rank, O]
            down, up = (
                piece_SRX[first : first + g].unsqueeze(1) if in_order else piece_SRX[index_GK]
                for piece_SRX in pieces[2 * index : 2 * index + 2]
            )
            if scale_GK11 is not None:
                up = up * scale_GK11
            wanted = dtype or up.dtype
            down, up = down.reshape(g, k * rank, -1), up.reshape(g, k * rank, -1)
            deltas[index] = Delta(down.to(wanted), up.to(wanted))
        return Route(component, slots_NK.shape[0], tuple(deltas))

    def _ranked(self, weights_XP: Tensor, component: str) -> Tensor:
        """A component's columns as [..., rank, W]."""
        return weights_XP[..., self._columns[component]].unflatten(-1, (self.rank, sum(self._widths[component])))

    @contextmanager
    def using(self, *routes: Route) -> Iterator[None]:
        """Rows wear `routes` inside. With gradient checkpointing, keep it open until backward is through."""
        before = self._using
        self._using = {route.component: route for route in routes}
        try:
            yield
        finally:
            self._using = before

    @contextmanager
    def reading(self, weights_SP: Tensor) -> Iterator[None]:
        """Routes and words that are made inside are gathered from `weights_SP`, laid out as the bank's own."""
        before, self._weights_read = self._weights_read, weights_SP
        try:
            yield
        finally:
            self._weights_read = before

    # -- slots --

    def pack(self, adapter: Adapter) -> Row:
        """Lays an adapter out as a slot, on the CPU, in the bank's dtype.

        Raises UserError naming what does not fit: a module without a layer here, a rank above the bank's, a shape.
        """
        rank, dtype = adapter.rank, self.weights_SP.dtype
        if rank > self.rank:
            raise UserError(f"The adapter has rank {rank}; here it takes rank <= {self.rank}.")
        parts = {c: torch.zeros(rank, sum(widths), dtype=dtype) for c, widths in self._widths.items()}
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
        words, parts[self.WORDS] = self._pack_words(adapter)
        return Row(parts, {component: frozenset(found) for component, found in worn.items()}, words, rank)

    def _pack_words(self, adapter: Adapter) -> tuple[dict[str, int], Tensor]:
        named = {word: vectors.reshape(-1, vectors.shape[-1]) for word, vectors in sorted(adapter.embeddings.items())}
        words = {word: len(vectors_VD) for word, vectors_VD in named.items()}
        if sum(words.values()) > self._vectors or any(v.shape[1] != self._width for v in named.values()):
            raise UserError(
                f"The adapter's words {', '.join(words)} take {sum(words.values())} vectors; here a slot holds "
                f"{self._vectors} of width {self._width}."
            )
        empty = torch.zeros(0, self._width, dtype=self.weights_SP.dtype)
        return words, torch.cat([empty, *(vectors_VD.to(empty) for vectors_VD in named.values())])

    def unpack(self, row: Row, rank: int | None = None, scale: float = 1.0) -> Adapter:
        """The inverse of `pack`: the first `rank` ranks of the layers the row changes, `scale` folded into up."""
        rank = row.rank if rank is None else rank
        modules = {}
        for component, index, down_RI, up_RO in self._views(row.parts):
            if index in row.worn.get(component, ()):
                site = self.sites[component][index]
                tail = (1,) * (len(site.down) - 1)
                down = down_RI[:rank].clone().reshape(rank, *site.down)
                modules[site.key] = LowRank(down, (up_RO[:rank].T * scale).reshape(site.out, rank, *tail).contiguous())
        vectors = row.parts[self.WORDS].split(list(row.words.values())) if row.words else ()
        return Adapter(modules, {word: found.clone() for word, found in zip(row.words, vectors, strict=True)})

    def put(self, slot: int, row: Row) -> None:
        """A row into a slot: as many ranks as the adapter has, or its predecessor had, are written."""
        self._write(self.weights_SP.detach()[self._known(slot)], row, clear_to=self._ranks[slot])
        self._worn[slot], self._words[slot], self._ranks[slot] = row.worn, row.words, row.rank

    def take(self, slot: int) -> Row:
        """A copy of a slot, on the CPU."""
        return self.row_of(self.weights_SP.detach()[self._known(slot)], slot)

    def clear(self, slot: int) -> None:
        """Empties a slot: what wears it is the base."""
        self.weights_SP.detach()[self._known(slot)].zero_()
        self._worn[slot], self._words[slot], self._ranks[slot] = {}, {}, 0

    def row_of(self, values_P: Tensor, slot: int) -> Row:
        """`values_P`, laid out as `slot` is (an optimizer's moment, say), as a row of its own on the CPU."""
        rank, words = self._ranks[self._known(slot)], self._words[slot]
        parts = {c: self._ranked(values_P, c)[:rank].to("cpu", copy=True) for c in self.sites}
        vectors_VD = values_P[self._columns[self.WORDS]].view(self._vectors, self._width)
        parts[self.WORDS] = vectors_VD[: sum(words.values())].to("cpu", copy=True)
        return Row(parts, self._worn[slot], words, rank)

    def flat(self, row: Row) -> Tensor:
        """The inverse of `row_of`: a row as the whole length of a slot, [P], on the CPU."""
        values_P = torch.zeros(self.weights_SP.shape[1], dtype=self.weights_SP.dtype)
        self._write(values_P, row, clear_to=0)
        return values_P

    def _known(self, slot: int) -> int:
        """`slot`, which exists: a negative index would silently be a slot counted from the end, another subject's."""
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} is none of this bank's, which are 0 to {self.slots - 1}")
        return slot

    def _write(self, values_P: Tensor, row: Row, clear_to: int) -> None:
        for component in self.sites:
            ranked_RW = self._ranked(values_P, component)
            ranked_RW[: row.rank].copy_(row.parts[component], non_blocking=True)
            ranked_RW[row.rank : clear_to].zero_()
        vectors_VD = values_P[self._columns[self.WORDS]].view(self._vectors, self._width)
        vectors_VD[: len(row.parts[self.WORDS])].copy_(row.parts[self.WORDS], non_blocking=True)

    def _views(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """For every layer: component, index, `down_RI` and `up_RO`, views of a row's parts."""
        for component, widths in self._widths.items():
            pieces = parts[component].split(widths, dim=1)
            for index in range(len(self.sites[component])):
                yield component, index, pieces[2 * index], pieces[2 * index + 1]


def _common_run(rows_NX: Tensor) -> int:
    """The largest m such that every m rows from the start on are equal."""
    n = rows_NX.shape[0]
    changes = (rows_NX[1:] != rows_NX[:-1]).any(dim=1).nonzero().flatten().tolist()
    run = n
    for change in changes:
        run = gcd(run, change + 1)
    return run


def _add_linear(x: Tensor, output: Tensor, delta: Delta) -> Tensor:
    """output [N, ..., O] + (x [N, ..., I] down^T) up; each of G groups of rows has its own down and up."""
    g = delta.down.shape[0]
    x_GTI = x.reshape(g, -1, x.shape[-1])
    low_GTR = torch.bmm(x_GTI, delta.down.transpose(1, 2))
    return _add_product(output.reshape(g, -1, output.shape[-1]), low_GTR, delta.up).view(output.shape)


def _add_conv(layer: nn.Conv2d, x: Tensor, output: Tensor, delta: Delta) -> Tensor:
    """The same for a convolution: G small convolutions run as one grouped one, then a 1x1 up for every row."""
    g, ranks, _ = delta.down.shape
    n, channels, *size = x.shape
    m = n // g  # rows a group
    low = functional.conv2d(
        x.view(g, m, channels, *size).transpose(0, 1).reshape(m, g * channels, *size),
        delta.down.reshape(g * ranks, channels, *layer.kernel_size),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=g,
    )
    low_NRT = low.view(m, g, ranks, -1).transpose(0, 1).reshape(n, ranks, -1)
    up_NOR = delta.up.transpose(1, 2).repeat_interleave(m, dim=0) if m > 1 else delta.up.transpose(1, 2)
    return _add_product(output.reshape(n, output.shape[1], -1), up_NOR, low_NRT).view(output.shape)


def _add_product(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """output + left x right, batched; written over the layer's own fresh output where no gradient will ask for it."""
    if torch.is_grad_enabled():
        return torch.baddbmm(output, left, right)
    return output.baddbmm_(left, right)
