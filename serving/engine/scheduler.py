"""Which images wait, which run, and which of those take the next step. Policy only: no tensors, no adapters' weights.

Fairness is by service: a step counts `rows x latent cells` for its tenant. The next step is led by the tenant whose
service would be the lowest after it; so a small image does not wait for all steps of a large one, and a large one is
not starved. Images of the same kind join the step: of each other tenant no more than of the leader, unless the device
has room for them. The images of one tenant share its service in the same way.

A new tenant, or image, starts with the service of those who are served at that moment: a flood of others cannot starve
it, and idle time earns no credit. Source: start-time fair queueing, Goyal, Vin and Cheng 1996, here ordered by the end
of each step.
"""

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from serving.engine.pace import Pace
from serving.errors import QueueFull


class Item(Protocol):
    """An image as the scheduler sees it. Compared by identity."""

    @property
    def tenant(self) -> str:
        """Whose image it is."""

    @property
    def kind(self) -> Hashable:
        """Only images of equal kinds share a forward."""

    @property
    def cells(self) -> int:
        """Latent cells of a row."""

    @property
    def rows(self) -> int:
        """Rows of a forward it takes: two with guidance, one without."""

    @property
    def ready(self) -> bool:
        """Whether its adapters have arrived in host memory (or have failed to)."""


T = TypeVar("T", bound=Item)


@dataclass(slots=True)
class _Tenant(Generic[T]):
    service: float = 0.0  # rows x cells
    level: float = 0.0  # the service that an image of the tenant starts with
    waiting: deque[T] = field(default_factory=deque)
    running: int = 0  # rows

    @property
    def active(self) -> bool:
        return bool(self.waiting or self.running)


