"""What a fleet has accepted: runs on the storage that it is to work off, and what is asked of them later.

    runs/<run>/order.json                     who submitted it and with what; written once
    fleet/runs/<tenant>/<subjects>@<run>      it has not ended: what a driver that starts takes up
    fleet/asks/<time>-<random>.json           an ask (cancel, pause, ...) that the driver has not heeded yet
    fleet/tenants/<tenant>/<kind>/<time>-<run>  the list of a tenant's runs, in the order of submission

Accepted means: all of it is on the storage. Any process may accept and ask; one driver heeds.
"""

import secrets
import time
from typing import Any, Literal, NamedTuple

from pydantic import Field

from training.run.run import RunRecord, RunStore
from training.storage.closed import Closed
from training.storage.interface import NotFound, Storage

RunKind = Literal["job", "run"]
Verb = Literal["cancel", "pause", "resume", "retry"]
_RUNS, _ASKS, _TENANTS = "fleet/runs", "fleet/asks", "fleet/tenants"


class Hook(Closed):
    """Who is told how it ends, and with what the message is signed."""

    url: str
    secret: str
    events: tuple[str, ...] = ()


class Order(Closed):
    """What came with a run of so many `subjects`. `about`: what its submitter sent, as it is shown; `files`: ids of its
    uploaded files."""

    run: str
    tenant: str
    kind: RunKind
    created: float = Field(default_factory=time.time)
    priority: int = 0
    subjects: int = 1
    files: tuple[str, ...] = ()
    hook: Hook | None = None
    about: dict[str, Any] = {}


class Ask(Closed):
    """What is asked of a run; no `subjects` means all of them."""

    run: str
    verb: Verb
    subjects: tuple[str, ...] = ()


class Asked(NamedTuple):
    """An ask and the key it lies at."""

    key: str
    ask: Ask


def new_id(prefix: str) -> str:
    """An id that nobody guesses; later ones sort behind earlier ones."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


def accept(storage: Storage, record: RunRecord, manifest_yaml: str, order: Order) -> None:
    """Puts a run on the storage for the fleet; once this returns it is accepted. Repeating it changes nothing."""
    store = RunStore(storage, record.run)
    if not storage.create(_order_key(record.run), order.model_dump_json(indent=1).encode()):
        order = read_order(storage, record.run) or order  # an earlier try that died half-way
    if not storage.exists(f"runs/{record.run}/run.json"):
        store.create(record, manifest_yaml)
    storage.put(_listed(order), b"{}")
    if store.record().state == "running":
        take_up(storage, order)


def read_order(storage: Storage, run: str) -> Order | None:
    """What came with a run; None if there is no such run, or it was not submitted to a fleet."""
    try:
        return Order.model_validate_json(storage.get(_order_key(run)))
    except NotFound:
        return None


def orders_of(storage: Storage, tenant: str, kind: RunKind) -> list[str]:
    """The ids of a tenant's runs of a kind, in the order of submission."""
    return [key.rsplit("/", 1)[1].partition("-")[2] for key in storage.list(f"{_TENANTS}/{tenant}/{kind}")]


def unfinished(storage: Storage, tenant: str | None = None) -> list[str]:
    """The runs, of one tenant or of all, that were accepted and have not ended, in no order. One listing."""
    return [key.partition("@")[2] for key in storage.list(_RUNS if tenant is None else f"{_RUNS}/{tenant}")]


def waiting_of(storage: Storage, tenant: str) -> int:
    """The subjects of a tenant's runs that have not ended. One listing."""
    return sum(int(key.rsplit("/", 1)[1].partition("@")[0]) for key in storage.list(f"{_RUNS}/{tenant}"))


def is_unfinished(storage: Storage, order: Order) -> bool:
    """Whether the fleet is still to work on a run."""
    return storage.exists(_marker(order))


def take_up(storage: Storage, order: Order) -> None:
    """A run is to be worked on, for the first time or again."""
    storage.put(_marker(order), b"{}")


def close(storage: Storage, order: Order) -> None:
    """A run has ended, and everything about its end is on the storage."""
    storage.delete(_marker(order))


def ask(storage: Storage, ask: Ask) -> str:
    """Leaves an ask for the driver; returns its key, which is there until the driver has heeded it."""
    key = f"{_ASKS}/{new_id('')}.json"
    storage.put(key, ask.model_dump_json().encode())
    return key


def asks(storage: Storage) -> list[Asked]:
    """What has been asked and not heeded yet, in the order of asking."""
    found = []
    for key in storage.list(_ASKS):
        try:
            found.append(Asked(key, Ask.model_validate_json(storage.get(key))))
        except NotFound:  # another driver has heeded it meanwhile
            continue
    return found


def _marker(order: Order) -> str:
    return f"{_RUNS}/{order.tenant}/{order.subjects}@{order.run}"


def _order_key(run: str) -> str:
    return f"runs/{run}/order.json"


def _listed(order: Order) -> str:
    return f"{_TENANTS}/{order.tenant}/{order.kind}/{int(order.created * 1e6):016d}-{order.run}"
