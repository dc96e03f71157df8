"""Replies by `Idempotency-Key`: a request that is sent again gets the first one's reply, and is not worked on twice.

For one event loop. A disconnect does not stop a request that has a key, since the client's retry will ask for it.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
KEPT_S = 600.0
KEPT = 256
KEPT_OF_ONE = 32


class KeyReused(Exception):
    """The key has been used for another request."""


@dataclass(eq=False, slots=True)
class _Reply(Generic[T]):
    digest: str
    task: "asyncio.Task[T]"
    since: float


class Replies(Generic[T]):
    """Keeps replies for ten minutes, the last 256 in all and 32 of a tenant. Failures are not kept."""

    def __init__(self) -> None:
        self._replies: OrderedDict[tuple[str, str], _Reply[T]] = OrderedDict()

    async def once(self, tenant: str, key: str, digest: str, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The reply under `key`, made at most once. Raises KeyReused if the key came with another `digest`."""
        self._clean()
        reply = self._replies.get((tenant, key))
        if reply is None:
            reply = _Reply(digest, asyncio.ensure_future(make()), time.monotonic())
            self._replies[tenant, key] = reply
            reply.task.add_done_callback(lambda task: self._ended(tenant, key, task))
            self._bound(tenant)
        elif reply.digest != digest:
            raise KeyReused
        return await asyncio.shield(reply.task)

    def _ended(self, tenant: str, key: str, task: "asyncio.Task[T]") -> None:
        if task.cancelled() or task.exception() is not None:
            self._replies.pop((tenant, key), None)

    def _clean(self) -> None:
        oldest = time.monotonic() - KEPT_S
        for key, reply in list(self._replies.items()):
            if reply.since > oldest:
                return
            if reply.task.done():
                del self._replies[key]

    def _bound(self, tenant: str) -> None:
        mine = [key for key in self._replies if key[0] == tenant]
        for key in [*mine[:-KEPT_OF_ONE], *list(self._replies)[:-KEPT]]:
            if key in self._replies and self._replies[key].task.done():
                del self._replies[key]
