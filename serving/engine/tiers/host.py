"""Adapters in host memory, between the device's slots and the registry: loaded once, in the background.

A loader thread fetches what is asked for and not here. Requests for one cold adapter share its load; a load that fails
fails only those that wait for it, is not remembered, and costs no other adapter its place. What waits for admission is
pinned; the rest stays, least recently used out first, within a budget of bytes. Knows nothing about slots or HTTP.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that lies in memory."""

    @property
    def nbytes(self) -> int: ...


HostKey = TypeVar("HostKey", bound=Hashable)
HostValue = TypeVar("HostValue", bound=Sized)


class HostCache(Generic[HostKey, HostValue]):
    """`fetch(key)` runs on one of `loaders` threads; `woken` is called (there) whenever a load has ended."""

    def __init__(
        self, fetch: Callable[[HostKey], HostValue], *, budget_bytes: int, loaders: int, woken: Callable[[], None]
    ) -> None:
        self._fetch = fetch
        self._budget = budget_bytes
        self._woken = woken
        self._pool = ThreadPoolExecutor(loaders, thread_name_prefix="load-adapter")
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

    def __len__(self) -> int:
        return len(self._held)

    def want(self, key: HostKey) -> Future[HostValue]:
        """Pins `key` and answers its value, at once or when its load ends. Give the pin back with `release`."""
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
        """Forgets an adapter, unless somebody waits with it."""
        with self._lock:
            if key in self._held and key not in self._pins:
                self.bytes -= self._held.pop(key).nbytes

    def close(self) -> None:
        """Waits for nothing: loads that have not begun are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, key: HostKey, future: Future[HostValue]) -> None:
        try:
            value = self._fetch(key)
        except BaseException as error:  # whatever it is, it belongs to those who wait for this adapter
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
