"""A run: one submitted manifest, on the storage, which is the only source of truth: drivers and Ray heads may die.

runs/<run>/manifest.yaml                                what was submitted, word for word
runs/<run>/run.json                                     RunRecord
runs/<run>/subjects/<id>/state.json                     SubjectRecord
runs/<run>/subjects/<id>/checkpoints/<step>.safetensors
"""

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field, ValidationError

from training.errors import UserError
from training.manifest.manifest import Manifest
from training.run.source import Why
from training.storage.closed import Closed
from training.storage.interface import NotFound, Storage

State = Literal["queued", "preparing", "training", "evaluating", "paused", "published", "failed", "cancelled", "reused"]
ENDED: frozenset[State] = frozenset({"published", "failed", "cancelled", "reused"})
RunState = Literal["running", "done", "failed", "cancelled"]


class Attempt(Closed):
    """One try at a subject, and why it ended. Times are seconds since the epoch."""

    started: float
    ended: float
    reason: str
    kind: Why


class SubjectRecord(Closed):
    """How a subject stands. `step` of `max_steps` optimizer steps are done; it has been worked on for `seconds`."""

    id: str
    state: State = "queued"
    step: int = 0
    max_steps: int = 0
    loss: float | None = None
    version: str | None = None
    seconds: float = 0.0
    pack: int | None = None
    reason: str | None = None
    fingerprint: str | None = None
    attempts: tuple[Attempt, ...] = ()
    warnings: tuple[str, ...] = ()
    updated: float = Field(default_factory=time.time)


class RunRecord(Closed):
    """A run as a whole. `digest` identifies what was asked for: the same manifest has the same."""

    run: str
    name: str
    tenant: str
    base: str
    base_hash: str
    digest: str
    state: RunState = "running"
    created: float = Field(default_factory=time.time)
    finished: float | None = None
    manifest: Manifest


class RunStore:
    """Reads and writes one run."""

    def __init__(self, storage: Storage, run: str) -> None:
        self.storage = storage
        self.run = run
        self._folder = f"runs/{run}"

    def create(self, record: RunRecord, manifest_yaml: str) -> None:
        """Writes a new run. Raises StorageError."""
        self.save(record)  # first: from here on a second submission finds it
        self.storage.put(f"{self._folder}/manifest.yaml", manifest_yaml.encode())

    def save(self, record: RunRecord) -> None:
        """Writes the run's record. Raises StorageError."""
        self.storage.put(f"{self._folder}/run.json", record.model_dump_json(by_alias=True, indent=1).encode())

    def record(self) -> RunRecord:
        """The run's record. Raises UserError for a run that is not there, or that this version cannot read."""
        try:
            return RunRecord.model_validate_json(self.storage.get(f"{self._folder}/run.json"))
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join(map(str, detail["loc"])) or "the file"
            raise UserError(
                f"Run '{self.run}' cannot be read by this version of dreamfleet: {where}: {detail['msg']}. Use the "
                "version that wrote it."
            ) from None
        except NotFound:
            known = ", ".join(list_runs(self.storage)[-5:]) or "none"
            raise UserError(f"Run '{self.run}' is not in this storage. The latest here: {known}.") from None

    def save_subject(self, record: SubjectRecord) -> None:
        """Writes a subject's record. Raises StorageError."""
        self.storage.put(self.subject_key(record.id, "state.json"), record.model_dump_json(indent=1).encode())

    def subject(self, id: str) -> SubjectRecord | None:
        """A subject's record; None if there is none yet."""
        try:
            return SubjectRecord.model_validate_json(self.storage.get(self.subject_key(id, "state.json")))
        except NotFound:
            return None

    def subject_key(self, id: str, *parts: str) -> str:
        """The storage key of something of a subject of this run."""
        return "/".join((self._folder, "subjects", id, *parts))

    @property
    def driver_key(self) -> str:
        """The storage key at which drivers of this run settle who leads."""
        return f"{self._folder}/driver.json"

    # -- checkpoints --

    def save_checkpoint(self, id: str, step: int, data: bytes, keep: int, spared: frozenset[int] = frozenset()) -> None:
        """Writes a checkpoint, then removes all but the `keep` latest and those whose step is `spared`."""
        self.storage.put(self._checkpoint_key(id, step), data)
        for old in self.checkpoints(id)[:-keep]:
            if old not in spared:
                self.storage.delete(self._checkpoint_key(id, old))

    def checkpoints(self, id: str) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        folder = self.subject_key(id, "checkpoints")
        names = (key.rsplit("/", 1)[1] for key in self.storage.list(folder))
        return sorted(int(name.removesuffix(".safetensors")) for name in names if name.endswith(".safetensors"))

    def load_checkpoints(self, id: str) -> Iterator[tuple[int, bytes]]:
        """Step and bytes of each checkpoint, the latest first."""
        for step in reversed(self.checkpoints(id)):
            yield step, self.storage.get(self._checkpoint_key(id, step))

    def _checkpoint_key(self, id: str, step: int) -> str:
        return self.subject_key(id, "checkpoints", f"{step:08d}.safetensors")


def end_run(store: RunStore, record: RunRecord, subjects: Sequence[SubjectRecord]) -> RunRecord:
    """Writes down that a run has ended, and how, by the states of its subjects; returns its record."""
    states = {subject.state for subject in subjects}
    state = "failed" if "failed" in states else "cancelled" if "cancelled" in states else "done"
    ended = record.model_copy(update={"state": state, "finished": time.time()})
    store.save(ended)
    return ended


def digest_of(manifest: Manifest, base_hash: str) -> str:
    """What identifies a submission: the resolved manifest (wherever it lies) and the base. sha256, hex."""
    asked = manifest.model_dump_json(by_alias=True, exclude={"root"})
    return hashlib.sha256(f"{base_hash}\n{asked}".encode()).hexdigest()


def new_run_id(storage: Storage, name: str, digest: str) -> str:
    """A free id like `demo-20261122-1f3a`: the manifest's name, the day (UTC), and four letters of its digest."""
    day = datetime.now(UTC).strftime("%Y%m%d")
    taken = set(list_runs(storage))
    for turn in itertools.count():
        tag = hashlib.sha256(f"{digest}{turn}".encode()).hexdigest()[:4] if turn else digest[:4]
        if (run := f"{name}-{day}-{tag}") not in taken:
            return run
    raise AssertionError("count() does not end")


def list_runs(storage: Storage) -> list[str]:
    """The ids of all runs, the earliest first by name."""
    return storage.folders("runs")


def find_unfinished(storage: Storage, name: str, digest: str) -> RunRecord | None:
    """The run that was submitted with the same manifest and has not ended, if any: it is resumed."""
    records, _ = read_runs(storage, f"{name}-")
    same = (r for r in records if r.name == name and r.digest == digest and r.state == "running")
    return next(same, None)


def read_runs(storage: Storage, prefix: str = "") -> tuple[list[RunRecord], list[str]]:
    """The records of all runs whose id begins with `prefix`, the earliest first.

    With them, what is wrong with those that cannot be read, a sentence each. A run whose driver died before it wrote
    the record is none yet.
    """
    records, problems = [], []
    for run in list_runs(storage):
        if not run.startswith(prefix) or not storage.exists(f"runs/{run}/run.json"):
            continue
        try:
            records.append(RunStore(storage, run).record())
        except UserError as error:
            problems.append(str(error))
    return sorted(records, key=lambda record: record.created), problems