class Scheduler(Generic[T]):
    """`max_rows` and `max_cells` (rows x cells) bound one step; a single image may exceed them.

    A tenant runs up to `max_rows`, and all together twice as many; beyond that only tenants with less than an equal
    share start images. `queue` bounds the images that wait; when it is full, a tenant with less than an equal share may
    still add some, up to twice `queue` in all. `pace` estimates how much longer a step gets by more rows.
    """

    patience = 64  # admissions that may overtake an image whose adapters find no free slots
    stretch = 2.0  # how many times longer a step may be for the sake of others than for the tenant that leads it

    def __init__(self, max_rows: int, queue: int, max_cells: float = float("inf")) -> None:
        self.max_rows = max_rows
        self.max_cells = max_cells
        self.queue = queue
        self.pace = Pace()
        self._tenants: dict[str, _Tenant[T]] = {}
        self._running: dict[T, float] = {}  # the service of each image, on its tenant's scale
        self._overtaken: dict[T, int] = {}
        self._level = 0.0  # the service of the last step's leader before that step: where new tenants start

    @property
    def waiting(self) -> int:
        """How many images wait."""
        return sum(len(tenant.waiting) for tenant in self._tenants.values())

    @property
    def running(self) -> tuple[T, ...]:
        """The images that run, in the order in which they started."""
        return tuple(self._running)

    @property
    def running_rows(self) -> int:
        """Rows of all images that run."""
        return sum(item.rows for item in self._running)

    @property
    def idle(self) -> bool:
        """Whether no image waits or runs."""
        return not self._running and not self.waiting

    def submit(self, items: Sequence[T], retry_after_s: float = 1.0) -> None:
        """Queues all images of a request, or raises QueueFull and queues none."""
        name = items[0].tenant
        tenant = self._tenants.get(name) or _Tenant[T]()
        waiting, mine = self.waiting, len(tenant.waiting)
        tenants = len({name, *(other for other, state in self._tenants.items() if state.waiting)})
        within_share = mine + len(items) <= self.queue / tenants and waiting + len(items) <= 2 * self.queue
        if waiting + len(items) > self.queue and not within_share:
            raise QueueFull(
                f"{waiting} images are waiting and at most {self.queue} may. Try again in {retry_after_s:.0f} s.",
                retry_after_s,
            )
        if not tenant.active:
            tenant.service = max(tenant.service, self._level)
        self._tenants[name] = tenant
        tenant.waiting.extend(items)

    def admit(self, start: Callable[[T], bool]) -> None:
        """Moves images from waiting to running, least served tenants first.

        `start(item)` reserves what an image needs and returns whether it could."""
        tried: set[str] = set()
        due = {name: tenant.service for name, tenant in self._tenants.items()}
        for running in self._running:
            due[running.tenant] += _cost(running)  # so that admissions alternate between tenants
        while names := [name for name, tenant in self._tenants.items() if tenant.waiting and name not in tried]:
            name = min(names, key=due.__getitem__)
            tenant = self._tenants[name]
            item = next((item for item in tenant.waiting if item.ready), None)
            if item is None or not self._room(tenant, item):
                tried.add(name)
            elif start(item):
                self._start(tenant, item)
                due[name] += _cost(item)
            else:
                self._overtaken.setdefault(item, 0)
                if self._overtaken[item] > self.patience:
                    return  # none overtakes it from here on: slots become free as others finish
                tried.add(name)

    def _room(self, tenant: _Tenant[T], item: T) -> bool:
        active = sum(state.active for state in self._tenants.values())
        alone = sum(state.running > 0 for state in self._tenants.values()) <= (tenant.running > 0)
        most = max(self.max_rows, item.rows)  # an image that is larger than a whole forward may run too
        rows, bound = tenant.running + item.rows, most if alone else 2 * most
        return rows <= most and (self.running_rows + item.rows <= bound or rows <= bound / active)

    def _start(self, tenant: _Tenant[T], item: T) -> None:
        tenant.waiting.remove(item)
        tenant.running += item.rows
        self._running[item] = tenant.level
        self._overtaken.pop(item, None)
        for other in self._overtaken:
            self._overtaken[other] += 1

    def step_rows(self, cells: int) -> int:
        """The most rows of so many cells that take a step together; one image may have more."""
        return max(1, int(min(self.max_rows, self.max_cells // cells)))

    def service(self, tenant: str) -> float:
        """The service of a tenant (rows x cells): the one with less is served first."""
        return self._tenants[tenant].service if tenant in self._tenants else self._level

    def batch(self) -> list[T]:
        """The images that take the next step together; empty if none runs. Charges their tenants."""
        if not self._running:
            return []
        own: dict[str, list[T]] = {}
        for item in sorted(self._running, key=self._running.__getitem__):
            own.setdefault(item.tenant, []).append(item)
        parts = {name: self._part(items) for name, items in own.items()}
        lead = min(parts, key=lambda name: self._tenants[name].service + _cost_of(parts[name]))
        kind = parts[lead][0].kind
        queues = {name: deque(item for item in items if item.kind == kind) for name, items in own.items()}
        chosen = self._fill(parts[lead], queues)
        self._charge(chosen, lead, parts)
        return chosen

    def _charge(self, chosen: Sequence[T], lead: str, parts: Mapping[str, Sequence[T]]) -> None:
        self._level = max(self._level, self._tenants[lead].service)
        for item in chosen:
            tenant = self._tenants[item.tenant]
            tenant.level = max(tenant.level, self._running[item])
            tenant.service += _cost(item)
            self._running[item] += _cost(item)
        for name, part in parts.items():  # rows that only filled free room do not count against a tenant for long
            tenant = self._tenants[name]
            tenant.service = min(tenant.service, self._level + _cost_of(part))

    def _part(self, items: Sequence[T]) -> list[T]:
        """The images that a tenant would step next if it were alone. `items`: its running ones, least served first."""
        kind = min(items, key=lambda item: self._running[item] + _cost(item)).kind
        part: list[T] = []
        for item in items:
            if item.kind == kind and self._fits(part, item):
                part.append(item)
        return part

    def _fill(self, part: Sequence[T], queues: Mapping[str, deque[T]]) -> list[T]:
        """The step that the tenant of `part` leads. `queues`: each tenant's images of this kind, least served first.

        First each tenant gets as much as the leader; then more images join as long as the step does not get much longer
        than the leader's own.
        """
        lead, kind, own_rows, share = part[0].tenant, part[0].kind, _rows(part), _cost_of(part)
        chosen = [queues[lead].popleft()]
        taken = dict.fromkeys(queues, 0.0) | {lead: float(_cost(chosen[0]))}

        def in_share(item: T) -> bool:
            return taken[item.tenant] + _cost(item) <= share

        def nearly_free(item: T) -> bool:
            return self.pace.stretch(kind, _rows(chosen) + item.rows, than=own_rows) <= self.stretch

        for allowed in (in_share, nearly_free):
            open_ = {name: queue for name, queue in queues.items() if queue}
            while open_:
                name = min(open_, key=lambda name: self._tenants[name].service + taken[name] + _cost(open_[name][0]))
                if not (self._fits(chosen, open_[name][0]) and allowed(open_[name][0])):
                    del open_[name]
                    continue
                item = open_[name].popleft()
                chosen.append(item)
                taken[name] += _cost(item)
                if not open_[name]:
                    del open_[name]
        return chosen

    def _fits(self, chosen: Sequence[T], item: T) -> bool:
        return not chosen or _rows(chosen) + item.rows <= self.step_rows(item.cells)

    def remove(self, item: T) -> bool:
        """Removes an image, waiting or running; returns whether it was running."""
        self._overtaken.pop(item, None)
        tenant = self._tenants.get(item.tenant)
        if tenant is None:
            return False
        was_running = self._running.pop(item, None) is not None
        if was_running:
            tenant.running -= item.rows
        elif item in tenant.waiting:
            tenant.waiting.remove(item)
        if not tenant.active and len(self._tenants) > 1024:
            del self._tenants[item.tenant]  # idle tenants are forgotten: their service starts anew anyway
        return was_running

    def check_integrity(self) -> None:
        """Raises AssertionError if a tenant's count of running rows is not what runs."""
        for name, tenant in self._tenants.items():
            rows = sum(item.rows for item in self._running if item.tenant == name)
            assert rows == tenant.running, f"tenant {name}: counted {tenant.running} rows, running {rows}"


def _cost(item: Item) -> int:
    return item.rows * item.cells


def _rows(items: Sequence[Item]) -> int:
    return sum(item.rows for item in items)


def _cost_of(items: Sequence[Item]) -> int:
    return sum(map(_cost, items))
