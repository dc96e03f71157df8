"""Which images wait, which run, and which of those take the next step. Policy only: no tensors, no adapters' weights.

Tenants share by service: every step costs its tenant `rows x latent cells`, and the tenant served least goes first,
both into the running set and into a forward. A tenant that was idle starts level with the least served active one, so
it can neither be starved by a flood nor save up. Images of one size step together; sizes take turns, longest unstepped
first.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from serving.errors import QueueFull


class Item(Protocol):
    """An image as the scheduler sees it. Compared by identity."""

    @property
    def tenant(self) -> str: ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its latents; only equal sizes share a forward."""

    @property
    def rows(self) -> int:
        """Rows of a forward it takes: two with guidance, one without."""

    @property
    def ready(self) -> bool:
        """Whether its adapters have arrived in host memory (or have failed to)."""


T = TypeVar("T", bound=Item)


@dataclass(slots=True)
class _Tenant(Generic[T]):
    service: float = 0.0
    waiting: deque[T] = field(default_factory=deque)
    running: int = 0  # rows

    @property
    def active(self) -> bool:
        return bool(self.waiting or self.running)


class Scheduler(Generic[T]):
    """`max_rows` bounds one forward and what one tenant runs; twice as many rows run where tenants compete.

    `queue` bounds the images that wait. A tenant below its equal share of the queue is let in also when others have
    filled it, up to twice `queue` in all.
    """

    patience = 64  # admissions that may overtake an image whose adapters find no free slots

    def __init__(self, max_rows: int, queue: int) -> None:
        self.max_rows = max_rows
        self.queue = queue
        self._tenants: dict[str, _Tenant[T]] = {}
        self._running: dict[T, int] = {}  # the clock at its last step
        self._overtaken: dict[T, int] = {}
        self._clock = 0

    @property
    def waiting(self) -> int:
        return sum(len(tenant.waiting) for tenant in self._tenants.values())

    @property
    def running(self) -> tuple[T, ...]:
        return tuple(self._running)

    @property
    def running_rows(self) -> int:
        return sum(item.rows for item in self._running)

    @property
    def idle(self) -> bool:
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
            others = [state.service for state in self._tenants.values() if state.active]
            tenant.service = max(tenant.service, min(others, default=0.0))
        self._tenants[name] = tenant
        tenant.waiting.extend(items)

    def admit(self, start: Callable[[T], bool]) -> None:
        """Moves images from waiting to running, fairest first. `start(item)` takes what it needs; False: not now."""
        tried: set[str] = set()
        while names := [name for name, tenant in self._tenants.items() if tenant.waiting and name not in tried]:
            name = min(names, key=lambda name: self._tenants[name].service)
            tenant = self._tenants[name]
            item = next((item for item in tenant.waiting if item.ready), None)
            if item is None or not self._room(tenant, item):
                tried.add(name)
            elif start(item):
                self._start(tenant, item)
            else:
                self._overtaken.setdefault(item, 0)
                if self._overtaken[item] > self.patience:
                    return  # nobody overtakes it any more: slots fall free as others finish
                tried.add(name)

    def _room(self, tenant: _Tenant[T], item: T) -> bool:
        alone = sum(state.running > 0 for state in self._tenants.values()) <= (tenant.running > 0)
        bound = self.max_rows if alone else 2 * self.max_rows
        if tenant.running == 0 and alone:
            return True  # also an image that is larger than a forward, which would never run otherwise
        return tenant.running + item.rows <= self.max_rows and self.running_rows + item.rows <= bound

    def _start(self, tenant: _Tenant[T], item: T) -> None:
        tenant.waiting.remove(item)
        tenant.running += item.rows
        self._running[item] = self._clock
        self._overtaken.pop(item, None)
        for other in self._overtaken:
            self._overtaken[other] += 1
        # charged for a step at once, so that admissions between two steps alternate between tenants
        tenant.service += self._cost(item)

    def batch(self) -> list[T]:
        """The images that take the next step together; empty if none runs. Charges their tenants."""
        if not self._running:
            return []
        size = min(self._running, key=lambda item: self._running[item]).size
        queues: dict[str, deque[T]] = {}
        for item in sorted(self._running, key=lambda item: self._running[item]):
            if item.size == size:
                queues.setdefault(item.tenant, deque()).append(item)
        chosen: list[T] = []
        rows = 0
        while queues:
            name = min(queues, key=lambda name: self._tenants[name].service)
            item = queues[name].popleft()
            if chosen and rows + item.rows > self.max_rows:
                break
            chosen.append(item)
            rows += item.rows
            self._tenants[name].service += self._cost(item)
            if not queues[name]:
                del queues[name]
        self._clock += 1
        for item in chosen:
            self._running[item] = self._clock
        return chosen

    def remove(self, item: T) -> bool:
        """Forgets an image wherever it is; True if it was running."""
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
            del self._tenants[item.tenant]  # a name costs nothing for long; its service starts level again anyway
        return was_running

    @staticmethod
    def _cost(item: T) -> float:
        return item.rows * item.size[0] * item.size[1]

    def check_integrity(self) -> None:
        """Raises AssertionError if a tenant's count of running rows is not what runs."""
        for name, tenant in self._tenants.items():
            rows = sum(item.rows for item in self._running if item.tenant == name)
            assert rows == tenant.running, f"tenant {name}: counted {tenant.running} rows, running {rows}"
