"""The bank: low-rank deltas of several adapters over one frozen base, where every row of a batch wears its own.

Shape suffixes: S slots, P parameters of one slot, N rows of a batch, G groups of neighbouring rows that wear the same,
K adapters a row mixes, R rank, I and O a layer's inputs and outputs, T tokens.

The parameters of all adapters are one buffer `weights_SP`; a slot is one row of it. A layer's `down_SRI` and `up_SRO`
are views, so joining, leaving, checkpointing, publishing and swapping an adapter are one row copied. A `Route` says
which slots each row of a batch wears; forward hooks add the delta while a route is in use. The bank does not know which
family of model it lies over, nor whether it is trained or served.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import gcd, prod

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from training.adapter import Adapter, LowRank
from training.errors import UserError
from training.family import canonical

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True, slots=True)
class Site:
    """One layer that can wear a delta. `key` is its canonical name; `down` the shape behind the rank of its A."""

    key: str
    layer: Layer
    down: tuple[int, ...]  # (I,) of a Linear, (I, kh, kw) of a Conv2d
    out: int

    def size(self, rank: int) -> int:
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
    """One adapter laid out as a slot: `weights_P`, and for each component the indices of the layers it changes."""

    weights_P: Tensor
    worn: Mapping[str, frozenset[int]]
    words: Mapping[str, int] = field(default_factory=dict)  # textual-inversion word -> its number of vectors, in order
    rank: int | None = None  # only the first so many ranks are not zero; None: all may be in use


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
        self._sizes = {component: [site.size(rank) for site in found] for component, found in self.sites.items()}
        self._columns: dict[str, slice] = {}
        start = 0
        for component, sizes in self._sizes.items():
            self._columns[component] = slice(start, start + sum(sizes))
            start += sum(sizes)
        self._vectors, self._width = vectors
        self._columns[self.WORDS] = slice(start, start + self._vectors * self._width)
        self.weights_SP = torch.zeros(slots, self._columns[self.WORDS].stop, device=device, dtype=dtype)
        self._worn: list[Mapping[str, frozenset[int]]] = [{} for _ in range(slots)]
        self._words: list[Mapping[str, int]] = [{} for _ in range(slots)]
        self._ranks: list[int | None] = [None] * slots
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
        """The textual-inversion words of a slot, each [vectors, width]; differentiable towards `weights_SP`."""
        return self._named_words(self.weights_SP[slot], self._words[slot])

    def _named_words(self, row_P: Tensor, words: Mapping[str, int]) -> dict[str, Tensor]:
        if not words:
            return {}
        vectors_VD = row_P[self._columns[self.WORDS]].view(self._vectors, self._width)[: sum(words.values())]
        return dict(zip(words, vectors_VD.split(list(words.values())), strict=True))

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
        index_GK = slots_GK.clamp(min=0).to(self.weights_SP.device)
        scale_GK11 = None if (weights_GK == 1).all() else weights_GK.to(self.weights_SP)[:, :, None, None]
        chunks = self.weights_SP[:, self._columns[component]].split(self._sizes[component], dim=1)
        worn = [slot for slot in set(slots) if slot >= 0 and self._worn[slot].get(component)]
        rank = max((self.rank if self._ranks[slot] is None else self._ranks[slot] or 0 for slot in worn), default=0)
        deltas: list[Delta | None] = [None] * len(chunks)
        for index in sorted(active):
            site, chunk_SP = self.sites[component][index], chunks[index]
            # the ranks that nobody uses are neither gathered nor multiplied
            down_SP = chunk_SP[:, : rank * prod(site.down)]
            up_SP = chunk_SP[:, self.rank * prod(site.down) :][:, : rank * site.out]
            down_GKP, up_GKP = (
                half_SP[first : first + len(slots)].unsqueeze(1) if in_order else half_SP[index_GK]
                for half_SP in (down_SP, up_SP)
            )
            g, k, _ = up_GKP.shape
            up = up_GKP.reshape(g, k, rank, site.out)
            if scale_GK11 is not None:
                up = up * scale_GK11
            deltas[index] = Delta(
                down_GKP.reshape(g, k * rank, prod(site.down)).to(dtype or up.dtype),
                up.reshape(g, k * rank, site.out).to(dtype or up.dtype),
            )
        return Route(component, slots_NK.shape[0], tuple(deltas))

    @contextmanager
    def using(self, *routes: Route) -> Iterator[None]:
        """Rows wear `routes` inside. With gradient checkpointing, keep it open until backward is through."""
        before = self._using
        self._using = {route.component: route for route in routes}
        try:
            yield
        finally:
            self._using = before

    # -- slots --

    def pack(self, adapter: Adapter) -> Row:
        """Lays an adapter out as a slot, on the CPU, in the bank's dtype.

        Raises UserError naming what does not fit: a module without a layer here, a rank above the bank's, a shape.
        """
        row_P = torch.zeros(self.weights_SP.shape[1], dtype=self.weights_SP.dtype)
        worn: dict[str, set[int]] = {component: set() for component in self.sites}
        left = dict(adapter.modules)
        for component, index, down, up in self._views(row_P):
            site = self.sites[component][index]
            low_rank = left.pop(site.key, None)
            if low_rank is None:
                continue
            rank = low_rank.down.shape[0]
            if rank > self.rank or low_rank.down.shape[1:] != down.shape[1:] or low_rank.up.shape[0] != site.out:
                raise UserError(
                    f"Adapter module '{site.key}' has shapes {tuple(low_rank.down.shape)} and "
                    f"{tuple(low_rank.up.shape)}; here it takes rank <= {self.rank}, in {site.down}, out {site.out}."
                )
            down[:rank].copy_(low_rank.down)
            up[:rank].copy_(low_rank.up.reshape(site.out, rank).T)
            worn[component].add(index)
        if left:
            raise UserError(f"{len(left)} adapter modules have no layer in this base, the first is '{min(left)}'.")
        words = self._pack_words(row_P, adapter)
        return Row(row_P, {component: frozenset(found) for component, found in worn.items()}, words, adapter.rank)

    def _pack_words(self, row_P: Tensor, adapter: Adapter) -> dict[str, int]:
        named = {word: vectors.reshape(-1, vectors.shape[-1]) for word, vectors in sorted(adapter.embeddings.items())}
        words = {word: len(vectors_VD) for word, vectors_VD in named.items()}
        if sum(words.values()) > self._vectors or any(v.shape[1] != self._width for v in named.values()):
            raise UserError(
                f"The adapter's words {', '.join(words)} take {sum(words.values())} vectors; here a slot holds "
                f"{self._vectors} of width {self._width}."
            )
        for word, vectors_VD in self._named_words(row_P, words).items():
            vectors_VD.copy_(named[word])
        return words

    def unpack(self, row: Row, rank: int | None = None, scale: float = 1.0) -> Adapter:
        """The inverse of `pack`: the first `rank` ranks of the layers the row changes, `scale` folded into up."""
        rank = self.rank if rank is None else rank
        modules = {}
        for component, index, down, up in self._views(row.weights_P):
            if index in row.worn.get(component, ()):
                site = self.sites[component][index]
                tail = (1,) * (len(site.down) - 1)
                up_OR = (up[:rank].T * scale).reshape(site.out, rank, *tail)
                modules[site.key] = LowRank(down[:rank].clone(), up_OR.contiguous())
        words = {word: vectors.clone() for word, vectors in self._named_words(row.weights_P, row.words).items()}
        return Adapter(modules=modules, embeddings=words)

    def put(self, slot: int, row: Row) -> None:
        """A row into a slot: one copy."""
        self.weights_SP.detach()[slot].copy_(row.weights_P, non_blocking=True)
        self._worn[slot], self._words[slot], self._ranks[slot] = row.worn, row.words, row.rank

    def take(self, slot: int) -> Row:
        """A copy of a slot, on the CPU."""
        weights_P = self.weights_SP.detach()[slot].to("cpu", copy=True)
        return Row(weights_P, self._worn[slot], self._words[slot], self._ranks[slot])

    def clear(self, slot: int) -> None:
        """Empties a slot: what wears it is the base."""
        self.weights_SP.detach()[slot].zero_()
        self._worn[slot], self._words[slot], self._ranks[slot] = {}, {}, None

    def _views(self, row_P: Tensor) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """For every layer: component, index, `down_RI` [rank, *site.down] and `up_RO` [rank, out], views of the row."""
        for component, sites in self.sites.items():
            chunks = row_P[self._columns[component]].split(self._sizes[component])
            for index, (site, chunk) in enumerate(zip(sites, chunks, strict=True)):
                down, up = chunk.split([self.rank * prod(site.down), self.rank * site.out])
                yield component, index, down.view(self.rank, *site.down), up.view(self.rank, site.out)


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
