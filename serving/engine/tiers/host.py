"""Adapters in host memory, between the device's slots and the registry: loaded once, in the background.

A loader thread fetches an adapter that is wanted and not here. Requests for the same adapter share its load; a load
that fails is an error of those that wait for it only, is not remembered, and evicts nothing. Adapters that a waiting
request needs are pinned; the others are evicted, least recently used first, beyond a budget of bytes. Knows nothing
about slots or HTTP.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that lies in memory."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""


HostKey = TypeVar("HostKey", bound=Hashable)
HostValue = TypeVar("HostValue", bound=Sized)


class HostCache(Generic[HostKey, HostValue]):
    """`fetch(key)` runs on one of `loaders` threads; `woken` is called (there) whenever a load has ended."""

    def __init__(
        self,
        fetch: Callable[[HostKey], HostValue],
        *,
        budget_bytes: int,
        loaders: int,
        woken: Callable[[], None],
        threads: str = "load-adapter",
    ) -> None:
        self._fetch = fetch
        self._budget = budget_bytes
        self._woken = woken
        self._pool = ThreadPoolExecutor(loaders, thread_name_prefix=threads)
        self._lock = threading.Lock()
        self._held: OrderedDict[HostKey, HostValue] = OrderedDict()  # least recently used first
        self._loading: dict[HostKey, Future[HostValue]] = {}
        self._pins: dict[HostKey, int] = {}
        self.bytes = 0
        self.hits = 0
        self.loads = 0
        self.failures = 0
        self.evictions = 0

    def __contains__(self, key: HostKey) -> bool:
        return key in self._held

    def keys(self) -> tuple[HostKey, ...]:
        """What is in memory."""
        with self._lock:
            return tuple(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def want(self, key: HostKey) -> Future[HostValue]:
        """Pins `key` and returns a future of its value, which is done when its load ends. Undone by `release`."""
        with self._lock:
            self._pins[key] = self._pins.get(key, 0) + 1
            if key in self._held:
                self._held.move_to_end(key)
                self.hits += 1
                here: Future[HostValue] = Future()
                here.set_result(self._held[key])
                return here
            if key not in self._loading:
                self._loading[key] = Future()
                self._pool.submit(self._load, key, self._loading[key])
            return self._loading[key]

    def release(self, key: HostKey) -> None:
        """Undoes one `want`."""
        with self._lock:
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                self._shrink()

    def drop(self, key: HostKey) -> None:
        """Forgets an adapter, unless it is pinned."""
        with self._lock:
            if key in self._held and key not in self._pins:
                self.bytes -= self._held.pop(key).nbytes

    def close(self) -> None:
        """Stops the loaders without waiting; loads that have not begun are cancelled."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, key: HostKey, future: Future[HostValue]) -> None:
        try:
            value = self._fetch(key)
        except BaseException as error:  # any error is passed to those who wait for this adapter
            with self._lock:
                del self._loading[key]
                self.failures += 1
            future.set_exception(error)
        else:
            with self._lock:
                del self._loading[key]
                self._held[key] = value
                self.bytes += value.nbytes
                self.loads += 1
                self._shrink()
            future.set_result(value)
        self._woken()

    def _shrink(self) -> None:
        for key in [key for key in self._held if key not in self._pins]:
            if self.bytes <= self._budget:
                return
            self.bytes -= self._held.pop(key).nbytes
            self.evictions += 1
