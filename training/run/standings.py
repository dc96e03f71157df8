"""How the subjects of a queue stand: their records, who waits for which profile, and what changed when. Plain Python.

It knows nothing of lanes and leases: it is told what happened, and numbers every change.
"""

import bisect
import time
from collections.abc import Iterator
from typing import NamedTuple

from training.run.choosing import QueuedSubject
from training.run.lease import Entry
from training.run.run import ENDED, Attempt, State
from training.run.source import EndKind, Release, Why

KEPT_NOTES = 1000
CANCELLED = "cancelled by the user"


class Note(NamedTuple):
    """Something a lane had to say, and the number of the change it came with."""

    seq: int
    text: str


class Standings:
    """`items` by key; `waiting`: the keys that wait for each profile, in order; `seq`: the last change."""

    def __init__(self, max_attempts: int) -> None:
        self.items: dict[str, QueuedSubject] = {}
        self.waiting: dict[int, list[str]] = {}
        self.seq = 0
        self._max_attempts = max_attempts
        self._notes: list[Note] = []
        self._added = 0

    def add(self, entry: Entry) -> None:
        """A subject comes in; one that waits already, or trains, stays as it is."""
        before = self.items.get(entry.key)
        if before is not None and before.record.state not in ENDED:
            return
        self._added += 1
        self.items[entry.key] = QueuedSubject(
            entry.record, entry.profile, entry.priority, self._added, entry.reserve, entry.run, entry.tenant
        )
        if entry.record.state not in ENDED and entry.record.state != "paused":
            self.wait(entry.key)

    def remove(self, run: str) -> None:
        """Forgets the subjects of a run."""
        for key in [key for key, item in self.items.items() if item.run == run]:
            del self.items[key]

    def open(self, key: str) -> QueuedSubject | None:
        """A subject that has not ended; None for others."""
        item = self.items.get(key)
        return None if item is None or item.record.state in ENDED else item

    def in_order(self, keys: set[str]) -> list[str]:
        """The keys in the order in which their subjects came in."""
        return sorted(keys, key=lambda key: self.items[key].order)

    def wait(self, key: str) -> None:
        """Queued by priority, then in manifest order: a subject that comes back does not go to the end."""
        waiting = self.waiting.setdefault(self.items[key].profile, [])
        bisect.insort(waiting, key, key=lambda other: (-self.items[other].priority, self.items[other].order))

    def leave(self, key: str) -> None:
        """It waits no more."""
        self.waiting[self.items[key].profile].remove(key)

    def waiting_keys(self) -> Iterator[str]:
        """All that wait."""
        return (key for keys in self.waiting.values() for key in keys)

    def change(self, key: str, **news: object) -> None:
        """Takes news into a subject's record; what changes nothing has no number."""
        item = self.items[key]
        if any(getattr(item.record, name) != value for name, value in news.items()):
            self.seq += 1
            item.record = item.record.model_copy(update={**news, "updated": time.time()})
            item.seq = self.seq

    def end(self, key: str, state: State, *, reason: str | None = None, version: str | None = None) -> None:
        """A subject ends."""
        self.change(key, state=state, reason=reason, version=version or self.items[key].record.version)

    def attempt(self, key: str, reason: str, kind: Why) -> None:
        """An attempt is over, and kept in the record."""
        item = self.items[key]
        attempt = Attempt(started=item.since, ended=time.time(), reason=reason, kind=kind)
        item.losses += kind in ("lost", "unknown")
        self.change(key, attempts=(*item.record.attempts, attempt))
        self.note(f"{key}: {reason}")

    def again(self, key: str, reason: str, kind: EndKind | Release) -> None:
        """Back into the queue with one attempt more; fails where the counted attempts are used up."""
        if kind != "stopped":
            self.attempt(key, reason, kind)
        item = self.items[key]
        if item.cancel:
            self.end(key, "cancelled", reason=CANCELLED)
        elif item.pause:
            self.change(key, state="paused")
        elif item.losses >= self._max_attempts:
            self.end(key, "failed", reason=f"{reason} (attempt {item.losses} of {self._max_attempts})")
        else:
            self.change(key, state="queued")
            self.wait(key)

    def note(self, text: str) -> None:
        """Something for the log."""
        self.seq += 1
        self._notes = [*self._notes[-KEPT_NOTES:], Note(self.seq, text)]

    def notes(self, since: int) -> tuple[str, ...]:
        """The notes after a number."""
        return tuple(note.text for note in self._notes if note.seq > since)
