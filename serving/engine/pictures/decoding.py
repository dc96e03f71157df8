"""Decodes the pictures that requests start from, so that no tenant's pictures delay another's.

On its own threads (decoding releases the interpreter), tenants in turn and one picture of each at a time, within a
budget of pixels. How many pixels a picture takes is read from its header first. Serves any number of event loops.
"""

import threading
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from serving.engine.pictures.codec import MAX_PIXELS, count, decode
from serving.errors import NotReady, QueueFull

THREADS = 2
PIXELS = MAX_PIXELS * 5 // 4  # at once: the largest picture and a usual one beside it
WAITING = 64  # pictures of one tenant that may wait
WAITING_BYTES = 64 * 2**20  # the memory that they may take


@dataclass(eq=False, slots=True)
class _Picture:
    """One picture to decode."""

    tenant: str
    data: bytes
    width: int
    height: int
    pixels: int
    decoded: "Future[Tensor]" = field(default_factory=Future)


class Decoding:
    """The queue of all start pictures of one engine."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "decoding")
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: OrderedDict[str, deque[_Picture]] = OrderedDict()  # the tenant whose turn is next comes first
        self._running: dict[str, _Picture] = {}

    def submit(self, tenant: str, data: bytes, width: int, height: int) -> "Future[Tensor]":
        """`data` as uint8 [3, height, width]; a future that is cancelled in time is not decoded.

        Raises Refused if the header says that it cannot be used, QueueFull if the tenant has too many waiting, NotReady
        after `close`.
        """
        picture = _Picture(tenant, data, width, height, count(data, width, height))
        with self._lock:
            if self._closed:
                raise NotReady("The server is shutting down; try again.")
            mine = self._waiting.setdefault(tenant, deque())
            if len(mine) >= WAITING or mine and len(data) + sum(len(one.data) for one in mine) > WAITING_BYTES:
                raise QueueFull(f"{len(mine)} of your pictures wait to be decoded, and this is one too many.", 1.0)
            mine.append(picture)
            self._start()
        return picture.decoded

    def close(self) -> None:
        """Cancels what waits; what is being decoded finishes."""
        with self._lock:
            self._closed = True
            for pictures in self._waiting.values():
                for picture in pictures:
                    picture.decoded.cancel()
            self._waiting.clear()
        self._threads.shutdown()

    def _start(self) -> None:
        """Starts what may run now; holds the lock."""
        while len(self._running) < THREADS:
            picture = self._next()
            if picture is None:
                return
            self._running[picture.tenant] = picture
            self._threads.submit(self._work, picture)

    def _next(self) -> _Picture | None:
        """The first picture of the first tenant that has none running, if the budget has room for it."""
        room = PIXELS - sum(picture.pixels for picture in self._running.values())
        for tenant, pictures in self._waiting.items():
            if tenant in self._running:
                continue
            if pictures[0].pixels > room:
                return None  # nothing overtakes: else a large picture would wait for ever
            picture = pictures.popleft()
            if pictures:
                self._waiting.move_to_end(tenant)
            else:
                del self._waiting[tenant]
            return picture
        return None

    def _work(self, picture: _Picture) -> None:
        try:
            if picture.decoded.set_running_or_notify_cancel():
                try:
                    picture.decoded.set_result(decode(picture.data, picture.width, picture.height))
                except BaseException as error:
                    picture.decoded.set_exception(error)
        finally:
            with self._lock:
                del self._running[picture.tenant]
                self._start()
