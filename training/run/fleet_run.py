"""A run that a fleet works on, as it lies on the storage: opened, and opened again after it has ended."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from training.base.files.outline import Outline
from training.manifest.plan import rows_of
from training.manifest.subject import SubjectSpec
from training.photos.files import FileCache
from training.run import accepted
from training.run.accepted import Order
from training.run.home import Home
from training.run.run import ENDED, RunRecord, RunStore, SubjectRecord
from training.run.standing import Left
from training.run.states import States
from training.run.submission import Submission, settle
from training.storage.interface import Storage


@dataclass
class FleetRun:
    """A run under way. `told`: subjects whose end has been told."""

    order: Order
    record: RunRecord
    states: States
    home: Home
    told: set[str] = field(default_factory=set)

    def spec(self, id: str) -> SubjectSpec:
        """The settings of a subject."""
        return next(spec for spec in self.record.manifest.subjects if spec.id == id)

    def left(self, id: str) -> Left:
        """What a subject still has to be trained."""
        record, spec = self.states.records[id], self.spec(id)
        rows = rows_of(spec) * spec.train.gradient_accumulation_steps
        return self.home.key(id), max(0, record.max_steps - record.step), rows

    def revive(self, ids: set[str]) -> list[SubjectRecord]:
        """Those of `ids` that failed or were cancelled, queued again; what cannot be trained at all is left out."""
        again = []
        for id in sorted(ids):
            before = self.states.records.get(id)
            if before is not None and before.state in ("failed", "cancelled") and before.fingerprint is not None:
                news = {"state": "queued", "reason": None, "updated": time.time()}
                again.append(before.model_copy(update=news))
                self.states.change(again[-1])
                self.told.discard(id)
        return again


def open_run(storage: Storage, run: str, base: Outline, base_hash: str) -> FleetRun | None:
    """A run with its subjects as they stand: settled, or failed if the run was submitted for another base.

    None if its acceptance died before it was answered. Raises UserError for a run that cannot be read.
    """
    order = accepted.read_order(storage, run)
    if order is None:
        return None
    store = RunStore(storage, run)
    record = store.record()
    home = Home(store, order.tenant, record.manifest.root)
    if record.base_hash == base_hash:
        files = FileCache(storage, record.manifest.root)
        subjects = settle(Submission(store, record, record.manifest, base, True, files))
        for subject in subjects:
            files.take_out(subject.id)  # thousands may wait: lanes read for themselves
    else:
        subjects = tuple(_foreign(store, record, base.name))
    states = States(store, subjects)
    for subject in subjects:
        if subject.state not in ENDED:
            states.note(f"{subject.id}: {subject.state} at step {subject.step}/{subject.max_steps}")
    return FleetRun(order, record, states, home)


def reopen_ended(storage: Storage, run: str) -> bool:
    """Queues what has failed or was cancelled of a run that has ended; False if there is no such run."""
    order = accepted.read_order(storage, run)
    if order is None:
        return False
    store = RunStore(storage, run)
    record = store.record().model_copy(update={"state": "running", "finished": None})
    for spec in record.manifest.subjects:
        before = store.subject(spec.id)
        if before is not None and before.state in ("failed", "cancelled"):
            store.save_subject(before.model_copy(update={"state": "queued", "reason": None}))
    store.save(record)
    accepted.take_up(storage, order)
    return True


def _foreign(store: RunStore, record: RunRecord, base: str) -> Iterator[SubjectRecord]:
    """Subjects of a run that was accepted for another base than the fleet has: they fail."""
    reason = f"its base '{record.base}', as it was submitted, is not the fleet's '{base}'. Submit it again."
    for spec in record.manifest.subjects:
        before = store.subject(spec.id) or SubjectRecord(id=spec.id, max_steps=spec.train.max_steps)
        if before.state not in ENDED:
            before = before.model_copy(update={"state": "failed", "reason": reason, "updated": time.time()})
            store.save_subject(before)
        yield before
