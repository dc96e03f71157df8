"""Leader election on a storage: only one process drives a run, or makes what is cached. The others wait, and take over
when it is dead.

A key of the storage is compare-and-swapped. It holds no time: a leader is dead when its process is known to be, or when
its key has not changed for a while on the observer's own clock. So clocks may jump and differ.
"""

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from training.storage.closed import Closed
from training.storage.interface import NotFound, Storage, StorageUnavailable

RENEW_SECONDS = 5.0
DEAD_SECONDS = 30.0  # six renewals missed


class Leader(Closed):
    """The process that leads. `token` grows with every change of leader; `beat` with every sign of life."""

    token: int
    owner: str
    host: str
    pid: int
    process: str
    beat: int = 0
    done: bool = False


class Lost(Exception):
    """Another process leads now; this one must write nothing more."""


class Lead:
    """One process' claim to the lead at `key`. `clock` is monotonic, in seconds."""

    def __init__(self, storage: Storage, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage = storage
        self._key = key
        self._clock = clock
        self._owner = secrets.token_hex(8)
        self._mine: tuple[Leader, str] | None = None
        self._renewed = 0.0
        self._seen: tuple[str, float] | None = None

    def acquire(self) -> Leader | None:
        """Takes the lead. Returns None, or the living process that leads."""
        leader, tag = self._read()
        mine = leader is not None and leader.owner == self._owner  # it could not be renewed or released
        if leader is not None and not mine and not leader.done and self._lives(leader, tag):
            return leader
        claim = Leader(
            token=leader.token + 1 if leader else 1,
            owner=self._owner,
            host=_host(),
            pid=os.getpid(),
            process=_process(os.getpid()),
        )
        if self._storage.swap(self._key, claim.model_dump_json().encode(), tag):
            self._remember(claim)
            return None
        return self.acquire()

    def renew(self) -> None:
        """Shows that this process lives, every few seconds. Raises Lost if another one has taken over."""
        if self._mine is None:
            raise Lost
        if self._clock() - self._renewed >= RENEW_SECONDS:
            leader, tag = self._mine
            self._write(leader.model_copy(update={"beat": leader.beat + 1}), tag)

    def release(self) -> None:
        """Gives the lead up, if it is still held."""
        if self._mine is not None:
            leader, tag = self._mine
            with contextlib.suppress(Lost, StorageUnavailable):
                self._write(leader.model_copy(update={"done": True}), tag)
            self._mine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def living(self) -> Leader | None:
        """The process that leads, unless it is known to be dead. Does not wait: one that is silent counts as living."""
        leader, tag = self._read()
        return leader if leader is not None and not leader.done and self._lives(leader, tag) else None

    def _write(self, leader: Leader, tag: str) -> None:
        if not self._storage.swap(self._key, leader.model_dump_json().encode(), tag):
            there, _ = self._read()
            if there != leader:  # else the store did it and its response was lost
                self._mine = None
                raise Lost
        self._remember(leader)

    def _remember(self, leader: Leader) -> None:
        there, tag = self._read()
        if there is None or tag is None or there.owner != self._owner:
            self._mine = None
            raise Lost
        self._mine, self._renewed = (leader, tag), self._clock()

    def _read(self) -> tuple[Leader | None, str | None]:
        try:
            data, tag = self._storage.get_tagged(self._key)
        except NotFound:
            return None, None
        return Leader.model_validate_json(data), tag

    def _lives(self, leader: Leader, tag: str | None) -> bool:
        if leader.host == _host():
            return _process(leader.pid) == leader.process
        if self._seen is None or self._seen[0] != tag:
            self._seen = (tag or "", self._clock())
        return self._clock() - self._seen[1] < DEAD_SECONDS


def _host() -> str:
    """This machine since its last boot: a process id means something only there."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()} {boot} {namespace}".strip()


def _process(pid: int) -> str:
    """What tells a process from another one with the same id later; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return "" if Path("/proc/self/stat").exists() else "unknown"
    return "" if fields[0] == "Z" else fields[19]  # state; start in ticks since boot
