"""The driver of a fleet: one queue for the subjects of all runs that were accepted, whoever submitted them.

It takes up what `accepted` says, heeds what is asked, writes the states down and ends runs. Lanes belong to (base,
profile) and lease through it; who opens them is not its business. It may die at any time: another one takes the lead
and goes on from the storage. Plain Python; safe for several threads.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from training.base.files.outline import Outline
from training.errors import UserError
from training.manifest.plan import MAX_ROWS, PackPlan, lane_plan
from training.photos.files import FileCache
from training.run import accepted
from training.run.accepted import Order
from training.run.home import Home
from training.run.lead import Lead
from training.run.lease import Entry, Lease
from training.run.run import ENDED, RunRecord, RunStore, SubjectRecord, end_run
from training.run.source import Beat, Orders, Outcome, Release, Task
from training.run.standing import STANDING, Finishes, LaneStanding, Standing
from training.run.states import States
from training.run.subject_queue import SubjectQueue
from training.run.submission import Submission, settle
from training.run.turns import Turns, read_quotas
from training.run.usage import FLUSH_SECONDS, UsageBook, month_used
from training.run.view import View
from training.storage.storage import Storage, StorageError, StorageUnavailable

QUOTA_SECONDS = 10.0  # how often quotas are read again
SHOW_SECONDS = 1.0  # how often the standing is written
GONE = "its lane has ended"

log = logging.getLogger(__name__)
Ended = Callable[[Order, RunRecord, SubjectRecord], None]


class Wanted(NamedTuple):
    """Subjects that wait for a lane: the profile, the pack of a lane of it, and how many they are."""

    profile: int
    plan: PackPlan
    waiting: int


@dataclass
class _Run:
    """A run that is worked on."""

    submission: Submission
    order: Order
    states: States
    home: Home
    ended: set[str]


class FleetDriver:
    """See the module. `ended` is told of each subject that ends, before anything about its run is forgotten; it may be
    told twice. `seats`: lanes at once (None: profiles do not wait for each other). Raises nothing of a single run."""

    def __init__(
        self,
        storage: Storage,
        base: Outline,
        base_hash: str,
        *,
        seats: int | None = 1,
        max_rows: int = MAX_ROWS,
        ended: Ended = lambda order, record, subject: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.storage = storage
        self.base = base
        self.usage = UsageBook(storage)
        self.lead = Lead(storage, "fleet/driver.json")
        self.woken = threading.Event()
        self._base_hash = base_hash
        self._max_rows = max_rows
        self._told = ended
        self._clock = clock
        self._lock = threading.RLock()
        self._queue = SubjectQueue([], clock=clock, turns=Turns(read_quotas(storage)), seats=seats)
        self._queue.turns.month = month_used(storage)
        self._runs: dict[str, _Run] = {}
        self._unreadable: set[str] = set()
        self._plans: list[PackPlan] = []
        self._seen = 0
        self._quotas_read = self._shown = clock()
        self._rates: dict[int, float] = {}  # the last images/s of each profile
        self._last: Standing | None = None

    # -- what happens all the time --

    def tick(self) -> None:
        """Takes in what is new on the storage and in the queue, and writes down what has changed. Once a second or so.

        Raises Lost if another driver has taken the lead, StorageError if the storage cannot be reached.
        """
        self.lead.renew()
        for run in sorted(set(accepted.unfinished(self.storage)) - set(self._runs) - self._unreadable):
            try:
                self._take(run)
            except StorageUnavailable:
                raise
            except Exception:  # the others go on
                log.exception("run %s cannot be taken up", run)
                self._unreadable.add(run)
        self._heed()
        self._write()
        self._show()
        if self._clock() - self._quotas_read >= QUOTA_SECONDS:
            self._quotas_read = self._clock()
            self._queue.turns.quotas = read_quotas(self.storage)

    def stop(self) -> None:
        """Lanes are told to checkpoint and end; what is unfinished stays so."""
        with self._lock:
            self._queue.stop()

    def close(self) -> None:
        """Writes everything down and gives the lead up. Lanes have ended before."""
        self._write()
        for run in self._runs.values():
            run.states.stop()
        self.usage.flush()
        self.lead.release()

    # -- for those who open lanes --

    def wanted(self) -> list[Wanted]:
        """What waits for lanes, the profile first whose turn it is."""
        with self._lock:
            counts: dict[int, int] = {}
            for key in self._queue.order():
                profile = self._queue.profile(key)
                counts[profile] = counts.get(profile, 0) + 1
            return [Wanted(profile, self._plans[profile], count) for profile, count in counts.items()]

    def view(self) -> View:
        """How the queue stands."""
        with self._lock:
            return self._queue.view(self._seen)

    def plans(self) -> Sequence[PackPlan]:
        """The packs of lanes by profile; they become more."""
        return self._plans

    def set_seats(self, seats: int) -> None:
        """How many lanes can be open at once."""
        with self._lock:
            self._queue.seats = seats

    def dismiss(self, lane: int) -> None:
        """Tells one lane to checkpoint and end."""
        with self._lock:
            self._queue.dismiss(lane)

    def give_up(self, profile: int, reason: str) -> None:
        """Fails what waits for a profile that no lane can serve."""
        with self._lock:
            self._queue.give_up(profile, reason)

    def enter(self, lane: int, profile: int, reason: str = "its worker died", kind: Release = "lost") -> bool:
        """A lane's worker begins; see `SubjectQueue.enter`."""
        with self._lock:
            return self._queue.enter(lane, profile, reason, kind, self._plans[profile].workers)

    def leave(self, lane: int, reason: str = GONE, kind: Release = "stopped") -> None:
        """A lane has ended; what it still held goes back."""
        with self._lock:
            self._queue.release(lane, reason, kind)
        self.woken.set()

    # -- for lanes --

    def lease(self, lane: int, count: int) -> list[Task]:
        """Up to `count` subjects for a lane, as its worker takes them."""
        with self._lock:
            tasks = []
            for lease in self._queue.lease(lane, count):
                run = self._runs[lease.run]
                id = lease.id.partition("/")[2]
                spec = next(one for one in run.submission.manifest.subjects if one.id == id)
                tasks.append(lease.task(spec, run.home, run.submission.files.pop(id)))
            return tasks

    def leases(self, lane: int, count: int) -> list[Lease]:
        """The same for a lane in another process, which reads what it needs from the storage."""
        with self._lock:
            return self._queue.lease(lane, count)

    def stays(self, lane: int) -> bool:
        """Whether a lane that holds nothing should wait for subjects."""
        with self._lock:
            return self._queue.stays(lane)

    def trouble(self, lane: int) -> str | None:
        """Why a lane cannot work, if it cannot."""
        with self._lock:
            return self._queue.trouble(lane)

    def beat(self, lane: int, beat: Beat) -> Orders:
        """A lane's sign of life; returns what it must do."""
        with self._lock:
            return self._queue.beat(lane, beat)

    def ended(self, lane: int, outcome: Outcome) -> None:
        """How a subject ended on a lane."""
        with self._lock:
            self._queue.ended(lane, outcome)
        self.woken.set()

    # -- runs --

    def _take(self, run: str) -> None:
        """Takes a run up: every subject as it stands on the storage goes into the queue. What cannot be trained here
        fails with its reason."""
        order = accepted.read_order(self.storage, run)
        if order is None:  # a marker without an order: its acceptance died before it was answered
            return
        store = RunStore(self.storage, run)
        record = store.record()
        submission = Submission(
            store, record, record.manifest, self.base, True, FileCache(self.storage, record.manifest.root)
        )
        foreign = record.base_hash != self._base_hash
        subjects = tuple(self._foreign(store, record)) if foreign else settle(submission)
        with self._lock:
            home = Home(store, order.tenant, record.manifest.root)
            self._runs[run] = _Run(submission, order, States(store, subjects), home, set())
            self._queue.add(self._entries(run, order, record, subjects))

    def _entries(self, run: str, order: Order, record: RunRecord, subjects: Sequence[SubjectRecord]) -> list[Entry]:
        specs = {one.id: one for one in record.manifest.subjects}
        found = []
        for subject in subjects:
            plan = lane_plan(specs[subject.id], self.base, max_rows=self._max_rows)
            if plan not in self._plans:
                self._plans.append(plan)
            found.append(
                Entry(
                    record=subject,
                    profile=self._plans.index(plan),
                    priority=order.priority,
                    run=run,
                    tenant=order.tenant,
                )
            )
        return found

    def _foreign(self, store: RunStore, record: RunRecord) -> list[SubjectRecord]:
        """Subjects of a run that was accepted for another base than this fleet has."""
        reason = (
            f"it was submitted for base '{record.base}' as it was then; this fleet has another one, "
            f"'{self.base.name}'. Submit it again."
        )
        failed = []
        for spec in record.manifest.subjects:
            before = store.subject(spec.id) or SubjectRecord(id=spec.id, max_steps=spec.train.max_steps)
            if before.state not in ENDED:
                before = before.model_copy(update={"state": "failed", "reason": reason, "updated": time.time()})
                store.save_subject(before)
            failed.append(before)
        return failed

    def _heed(self) -> None:
        for key, ask in accepted.asks(self.storage):
            run = self._runs.get(ask.run)
            if run is not None:
                ids = list(ask.subjects) or [subject.id for subject in run.submission.manifest.subjects]
                keys = [run.home.key(id) for id in ids]
                with self._lock:
                    match ask.verb:
                        case "cancel":
                            self._queue.cancel(keys)
                        case "pause":
                            self._queue.pause(keys)
                        case "resume":
                            self._queue.resume(keys)
                        case "retry":
                            self._retry(run, set(ids))
                self._write()
            elif ask.verb == "retry":
                self._retry_ended(ask.run)
            self.storage.delete(key)

    def _retry(self, run: _Run, ids: set[str]) -> None:
        """Queues those of a run under way that have failed or were cancelled again."""
        again = []
        for id in ids:
            before = run.states.records.get(id)
            if before is not None and before.state in ("failed", "cancelled") and before.fingerprint is not None:
                news = {"state": "queued", "reason": None, "updated": time.time()}
                again.append(before.model_copy(update=news))
                run.states.change(again[-1])
                run.ended.discard(id)
        record = run.submission.record
        self._queue.add(self._entries(record.run, run.order, record, again))

    def _retry_ended(self, run: str) -> None:
        """Takes up a run that has ended; what failed or was cancelled is queued again."""
        order = accepted.read_order(self.storage, run)
        if order is None:
            return
        store = RunStore(self.storage, run)
        record = store.record().model_copy(update={"state": "running", "finished": None})
        for spec in record.manifest.subjects:
            before = store.subject(spec.id)
            if before is not None and before.state in ("failed", "cancelled"):
                store.save_subject(before.model_copy(update={"state": "queued", "reason": None}))
        store.save(record)
        accepted.take_up(self.storage, order)
        self._take(run)

    # -- writing down --

    def _write(self) -> None:
        """The states that changed, what was used, and the ends of runs."""
        with self._lock:
            view = self._queue.view(self._seen)
            spent = self._queue.spent()
            self._seen = view.seq
        for key, record in zip(view.keys, view.changed, strict=True):
            run = self._runs[key.partition("/")[0]]
            steps = record.step - run.states.records[record.id].step
            self.usage.add(run.order.tenant, record.id, {"training_steps": max(0, steps)})
            run.states.change(record)
        for note in view.notes:
            self._note(note)
        for key, seconds in spent.items():
            run = self._runs[key.partition("/")[0]]
            self.usage.add(run.order.tenant, key.partition("/")[2], {"device_seconds": seconds})
        self.usage.flush(FLUSH_SECONDS)
        for name, run in list(self._runs.items()):
            run.states.flush()
            self._end(name, run)

    def _end(self, name: str, run: _Run) -> None:
        """Tells who wants to know of subjects that have ended; ends the run if all have."""
        records = run.states.records.values()
        for record in records:
            if record.state in ENDED and record.id not in run.ended:
                self._told(run.order, run.submission.record, record)
                run.ended.add(record.id)
        if len(run.ended) == len(run.states.records):
            run.states.save()
            end_run(run.submission.store, run.submission.record, tuple(records))
            self.usage.flush()
            accepted.close(self.storage, run.order)
            with self._lock:
                del self._runs[name]
                self._queue.remove(name)

    def _note(self, note: str) -> None:
        """A note that begins with a subject's key goes to the log of its run, any other to the program's."""
        name, slash, rest = note.partition("/")
        run = self._runs.get(name) if slash else None
        if run is None:
            log.info("%s", note)
        else:
            run.states.note(rest)

    def _show(self) -> None:
        """Writes how the lanes stand, for those who look on."""
        if self._clock() - self._shown < SHOW_SECONDS:
            return
        self._shown = self._clock()
        with self._lock:
            view, order = self._queue.view(self._seen), self._queue.order()
            finishes = Finishes(self._rates)
            for lane in view.lanes:
                if lane.images_per_second:
                    self._rates[lane.profile] = lane.images_per_second
                finishes.train(lane.profile, [self._left(key) for key in lane.held])
            for key in order:
                finishes.wait(self._queue.profile(key), self._left(key))
            lanes = tuple(
                LaneStanding(
                    lane=lane.lane,
                    profile=lane.profile,
                    subjects={key: str(lane.phases.get(key, "preparing")) for key in lane.held},
                    images_per_second=round(lane.images_per_second, 2),
                )
                for lane in view.lanes
            )
        standing = Standing(lanes=lanes, waiting=tuple(order), finish=finishes.at(time.time()))
        if self._last is None or (standing.lanes, standing.waiting) != (self._last.lanes, self._last.waiting):
            self.storage.put(STANDING, standing.model_dump_json().encode())
            self._last = standing

    def _left(self, key: str) -> tuple[str, int, int]:
        """Key, steps that a subject still has to take, and rows of each."""
        name, _, id = key.partition("/")
        run = self._runs[name]
        spec = next(one for one in run.submission.manifest.subjects if one.id == id)
        record = run.states.records[id]
        rows = spec.train.batch_size * (2 if spec.prior.enabled else 1) * spec.train.gradient_accumulation_steps
        return key, max(0, record.max_steps - record.step), rows


def try_lead(driver: FleetDriver) -> bool:
    """Whether this process drives the fleet from now on; False while another one lives."""
    try:
        return driver.lead.acquire() is None
    except (StorageError, UserError) as error:
        log.warning("the lead of the fleet could not be read: %s", error)
        return False
