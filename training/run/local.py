"""A subject queue in this process: one machine without Ray. Every change of a subject is written to the storage."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from training.manifest.plan import PackPlan
from training.run.run import RunStore, SubjectRecord
from training.run.source import Beat, Orders, Outcome, Task
from training.run.subject_queue import Entry, Lease, SubjectQueue, View
from training.run.submission import Submission


def entries(
    submission: Submission,
    records: Sequence[SubjectRecord],
    packs: Sequence[PackPlan],
    reserve: Sequence[PackPlan] = (),
) -> list[Entry]:
    """The subjects of a run as its queue takes them, in manifest order. A pack's index is its profile; those in reserve
    come after the others."""
    place = {id: index for index, pack in enumerate(packs) for id in pack.subjects}
    spare = {id: index for index, pack in enumerate(reserve, len(packs)) for id in pack.subjects}
    by_id = {record.id: record for record in records}
    ids = [subject.id for subject in submission.record.manifest.subjects]
    return [Entry(record=by_id[id], profile=place[id], reserve=spare.get(id)) for id in ids]


class LocalSource:
    """One lane of a queue in this process. `see` is told what has changed, after it is on the storage."""

    def __init__(self, queue: SubjectQueue, lane: int, submission: Submission, see: Callable[[View], None]) -> None:
        self._queue = queue
        self._lane = lane
        self._store: RunStore = submission.store
        self._specs = {subject.id: subject for subject in submission.manifest.subjects}
        self._files = submission.files
        self._see = see
        self._seen = queue.view().seq

    def lease(self, count: int) -> Sequence[Task]:
        """See `Source`."""
        leases: list[Lease] = self._queue.lease(self._lane, count)
        self._write()
        return [replace(lease.task(self._specs[lease.id]), files=self._files.pop(lease.id)) for lease in leases]

    def beat(self, beat: Beat) -> Orders:
        """See `Source`."""
        orders = self._queue.beat(self._lane, beat)
        self._write()
        return orders

    def ended(self, outcome: Outcome) -> None:
        """See `Source`."""
        self._queue.ended(self._lane, outcome)
        self._write()

    def leave(self, reason: str) -> None:
        """Gives back what is still held."""
        self._queue.release(self._lane, reason, "stopped")
        self._write()

    def _write(self) -> None:
        view = self._queue.view(self._seen)
        self._seen = view.seq
        for record in view.changed:
            self._store.save_subject(record)
        self._see(view)
