"""Whose a picture is: what was asked when a serial was used, kept on the storage. Only this turns a serial into names.

    marks/serials/<last 16 bits>/<serial>-<request>-<index>-<looks>.json

A small picture carries 16 bits only, and one tenant's pictures of one seed share a serial: of those that fit, the
record whose picture looks most like the one at hand is meant. A record holds no prompt.
"""

import hashlib
import heapq
import time
from collections.abc import Iterable

from serving.marking.code import BITS
from training.storage.closed import Closed
from training.storage.picture_hash import NEAR, distance
from training.storage.storage import NotFound, Storage

_ROOT = "marks/serials"
EXPECTED = 16  # serials at most that a picture is expected to have by its looks
MOST_LISTED = 200_000  # records; beyond it only the noise tells
LISTED_S = 10.0


class WornVersion(Closed):
    """An adapter in a picture."""

    tenant: str
    id: str
    version: str


class Issued(Closed):
    """One picture that was made. `time` is ISO 8601, `looks` its perceptual hash, `unsafe` the safety filter's score.

    A picture that was `withheld` by the filter has been sent to nobody.
    """

    serial: int
    tenant: str
    adapters: tuple[WornVersion, ...]
    request: str
    index: int
    time: str
    looks: str
    unsafe: float | None = None
    withheld: bool = False


class Serials:
    """The records on one storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._names: list[tuple[int, str]] = []
        self._until = 0.0

    def keep(self, issued: Issued) -> None:
        """Writes a record. Raises StorageError."""
        name = hashlib.sha256(f"{issued.request}|{issued.tenant}|{issued.time}".encode()).hexdigest()[:16]
        key = f"{_folder(issued.serial)}/{issued.serial:012x}-{name}-{issued.index}-{issued.looks}.json"
        self._storage.put(key, issued.model_dump_json().encode())
        self._names.append((issued.serial, issued.looks))

    def find(self, serial: int, words: int, looks: str) -> list[Issued]:
        """The records that `words` words of a serial fit, the one that looks most alike first."""
        mask = (1 << BITS * words) - 1
        fitting = [one for one in self._all(_folder(serial)) if one.serial & mask == serial & mask]
        return sorted(fitting, key=lambda one: (distance(one.looks, looks), one.time))

    def alike(self, looks: str) -> list[int]:
        """The serials of the pictures that look most like one, at most `EXPECTED`; none where there are too many.

        Reads names only, and those at most every `LISTED_S` seconds.
        """
        if time.monotonic() >= self._until:
            keys = self._storage.list(_ROOT)
            named = [key.rpartition("/")[2].removesuffix(".json").split("-") for key in keys[: MOST_LISTED + 1]]
            self._names = [(int(parts[0], 16), parts[-1]) for parts in named if len(parts) == 4]
            self._until = time.monotonic() + LISTED_S
        if len(self._names) > MOST_LISTED:
            return []
        near = [(distance(other, looks), serial) for serial, other in self._names]
        return [serial for far, serial in heapq.nsmallest(EXPECTED, near) if far <= NEAR]

    def _all(self, folder: str) -> Iterable[Issued]:
        for key in self._storage.list(folder):
            try:
                yield Issued.model_validate_json(self._storage.get(key))
            except (NotFound, ValueError):
                continue


def _folder(serial: int) -> str:
    return f"{_ROOT}/{serial & 0xFFFF:04x}"
