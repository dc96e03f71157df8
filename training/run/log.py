"""A run's log on the storage: what happened when, one JSON object a line.

A storage cannot append, so a driver writes a part of its own and rewrites it while it is short.
"""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from training.run.run import RunStore

LINES = 1000


class Line(NamedTuple):
    """A line of a run's log: when it was written (seconds since the epoch), its text, and numbers for programs.

    `id` orders the lines of a run and stays the same.
    """

    id: str
    time: float
    text: str
    data: dict[str, Any]


class RunLog:
    """`runs/<run>/log/<part>.jsonl`. Parts sort by the time they were begun."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._lines: list[str] = []
        self._flushed = 0
        self._flushed_at = 0.0
        self._part = self._new_part()

    def add(self, text: str, data: Mapping[str, Any] | None = None) -> None:
        """Adds a line, with the time; `flush` writes it. `data`: what programs may want to know of it."""
        line: dict[str, Any] = {"time": round(time.time(), 3), "text": text}
        self._lines.append(json.dumps(line | ({"data": dict(data)} if data else {}), ensure_ascii=False))

    def flush(self, every_s: float = 0.0) -> None:
        """Writes what is new, unless the last time is less than `every_s` seconds ago."""
        if len(self._lines) == self._flushed or time.monotonic() - self._flushed_at < every_s:
            return
        self._store.storage.put(self._part, "".join(f"{line}\n" for line in self._lines).encode())
        self._flushed, self._flushed_at = len(self._lines), time.monotonic()
        if self._flushed >= LINES:
            self._lines, self._flushed, self._part = [], 0, self._new_part()

    def _new_part(self) -> str:
        return f"runs/{self._store.run}/log/{time.time_ns():020d}.jsonl"


def read_log(store: RunStore, subject: str | None = None) -> Iterator[tuple[float, str]]:
    """Time (seconds since the epoch) and text of each line; of one subject if given."""
    for line in read_lines(store):
        if subject is None or line.text.startswith(f"{subject}:"):
            yield line.time, line.text


def read_lines(store: RunStore) -> Iterator[Line]:
    """Every line of a run's log, the earliest first."""
    for part in store.storage.list(f"runs/{store.run}/log"):
        began = part.rsplit("/", 1)[1].removesuffix(".jsonl")
        for number, line in enumerate(store.storage.get(part).decode().splitlines()):
            entry = json.loads(line)
            yield Line(f"{int(began):x}-{number:04d}", entry["time"], entry["text"], entry.get("data", {}))
