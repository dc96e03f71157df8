"""Decodes the pictures that requests start from, so that no tenant's pictures delay another's.

On its own threads (decoding releases the interpreter), tenants in turn and one picture of each at a time, within a
budget of pixels. How many pixels a picture takes is read from its header first. Serves any number of event loops.
"""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from serving.engine.pictures.codec import MAX_PIXELS, count, decode
from serving.engine.pictures.edit import Edit, decode_edit
from serving.engine.pictures.reference import REFERENCE_SIDE, decode_reference
from serving.engine.request import GenerateRequest
from serving.errors import NotReady, QueueFull

THREADS = 2
PIXELS = MAX_PIXELS * 5 // 4  # at once: the largest picture and a usual one beside it
WAITING = 64  # pictures of one tenant that may wait
WAITING_BYTES = 64 * 2**20  # the memory that they may take


T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Picture(Generic[T]):
    """One picture to decode, by `work`: so many bytes, of which so many pixels come."""

    tenant: str
    work: Callable[[], T]
    bytes: int
    pixels: int
    decoded: "Future[T]" = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Given:
    """The pictures of a request: what it starts from, or edits, and what its prompt refers to; uint8 [3, H, W]."""

    pixels_CHW: Tensor | None = None
    edit: Edit | None = None
    references: tuple[Tensor, ...] = ()


class Decoding:
    """The queue of all start pictures of one engine."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "decoding")
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: OrderedDict[str, deque[_Picture[Any]]] = (
            OrderedDict()
        )  # the tenant whose turn is next comes first
        self._running: dict[str, _Picture[Any]] = {}

    def submit(self, tenant: str, data: bytes, width: int, height: int) -> "Future[Tensor]":
        """`data` as uint8 [3, height, width]; a future that is cancelled in time is not decoded.

        Raises Refused if the header says that it cannot be used, QueueFull if the tenant has too many waiting, NotReady
        after `close`.
        """
        pixels = count(data, width, height)
        return self._submit(_Picture(tenant, lambda: decode(data, width, height), len(data), pixels))

    async def given(self, request: GenerateRequest, multiple_px: int) -> Given:
        """All pictures of a request; `multiple_px` are the sides that references are cut to. Raises as `submit`."""
        found, tenant = Given(), request.tenant
        if request.mask is not None:
            edited: Future[Edit] = self._submit(self._edit(request))
            edit = await asyncio.wrap_future(edited)
            found = Given(edit=edit)
        elif request.image is not None:
            started = self.submit(tenant, request.image, request.width, request.height)
            pixels_CHW = await asyncio.wrap_future(started)
            found = Given(pixels_CHW)
        references = [
            await asyncio.wrap_future(self._submit(self._reference(tenant, data, multiple_px)))
            for data in request.references
        ]
        return replace(found, references=tuple(references)) if references else found

    def _edit(self, request: GenerateRequest) -> _Picture[Edit]:
        """Picture and mask are decoded one after the other."""
        assert request.image is not None and request.mask is not None
        files = [data for data in (request.image, request.mask.data) if data is not None]
        pixels = max(count(data, request.width, request.height) for data in files)
        return _Picture(request.tenant, lambda: decode_edit(request), sum(map(len, files)), pixels)

    def _reference(self, tenant: str, data: bytes, multiple_px: int) -> _Picture[Tensor]:
        pixels = count(data, REFERENCE_SIDE, REFERENCE_SIDE)
        return _Picture(tenant, lambda: decode_reference(data, multiple_px), len(data), pixels)

    def _submit(self, picture: _Picture[T]) -> "Future[T]":
        tenant = picture.tenant
        with self._lock:
            if self._closed:
                raise NotReady("The server is shutting down; try again.")
            mine = self._waiting.setdefault(tenant, deque())
            if len(mine) >= WAITING or mine and picture.bytes + sum(one.bytes for one in mine) > WAITING_BYTES:
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

    def _next(self) -> _Picture[Any] | None:
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

    def _work(self, picture: _Picture[Any]) -> None:
        try:
            if picture.decoded.set_running_or_notify_cancel():
                try:
                    picture.decoded.set_result(picture.work())
                except BaseException as error:
                    picture.decoded.set_exception(error)
        finally:
            with self._lock:
                del self._running[picture.tenant]
                self._start()
