"""The audit log: what was agreed to, taken back and erased, in order, each entry chained to the one before by its hash.

    audit/<number, 12 digits>.json

An entry is created, never changed. Whoever changes, removes or puts one in between breaks the chain from there on, and
`verify` says where. Removing the newest entries is seen only by who has noted the last hash.
"""

import json
from datetime import UTC, datetime
from typing import NamedTuple

from pydantic import ValidationError

from training.storage.closed import Closed
from training.storage.storage import NotFound, Storage, StorageUnavailable, content_id

_ROOT = "audit"
_TRIES = 100
FIRST = "0" * 64


class AuditEntry(Closed):
    """One event. `previous` is the SHA-256 of the entry before, as it lies on the storage."""

    number: int
    time: str
    event: str
    tenant: str
    subject: str
    detail: dict[str, str] = {}
    previous: str


class Verified(NamedTuple):
    """What `verify` found: how many entries hold, the last one's hash, and what is wrong with the next if anything."""

    entries: int
    last: str
    broken: str | None


def append(storage: Storage, event: str, tenant: str, subject: str, **detail: str) -> AuditEntry:
    """Writes an entry at the end of the log. Many may write at once. Raises StorageError."""
    number, previous = _last(storage)
    for _ in range(_TRIES):
        entry = AuditEntry(
            number=number + 1,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            event=event,
            tenant=tenant,
            subject=subject,
            detail=detail,
            previous=previous,
        )
        if storage.create(_key(entry.number), entry.model_dump_json().encode()):
            return entry
        number, previous = number + 1, content_id(storage.get(_key(number + 1)))
    raise StorageUnavailable("The audit log is written to all the time. Try again.")


def entries(storage: Storage) -> list[AuditEntry]:
    """All entries that can be read, in order."""
    return [AuditEntry.model_validate_json(storage.get(key)) for key in storage.list(_ROOT)]


def verify(storage: Storage) -> Verified:
    """Reads the whole log and checks its chain."""
    previous, done = FIRST, 0
    for key in storage.list(_ROOT):
        data = storage.get(key)
        try:
            entry = AuditEntry.model_validate_json(data)
        except ValidationError:
            return Verified(done, previous, f"'{key}' is no entry")
        if key != _key(done + 1) or entry.number != done + 1:
            return Verified(done, previous, f"entry {done + 1} is missing: '{key}' comes next")
        if entry.previous != previous:
            return Verified(done, previous, f"'{key}' does not follow the entry before: one of the two was changed")
        previous, done = content_id(data), entry.number
    return Verified(done, previous, None)


def _last(storage: Storage) -> tuple[int, str]:
    keys = storage.list(_ROOT)
    if not keys:
        return 0, FIRST
    try:
        data = storage.get(keys[-1])
        return int(json.loads(data)["number"]), content_id(data)
    except (NotFound, ValueError, KeyError, TypeError):
        raise StorageUnavailable(f"The audit log's last entry '{keys[-1]}' cannot be read.") from None


def _key(number: int) -> str:
    return f"{_ROOT}/{number:012d}.json"
