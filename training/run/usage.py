"""What tenants have used, by day and adapter: images and pixel-steps drawn, training steps, device-seconds.

    usage/<tenant>/<day>/<writer>.json

Every process that counts has a part of its own and rewrites it, so that none waits for another; a reader adds them up.
What a process has counted since its last flush is lost if it is killed.
"""

import json
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from training.storage.interface import NotFound, Storage

What = Literal["images", "pixel_steps", "training_steps", "device_seconds"]
Counts = dict[str, dict[str, float]]  # adapter -> what -> how much
FLUSH_SECONDS = 5.0
_ROOT = "usage"


class UsageBook:
    """Counts of one process. Threads may share it."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._writer = f"{time.time_ns():x}-{secrets.token_hex(4)}"
        self._parts: dict[tuple[str, str], defaultdict[str, defaultdict[str, float]]] = {}
        self._changed: set[tuple[str, str]] = set()
        self._flushed = 0.0
        self._lock = threading.Lock()

    def add(self, tenant: str, adapter: str, counts: Mapping[What, float]) -> None:
        """Counts for a tenant's adapter (empty: the base alone), today."""
        part = (tenant, datetime.now(UTC).strftime("%Y-%m-%d"))
        with self._lock:
            mine = self._parts.setdefault(part, defaultdict(lambda: defaultdict(float)))[adapter]
            for what, amount in counts.items():
                mine[what] += amount
            self._changed.add(part)

    def flush(self, every_s: float = 0.0) -> None:
        """Writes what is new, unless the last time is less than `every_s` seconds ago. Raises StorageError."""
        with self._lock:
            if not self._changed or time.monotonic() - self._flushed < every_s:
                return
            self._flushed = time.monotonic()
            parts = {part: json.dumps(self._parts[part]).encode() for part in self._changed}
            self._changed.clear()
        for (tenant, day), data in parts.items():
            self._storage.put(f"{_ROOT}/{tenant}/{day}/{self._writer}.json", data)


def read_usage(storage: Storage, tenant: str, since: str, until: str) -> dict[str, Counts]:
    """What a tenant has used on the days from `since` to `until` (ISO dates, both included), by day and adapter."""
    found: dict[str, Counts] = {}
    for day in storage.folders(f"{_ROOT}/{tenant}"):
        if not since <= day <= until:
            continue
        total = found.setdefault(day, {})
        for key in storage.list(f"{_ROOT}/{tenant}/{day}"):
            try:
                part: Counts = json.loads(storage.get(key))
            except NotFound:
                continue
            for adapter, counts in part.items():
                mine = total.setdefault(adapter, {})
                for what, amount in counts.items():
                    mine[what] = mine.get(what, 0.0) + amount
    return found


def tenants_seen(storage: Storage) -> list[str]:
    """Every tenant that has used anything, sorted."""
    return storage.folders(_ROOT)


def month_used(storage: Storage) -> dict[str, float]:
    """Device-seconds of this calendar month (UTC), by tenant."""
    month = datetime.now(UTC).strftime("%Y-%m")
    return {
        tenant: sum(
            counts.get("device_seconds", 0.0)
            for day in read_usage(storage, tenant, f"{month}-01", f"{month}-31").values()
            for counts in day.values()
        )
        for tenant in tenants_seen(storage)
    }
