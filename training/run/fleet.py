"""The driver of a fleet: one queue for the subjects of all runs that were accepted, whoever submitted them.

It takes up what `accepted` says, heeds what is asked, writes the states down and ends runs. Lanes belong to (base,
profile) and lease through it; who opens them is not its business. It may die at any time: another one takes the lead
and goes on from the storage. Plain Python; safe for several threads.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from training.base.files.outline import Outline
from training.manifest.plan import MAX_ROWS, PackPlan, lane_plan
from training.run import accepted
from training.run.accepted import Order
from training.run.fleet_run import FleetRun, open_run, reopen_ended
from training.run.lead import Lead
from training.run.lease import Entry, Lease
from training.run.run import ENDED, RunRecord, SubjectRecord, end_run
from training.run.source import Beat, Orders, Outcome, Release, Task
from training.run.standing import OLD_SECONDS, STANDING, Finishes, LaneStanding, Standing
from training.run.subject_queue import SubjectQueue
from training.run.turns import Turns, read_quotas
from training.run.usage import FLUSH_SECONDS, UsageBook, What, month_used
from training.run.view import RunView
from training.storage.storage import Storage, StorageUnavailable

QUOTA_SECONDS = 10.0  # how often quotas are read again
SHOW_SECONDS = 1.0  # how often the standing is written
GONE = "its lane has ended"

log = logging.getLogger(__name__)
OnEnd = Callable[[Order, RunRecord, SubjectRecord], None]


class Wanted(NamedTuple):
    """Subjects that wait for a lane: the profile, the pack of a lane of it, and how many they are."""

    profile: int
    plan: PackPlan
    waiting: int


class FleetDriver:
    """See the module. Whoever has one has the lead, by `lead`. `ended` is told of each subject that ends, before
    anything about its run is forgotten; it may be told twice. `seats`: lanes at once (None: profiles do not wait for
    each other).
    """

    def __init__(
        self,
        storage: Storage,
        base: Outline,
        base_hash: str,
        lead: Lead,
        *,
        seats: int | None = 1,
        max_rows: int = MAX_ROWS,
        ended: OnEnd = lambda order, record, subject: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.storage = storage
        self.base = base
        self.usage = UsageBook(storage)
        self.lead = lead
        self.woken = threading.Event()
        self._base_hash = base_hash
        self._max_rows = max_rows
        self._told = ended
        self._clock = clock
        self._lock = threading.RLock()
        self._queue = SubjectQueue([], clock=clock, turns=Turns(read_quotas(storage)), seats=seats)
        self._queue.turns.month = month_used(storage)
        self._runs: dict[str, FleetRun] = {}
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

    def view(self) -> RunView:
        """How the queue stands."""
        with self._lock:
            return self._queue.view(self._seen)

    def plans(self) -> Sequence[PackPlan]:
        """The packs of lanes by profile; they become more."""
        return self._plans

    def set_seats(self, seats: int) -> None:
        """How many lanes can be open at once."""
        with self._lock:
            self._queue.set_seats(seats)

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
                tasks.append(lease.task(run.spec(_id(lease.id)), run.home))
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
        """Takes a run up: every subject as it stands on the storage goes into the queue."""
        opened = open_run(self.storage, run, self.base, self._base_hash)
        if opened is not None:
            with self._lock:
                self._runs[run] = opened
                self._queue.add(self._entries(opened, opened.states.records.values()))

    def _entries(self, run: FleetRun, subjects: Iterable[SubjectRecord]) -> list[Entry]:
        found = []
        for subject in subjects:
            plan = lane_plan(run.spec(subject.id), self.base, max_rows=self._max_rows)
            if plan not in self._plans:
                self._plans.append(plan)
            found.append(
                Entry(
                    record=subject,
                    profile=self._plans.index(plan),
                    priority=run.order.priority,
                    run=run.order.run,
                    tenant=run.order.tenant,
                )
            )
        return found

    def _heed(self) -> None:
        for key, ask in accepted.asks(self.storage):
            run = self._runs.get(ask.run)
            if run is not None:
                ids = list(ask.subjects) or [spec.id for spec in run.record.manifest.subjects]
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
                            self._queue.add(self._entries(run, run.revive(set(ids))))
                self._write()
            elif ask.verb == "retry":
                reopen_ended(self.storage, ask.run)
                self._take(ask.run)
            self.storage.delete(key)

    # -- writing down --

    def _write(self) -> None:
        """The states that changed, what was used, and the ends of runs."""
        with self._lock:
            view = self._queue.view(self._seen)
            spent = self._queue.spent()
            self._seen = view.seq
        for key, record in zip(view.keys, view.changed, strict=True):
            run = self._run_of(key)
            run.states.change(record)
        for note in view.notes:
            self._note(note)
        for key, used in spent.items():
            counts: dict[What, float] = {"device_seconds": used.device_s, "training_steps": used.steps}
            self.usage.add(self._run_of(key).order.tenant, _id(key), counts)
        self.usage.flush(FLUSH_SECONDS)
        for name, run in list(self._runs.items()):
            run.states.flush()
            self._end(name, run)

    def _end(self, name: str, run: FleetRun) -> None:
        """Tells who wants to know of subjects that have ended; ends the run if all have."""
        records = run.states.records.values()
        for record in records:
            if record.state in ENDED and record.id not in run.told:
                self._told(run.order, run.record, record)
                run.told.add(record.id)
        if len(run.told) == len(run.states.records):
            run.states.save()
            end_run(run.home.run, run.record, tuple(records))
            self.usage.flush()
            accepted.close(self.storage, run.order)
            with self._lock:
                del self._runs[name]
                self._queue.remove(name)

    def _run_of(self, key: str) -> FleetRun:
        return self._runs[key.partition("/")[0]]

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
                finishes.train(lane.profile, [self._run_of(key).left(_id(key)) for key in lane.held])
            for key in order:
                finishes.wait(self._queue.profile(key), self._run_of(key).left(_id(key)))
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
        last = self._last
        is_new = last is None or (standing.lanes, standing.waiting) != (last.lanes, last.waiting)
        if is_new or last is None or standing.time - last.time >= OLD_SECONDS / 3:  # a sign of life
            self.storage.put(STANDING, standing.model_dump_json().encode())
            self._last = standing


def fleet_lead(storage: Storage) -> Lead:
    """This process' claim to drive the fleet of a storage."""
    return Lead(storage, "fleet/driver.json")


def _id(key: str) -> str:
    """The id of the subject that the queue calls `key`."""
    return key.partition("/")[2]
