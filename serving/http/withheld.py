"""What may not be served: adapters whose subject was taken back, and those that the operator has suspended.

Both are facts on the storage, so a command on another machine works like a call to this server. They are read every
`PERIOD_S` seconds while requests come; what is found is told to every engine, which ends the requests that wear it.

    suspensions/<tenant>/<id>.json      until it is lifted
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from serving.engine.request import GenerateRequest
from serving.errors import Withheld
from serving.http.library import Library
from training.errors import UserError
from training.storage import audit
from training.storage.closed import Closed
from training.storage.consents import list_revocations
from training.storage.erasure import expire
from training.storage.storage import Storage

logger = logging.getLogger(__name__)
PERIOD_S = 1.0
EXPIRY_S = 60.0
_SUSPENDED = "suspensions"


class Suspension(Closed):
    """An adapter that the operator has taken off, and why."""

    tenant: str
    id: str
    time: str
    reason: str


def suspend(storage: Storage, tenant: str, id: str, reason: str) -> None:
    """Takes an adapter off until it is lifted."""
    one = Suspension(tenant=tenant, id=id, time=datetime.now(UTC).isoformat(timespec="seconds"), reason=reason)
    if storage.create(f"{_SUSPENDED}/{tenant}/{id}.json", one.model_dump_json().encode()):
        audit.append(storage, "suspended", tenant, id, reason=reason)


def lift(storage: Storage, tenant: str, id: str) -> None:
    """Puts a suspended adapter back."""
    if storage.exists(f"{_SUSPENDED}/{tenant}/{id}.json"):
        storage.delete(f"{_SUSPENDED}/{tenant}/{id}.json")
        audit.append(storage, "lifted", tenant, id)


def withheld_names(storage: Storage) -> frozenset[str]:
    """`tenant/id` of everything that may not be served now."""
    keys = storage.list(_SUSPENDED)
    suspended = {key.removeprefix(f"{_SUSPENDED}/").removesuffix(".json") for key in keys}
    revoked = {name for one in list_revocations(storage) for name in (f"{one.tenant}/{one.subject}", *one.adapters)}
    return frozenset(suspended | revoked)


class WithheldNames:
    """What one HTTP app knows of it; `watch` keeps it fresh."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._storage = library.registry.storage
        self.names: frozenset[str] = frozenset()
        self._read_s = float("-inf")
        self._expired_s = time.monotonic()

    def check(self, request: GenerateRequest) -> None:
        """Raises Withheld if a request wears what may not be served."""
        for use in request.adapters:
            if f"{use.ref.tenant}/{use.ref.id}" in self.names:
                raise withheld(f"{use.ref.tenant}/{use.ref.id}")

    def refresh(self) -> bool:
        """Reads the storage again; whether anything has changed. Blocks."""
        now = time.monotonic()
        if now - self._expired_s >= EXPIRY_S:
            self._expired_s = now
            expire(self._storage)
        found = withheld_names(self._storage)
        changed = found != self.names
        for name in found ^ self.names:
            tenant, _, id = name.partition("/")
            self._library.known.forget(tenant, id)
        self.names = self._library.withheld = found
        return changed

    async def watch(self, tell: Callable[[frozenset[str]], Awaitable[None]]) -> None:
        """Reads again and again, and tells the engines; ends when it is cancelled."""
        while True:
            try:
                if await asyncio.to_thread(self.refresh) or self.names:
                    await tell(self.names)
            except UserError as error:
                logger.error("what is withheld cannot be read: %s", error)
            await asyncio.sleep(PERIOD_S)


def withheld(name: str) -> Withheld:
    """The error of a request that wears it."""
    return Withheld(
        f"Adapter '{name}' is withdrawn: its subject's consent was taken back, or the operator took it off."
    )
