"""The bank: low-rank deltas of several adapters over one frozen base, where every row of a batch wears its own.

Shape suffixes: S slots, P parameters of one slot, N rows of a batch, G groups of neighbouring rows that wear the same,
K adapters a row mixes, R rank, I and O a layer's inputs and outputs, T tokens.

The parameters of all adapters are one buffer `weights_SP`; a slot is one row of it, laid out as a `Layout` says. What a
layer adds is a view of it, so joining, leaving, checkpointing, publishing and swapping an adapter are one row copied.
A `Route` says which slots each row of a batch wears; forward hooks add the delta while a route is in use. The bank does
not know which family of model it lies over, or whether it is trained or served.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import gcd

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from training.adapters.adapter import Adapter
from training.adapters.coverage import Coverage
from training.adapters.delta import Delta, add_conv, add_linear
from training.adapters.layout import WORDS, AdapterRow, Layer, Layout, Site, unpack
from training.base.tokens import TokenKind


@dataclass(frozen=True, slots=True)
class Route:
    """Which deltas the rows of one component's next forward wear, by the index of the site; the others stay as is.

    `coverage`: where in their rows, and `kinds`, which tokens each of these sites sees; None is everywhere.
    """

    component: str
    rows: int
    deltas: Mapping[int, Delta]
    coverage: Coverage | None = None
    kinds: Mapping[int, TokenKind] = field(default_factory=dict)

    def covered(self, coverage: Coverage, kinds: Mapping[int, TokenKind]) -> "Route":
        """The same, worn only where `coverage` says."""
        return replace(self, coverage=coverage, kinds=kinds)


class Bank:
    """`slots` adapters of rank <= `rank` over the layers `sites` of each component. All slots start empty (zero).

    `weights_SP` is the one tensor that is trained or swapped; call `inject()` before the first forward. `vectors`:
    textual-inversion vectors a slot may hold beside the deltas, and their width.
    """

    WORDS = WORDS

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
        self.layout = Layout({component: tuple(found) for component, found in sites.items()}, rank, *vectors)
        self.slots = slots
        self.weights_SP = torch.zeros(slots, self.layout.size, device=device, dtype=dtype)
        self._worn: list[Mapping[str, frozenset[int]]] = [{} for _ in range(slots)]
        self._words: list[Mapping[str, int]] = [{} for _ in range(slots)]
        self._ranks = [0] * slots
        self._read_instead: Tensor | None = None
        self._using: dict[str, Route] = {}
        self._injected = False
        self._hooks: list[RemovableHandle] = []

    @property
    def sites(self) -> Mapping[str, tuple[Site, ...]]:
        """The layers it lies over, by component."""
        return self.layout.sites

    @property
    def rank(self) -> int:
        """The largest rank of an adapter."""
        return self.layout.rank

    # -- laying the bank over the base, and taking it off --

    def inject(self) -> None:
        """Hooks the layers. Without a route in use, the base computes exactly what it did."""
        if not self._injected:
            self._injected = True
            self._hook_all(self.sites)

    def eject(self) -> None:
        """The inverse of `inject`: the base is as it was before, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._injected = False

    def cover(self, sites: Mapping[str, Sequence[Site]]) -> bool:
        """Lays the bank over those of `sites` too that it lacks; what slots hold stays, bit for bit.

        Returns whether it has grown: then `weights_SP` is another tensor, and routes from before should be made anew,
        since they keep the old one in memory. While both are there, it takes the memory of both. Raises RuntimeError,
        with nothing changed, if the device has no memory for it; ValueError while the weights are trained.
        """
        before, after = self.layout, self.layout.grown(sites)
        if after is before:
            return False
        if self.weights_SP.requires_grad or self._read_instead is not None:
            raise ValueError("a bank whose weights are trained cannot be laid over further layers")
        with torch.inference_mode(False):  # else the new tensor could be changed in inference mode only
            old_SP, new_SP = self.weights_SP, self.weights_SP.new_zeros(self.slots, after.size)
            for slot, rank in enumerate(self._ranks):
                for component in before.sites:
                    old_RW = before.ranked(old_SP[slot], component)[:rank]
                    after.ranked(new_SP[slot], component)[:rank, : old_RW.shape[1]].copy_(old_RW)
                after.vectors_of(new_SP[slot]).copy_(before.vectors_of(old_SP[slot]))
        known = {component: len(found) for component, found in before.sites.items()}
        self.layout, self.weights_SP = after, new_SP
        if self._injected:
            self._hook_all({name: found[known.get(name, 0) :] for name, found in after.sites.items()}, known)
        return True

    def _hook_all(self, sites: Mapping[str, Sequence[Site]], first: Mapping[str, int] | None = None) -> None:
        """Hooks `sites`, whose indices begin with `first` of each component."""
        for component, found in sites.items():
            for index, site in enumerate(found, (first or {}).get(component, 0)):
                self._hooks.append(site.layer.register_forward_hook(self._hook(component, index)))

    def _hook(self, component: str, index: int) -> Callable[[Layer, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add_delta(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            route = self._using.get(component)
            delta = route.deltas.get(index) if route is not None else None
            if route is None or delta is None:
                return None
            where = (route.coverage, route.kinds[index]) if route.coverage is not None else None
            if isinstance(layer, nn.Linear):
                return add_linear(inputs[0], output, delta, where)
            return add_conv(layer, inputs[0], output, delta, where)

        return add_delta

    # -- routing rows to slots --

    def columns(self, component: str) -> slice:
        """The columns of `weights_SP` that belong to one component, or to `Bank.WORDS`."""
        return self.layout.columns[component]

    def words(self, slot: int) -> dict[str, Tensor]:
        """The textual-inversion words of a slot, each [vectors, width]; differentiable towards `weights_SP`.

        Raises IndexError for a slot that is not there, as all calls about one slot do.
        """
        words = self._words[self._known(slot)]
        if not words:
            return {}
        vectors_VD = self.layout.vectors_of(self._weights_read[slot])
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
        if not active:
            return Route(component, slots_NK.shape[0], {})
        first, read_SP = slots[0], self._weights_read
        in_order = first >= 0 and slots_GK.shape[1] == 1 and slots == list(range(first, first + len(slots)))
        index_GK = slots_GK.clamp(min=0) if in_order else slots_GK.clamp(min=0).to(read_SP.device)
        scale_GK11 = None if (weights_GK == 1).all() else weights_GK.to(read_SP)[:, :, None, None]
        # the ranks that nobody uses are neither gathered nor multiplied
        rank = max((self._ranks[slot] for slot in set(slots) if slot >= 0), default=0)
        rows_SRW = self.layout.ranked(read_SP, component)[:, :rank]
        if in_order:
            rows_SRW = rows_SRW[first : first + len(slots)]
        if scale_GK11 is None and dtype is not None:
            rows_SRW = rows_SRW.to(dtype)  # all layers at once, and one gradient for all
        pieces = rows_SRW.split(self.layout.widths[component], dim=2)
        g, k = slots_GK.shape
        deltas: dict[int, Delta] = {}
        for index in sorted(active):
            # [G, K, rank, I] and [G, K, rank, O]
            down, up = (
                piece_SRX.unsqueeze(1) if in_order else piece_SRX[index_GK]
                for piece_SRX in pieces[2 * index : 2 * index + 2]
            )
            if scale_GK11 is not None:
                up = up * scale_GK11
            wanted = dtype or up.dtype
            down, up = down.reshape(g, k * rank, -1), up.reshape(g, k * rank, -1)
            deltas[index] = Delta(down.to(wanted), up.to(wanted))
        return Route(component, slots_NK.shape[0], deltas)

    @contextmanager
    def using(self, *routes: Route) -> Iterator[None]:
        """Rows wear `routes` inside. With gradient checkpointing, keep it open until backward is through."""
        before = self._using
        self._using = {route.component: route for route in routes}
        _IN_USE.append(self)
        try:
            yield
        finally:
            _IN_USE.pop()
            self._using = before

    @contextmanager
    def reading(self, weights_SP: Tensor) -> Iterator[None]:
        """Routes and words that are made inside are gathered from `weights_SP`, laid out as the bank's own."""
        before, self._read_instead = self._read_instead, weights_SP
        try:
            yield
        finally:
            self._read_instead = before

    @property
    def _weights_read(self) -> Tensor:
        return self.weights_SP if self._read_instead is None else self._read_instead

    # -- slots --

    def pack(self, adapter: Adapter) -> AdapterRow:
        """Lays an adapter out as a slot, on the CPU, in the bank's dtype.

        Raises UserError naming what does not fit: a module without a layer here, a rank above the bank's, a shape.
        """
        return self.layout.pack(adapter, self.weights_SP.dtype)

    def unpack(self, row: AdapterRow, rank: int | None = None, scale: float = 1.0) -> Adapter:
        """The inverse of `pack`: the first `rank` ranks of the layers the row changes, `scale` folded into up."""
        return unpack(row, rank, scale)

    def put(self, slot: int, row: AdapterRow) -> None:
        """A row into a slot: as many ranks as the adapter has, or its predecessor had, are written.

        The row may be of another layout. Raises KeyError, with nothing changed, for a layer that the bank lacks.
        """
        worn = self.layout.worn(row)
        self.layout.write(self.weights_SP.detach()[self._known(slot)], row, clear_to=self._ranks[slot])
        self._worn[slot], self._words[slot], self._ranks[slot] = worn, row.words, row.rank

    def take(self, slot: int) -> AdapterRow:
        """A copy of a slot, on the CPU."""
        return self.row_of(self.weights_SP.detach()[self._known(slot)], slot)

    def clear(self, slot: int) -> None:
        """Empties a slot: what wears it is the base."""
        self.weights_SP.detach()[self._known(slot)].zero_()
        self._worn[slot], self._words[slot], self._ranks[slot] = {}, {}, 0

    def row_of(self, values_P: Tensor, slot: int) -> AdapterRow:
        """`values_P`, laid out as `slot` is (an optimizer's moment, say), as a row of its own on the CPU."""
        rank = self._ranks[self._known(slot)]
        return self.layout.read(values_P, self._worn[slot], self._words[slot], rank)

    def flat(self, row: AdapterRow) -> Tensor:
        """The inverse of `row_of`: a row as the whole length of a slot, [P], on the CPU."""
        values_P = torch.zeros(self.layout.size, dtype=self.weights_SP.dtype)
        self.layout.write(values_P, row)
        return values_P

    def _known(self, slot: int) -> int:
        """`slot`, which exists: a negative index would silently be a slot counted from the end, another subject's."""
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} is none of this bank's, which are 0 to {self.slots - 1}")
        return slot


_IN_USE: list[Bank] = []  # the innermost last; threads that share a base alternate at borders, where all are set aside


@contextmanager
def set_aside() -> Iterator[None]:
    """No row wears anything inside, whatever is in use outside; another thread may use banks over the same base."""
    before = [(bank, bank._using) for bank in dict.fromkeys(_IN_USE)]
    for bank, _ in before:
        bank._using = {}
    try:
        yield
    finally:
        for bank, using in before:
            bank._using = using


def _common_run(rows_NX: Tensor) -> int:
    """The largest m such that every m rows from the start on are equal."""
    n = rows_NX.shape[0]
    changes = (rows_NX[1:] != rows_NX[:-1]).any(dim=1).nonzero().flatten().tolist()
    run = n
    for change in changes:
        run = gcd(run, change + 1)
    return run
