"""The subject queue of a run: who works on which subject, and how each stands. Plain Python; it knows no Ray.

A lane leases subjects, beats while it holds them and says how they ended. A lease that is not renewed, or whose lane
died, goes back to the queue with the reason kept as an attempt. Nothing here is durable: the storage is, and after a
restart the queue is made from the records there.
"""

import bisect
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import Field

from training.manifest.plan import PackPlan
from training.manifest.subject import SubjectSpec
from training.run.run import ENDED, Attempt, State, SubjectRecord
from training.run.source import Beat, Doing, Kind, Orders, Outcome, Phase, Release, Task, Why
from training.storage.closed import Closed

LEASE_SECONDS = 300.0
MAX_ATTEMPTS = 3
SUSPECT_ATTEMPTS = 2  # after so many lost workers a subject trains alone: so that the one that kills its pack is found
CALMER = 0.1  # what the learning rates of a subject are multiplied by after it has diverged, once
KEPT_NOTES = 1000

# the state in which an outcome of a kind ends; kinds that are not here are tried again
_STATES: dict[Kind, State] = {
    "done": "published",
    "bad subject": "failed",
    "out of memory": "failed",
    "cancelled": "cancelled",
}
# one device was too small: where the entry has a reserve profile, a gang of devices tries it
_TOO_SMALL: tuple[Kind, ...] = ("too large", "out of memory")
_STATE_IN: dict[Phase, State] = {
    Phase.PREPARING: "preparing",
    Phase.READING: "preparing",
    Phase.ENCODING: "preparing",
    Phase.CLASS_IMAGES: "preparing",
    Phase.TRAINING: "training",
    Phase.EVALUATING: "evaluating",
    Phase.PUBLISHING: "evaluating",
}


class Entry(Closed):
    """What the queue is told about a subject. Only lanes of its `profile` may lease it; high priorities go first.

    `reserve`: the profile it goes to if one device is too small for it.
    """

    record: SubjectRecord
    profile: int
    priority: int = 0
    reserve: int | None = None


def entries(
    subjects: Iterable[SubjectRecord], packs: Sequence[PackPlan], reserve: Sequence[PackPlan] = ()
) -> list[Entry]:
    """The entries of a run's subjects. A profile is the place of a pack among `packs`, then `reserve`."""
    place = {id: index for index, pack in enumerate(packs) for id in pack.subjects}
    spare = {id: index for index, pack in enumerate(reserve, len(packs)) for id in pack.subjects}
    return [Entry(record=one, profile=place[one.id], reserve=spare.get(one.id)) for one in subjects]


class Lease(Closed):
    """A subject a lane may work on."""

    id: str
    fingerprint: str
    rate_factor: float = Field(1.0, description="its learning rates are multiplied by it: less after it has diverged")
    may_spread: bool = Field(False, description="a gang takes it if one device is too small for it")

    def task(self, spec: SubjectSpec) -> Task:
        """The leased subject with its settings, as they were submitted."""
        return Task(spec, self.fingerprint, self.may_spread, self.rate_factor)


class LaneView(Closed):
    """What a lane is doing."""

    lane: int
    profile: int
    held: tuple[str, ...]
    phases: dict[str, Doing]
    images_per_second: float


class View(Closed):
    """What changed since `since`, and how everything stands. `notes` are what lanes had to say since then."""

    seq: int
    changed: tuple[SubjectRecord, ...]
    lanes: tuple[LaneView, ...]
    waiting: dict[int, int]
    unfinished: int
    notes: tuple[str, ...]

    @classmethod
    def of_records(cls, records: Sequence[SubjectRecord]) -> "View":
        """A view made of records alone, without a queue: a lane for every pack that holds subjects."""
        packs: dict[int, list[SubjectRecord]] = {}
        for record in records:
            if record.state not in ENDED and record.state != "queued" and record.pack is not None:
                packs.setdefault(record.pack, []).append(record)
        lanes = tuple(
            LaneView(
                lane=pack,
                profile=0,
                held=tuple(record.id for record in held),
                phases={record.id: Doing(Phase(record.state)) for record in held},
                images_per_second=0.0,
            )
            for pack, held in sorted(packs.items())
        )
        unfinished = sum(record.state not in ENDED for record in records)
        return cls(seq=0, changed=tuple(records), lanes=lanes, waiting={}, unfinished=unfinished, notes=())


@dataclass
class _Item:
    record: SubjectRecord
    profile: int
    priority: int
    order: int
    reserve: int | None = None
    holder: int | None = None
    until: float = 0.0
    since: float = 0.0
    cancel: bool = False
    losses: int = 0  # counted attempts since this queue was made
    seq: int = 0


@dataclass
class _Lane:
    profile: int
    held: set[str] = field(default_factory=set)
    phases: dict[str, Doing] = field(default_factory=dict)
    images_per_second: float = 0.0


class Note(NamedTuple):
    """Something a lane had to say, and the number of the change it came with."""

    seq: int
    text: str


class SubjectQueue:
    """See the module. Not thread-safe: one caller at a time. `clock` is monotonic, in seconds."""

    def __init__(
        self,
        entries: Iterable[Entry],
        *,
        lease_s: float = LEASE_SECONDS,
        max_attempts: int = MAX_ATTEMPTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self._clock = clock
        self._seq = 0
        self._stopped = False
        self._dismissed: set[int] = set()
        self._lanes: dict[int, _Lane] = {}
        self._barren: dict[int, int] = {}  # workers in a row that ended before they leased anything
        self._troubles: dict[int, str] = {}
        self._notes: list[Note] = []
        self._items: dict[str, _Item] = {}
        self._waiting: dict[int, list[str]] = {}
        for order, entry in enumerate(entries):
            self._items[entry.record.id] = _Item(entry.record, entry.profile, entry.priority, order, entry.reserve)
            if entry.record.state not in ENDED:
                self._wait(entry.record.id)

    # -- lanes --

    def enter(self, lane: int, profile: int, reason: str = "its worker died", kind: Release = "lost") -> bool:
        """A lane's worker begins. What an earlier worker of the lane still held goes back, for `reason`.

        False: the lane is dismissed, or too many of its workers ended before they did anything.
        """
        self.release(lane, reason, kind)
        self._lanes[lane] = _Lane(profile)
        self._barren[lane] = self._barren.get(lane, -1) + 1
        return self._barren[lane] < self._max_attempts and lane not in self._dismissed

    def lease(self, lane: int, count: int) -> list[Lease]:
        """Up to `count` subjects for the lane, which holds them until they end or it stops beating."""
        self.expire()
        here = self._lane(lane)
        if self._ends(lane) or any(self._items[id].losses >= SUSPECT_ATTEMPTS for id in here.held):
            return []
        self._barren[lane] = -1
        chosen = self._choose(here, count)
        for id in chosen:
            item = self._items[id]
            self._waiting[item.profile].remove(id)
            item.holder, item.until, item.since = lane, self._clock() + self._lease_s, time.time()
            here.held.add(id)
            self._change(id, state="preparing", pack=lane)
        return [self._lease_of(id) for id in chosen]

    def beat(self, lane: int, beat: Beat) -> Orders:
        """Renews the lane's leases and takes in its news. Returns what it must drop."""
        here = self._lane(lane)
        here.phases, here.images_per_second = dict(beat.phase), beat.images_per_second
        for note in beat.notes:
            self._note(note)
        for id in here.held:  # also those that wait for their turn: their lane lives
            self._items[id].until = self._clock() + self._lease_s
        drop = {id for id in beat.phase if not self._hold(lane, id)}
        for id in set(beat.phase) - drop:
            self._take_in(id, beat)
        self.expire()
        return Orders(
            cancel=frozenset(drop | {id for id in here.held if self._items[id].cancel}), stop=self._ends(lane)
        )

    def ended(self, lane: int, outcome: Outcome) -> None:
        """A subject's end, as its lane saw it. A lane that lost the subject is heard only if it has published it."""
        item = self._items.get(outcome.id)
        if item is None or item.record.state in ENDED or (item.holder != lane and outcome.kind != "done"):
            return
        seconds = item.record.seconds + outcome.seconds
        self._let_go(outcome.id)
        state = _STATES.get(outcome.kind)
        news = {"step": max(outcome.step, item.record.step), "seconds": seconds, "warnings": outcome.warnings}
        if outcome.loss is not None:
            news["loss"] = outcome.loss
        self._change(outcome.id, **news)
        if outcome.kind in _TOO_SMALL and item.reserve is not None:
            item.profile, item.reserve = item.reserve, None
            self._again(outcome.id, f"{outcome.reason}; it goes on over several devices", "too large")
        elif outcome.kind == "diverged" and not _divergences(item.record):
            self._again(
                outcome.id, f"{outcome.reason}; once more from its checkpoint with {CALMER} x the rate", "diverged"
            )
        elif outcome.kind == "diverged":
            self._attempt(outcome.id, outcome.reason or "diverged", "diverged")
            self._end(outcome.id, "failed", reason=outcome.reason)
        elif state is None:
            self._again(outcome.id, outcome.reason or "unknown failure", "unknown")
        elif state == "failed":
            self._attempt(outcome.id, outcome.reason or outcome.kind, outcome.kind)
            self._end(outcome.id, state, reason=outcome.reason or outcome.kind)
        else:
            self._end(outcome.id, state, reason=outcome.reason, version=outcome.version)

    def release(self, lane: int, reason: str, kind: Release = "lost") -> None:
        """Everything the lane holds goes back to the queue; the lane is forgotten.

        Of a lane only the first reason counts: that Ray then ends its worker is a consequence.
        """
        gone = self._lanes.pop(lane, None)
        if gone is None:
            return
        if kind != "stopped":
            self._troubles[lane] = reason
            if not gone.held:
                self._note(f"pack {lane}: {reason}")
        for id in sorted(gone.held, key=lambda id: self._items[id].order):
            self._let_go(id)
            self._again(id, reason, kind)

    def trouble(self, lane: int) -> str | None:
        """Why the lane cannot work, if it cannot."""
        return self._troubles.get(lane) if self._barren.get(lane, 0) >= self._max_attempts else None

    def expire(self) -> None:
        """Takes back the leases that were not renewed in time."""
        now = self._clock()
        for id in [id for lane in self._lanes.values() for id in lane.held if self._items[id].until < now]:
            self._let_go(id)
            self._again(id, f"no sign of life for {self._lease_s:.0f} s", "lost")

    # -- the driver --

    def cancel(self, ids: Sequence[str] | None = None) -> None:
        """Cancels subjects, all by default: waiting ones now, leased ones when their lane beats next."""
        for id in list(self._items) if ids is None else ids:
            item = self._items.get(id)
            if item is None or item.record.state in ENDED:
                continue
            if item.holder is not None:
                item.cancel = True
                continue
            self._waiting[item.profile].remove(id)
            self._end(id, "cancelled", reason="cancelled by the user")

    def give_up(self, profile: int, reason: str) -> None:
        """Fails what waits for a profile that no lane can serve."""
        for id in list(self._waiting.get(profile, [])):
            self._waiting[profile].remove(id)
            self._attempt(id, reason, "no lane")
            self._end(id, "failed", reason=reason)

    def dismiss(self, lane: int) -> None:
        """Tells one lane to checkpoint and end. Its subjects go back; no attempt is counted."""
        self._dismissed.add(lane)

    def stop(self) -> None:
        """No more leases; every lane is told to checkpoint and end. Unfinished subjects stay unfinished."""
        self._stopped = True

    def view(self, since: int = 0) -> View:
        """How everything stands; the records and notes that changed after `since`."""
        self.expire()
        unfinished = [id for id, item in self._items.items() if item.record.state not in ENDED]
        return View(
            seq=self._seq,
            changed=tuple(item.record for item in self._items.values() if item.seq > since),
            lanes=tuple(
                LaneView(
                    lane=name,
                    profile=lane.profile,
                    held=tuple(sorted(lane.held, key=lambda id: self._items[id].order)),
                    phases=lane.phases,
                    images_per_second=lane.images_per_second,
                )
                for name, lane in self._lanes.items()
            ),
            waiting={profile: len(ids) for profile, ids in self._waiting.items() if ids},
            unfinished=len(unfinished),
            notes=tuple(note.text for note in self._notes if note.seq > since),
        )

    # -- pieces --

    def _ends(self, lane: int) -> bool:
        return self._stopped or lane in self._dismissed

    def _lease_of(self, id: str) -> Lease:
        item = self._items[id]
        factor = CALMER if _divergences(item.record) else 1.0
        return Lease(
            id=id,
            fingerprint=item.record.fingerprint or "",
            rate_factor=factor,
            may_spread=item.reserve is not None,
        )

    def _lane(self, lane: int) -> _Lane:
        """The lane's own entry. After a restart the queue learns of its lanes from their calls."""
        return self._lanes.setdefault(lane, _Lane(profile=-1))

    def _choose(self, here: _Lane, count: int) -> list[str]:
        """The first `count` waiting subjects of the profile. One that may have killed its workers is leased alone."""
        waiting = self._waiting.get(here.profile, [])
        calm = [id for id in waiting if self._items[id].losses < SUSPECT_ATTEMPTS][:count]
        return calm if calm or here.held else waiting[:1]

    def _hold(self, lane: int, id: str) -> bool:
        """Renews the lane's lease of a subject, or takes it up if nobody holds the subject; False if it may not."""
        item = self._items.get(id)
        if item is None or item.record.state in ENDED or item.holder not in (None, lane):
            return False
        if item.holder is None:
            self._waiting[item.profile].remove(id)
            item.holder, item.since = lane, time.time()
            here = self._lane(lane)
            here.profile = item.profile
            here.held.add(id)
        item.until = self._clock() + self._lease_s
        return True

    def _take_in(self, id: str, beat: Beat) -> None:
        news: dict[str, object] = {"state": _STATE_IN[beat.phase[id].phase]}
        if id in beat.steps:
            news |= {"step": beat.steps[id], "loss": beat.losses[id]}
        self._change(id, **news)

    def _again(self, id: str, reason: str, kind: Kind | Release) -> None:
        """Back into the queue with one attempt more; fails where the counted attempts are used up."""
        if kind != "stopped":
            self._attempt(id, reason, kind)
        item = self._items[id]
        if item.cancel:
            self._end(id, "cancelled", reason="cancelled by the user")
        elif item.losses >= self._max_attempts:
            self._end(id, "failed", reason=f"{reason} (attempt {item.losses} of {self._max_attempts})")
        else:
            self._change(id, state="queued")
            self._wait(id)

    def _attempt(self, id: str, reason: str, kind: Why) -> None:
        item = self._items[id]
        attempt = Attempt(started=item.since, ended=time.time(), reason=reason, kind=kind)
        item.losses += kind in ("lost", "unknown")
        self._change(id, attempts=(*item.record.attempts, attempt))
        self._note(f"{id}: {reason}")

    def _end(self, id: str, state: State, *, reason: str | None = None, version: str | None = None) -> None:
        self._change(id, state=state, reason=reason, version=version or self._items[id].record.version)

    def _let_go(self, id: str) -> None:
        item = self._items[id]
        if item.holder in self._lanes:
            self._lanes[item.holder].held.discard(id)
        elif item.record.state not in ENDED and id in self._waiting.get(item.profile, []):
            self._waiting[item.profile].remove(id)
        item.holder = None

    def _wait(self, id: str) -> None:
        """Queued by priority, then in manifest order: a subject that comes back does not go to the end."""
        item = self._items[id]
        waiting = self._waiting.setdefault(item.profile, [])
        bisect.insort(waiting, id, key=lambda other: (-self._items[other].priority, self._items[other].order))

    def _change(self, id: str, **news: object) -> None:
        item = self._items[id]
        if any(getattr(item.record, name) != value for name, value in news.items()):
            self._seq += 1
            item.record = item.record.model_copy(update={**news, "updated": time.time()})
            item.seq = self._seq

    def _note(self, text: str) -> None:
        self._seq += 1
        self._notes = [*self._notes[-KEPT_NOTES:], Note(self._seq, text)]


def _divergences(record: SubjectRecord) -> int:
    return sum(attempt.kind == "diverged" for attempt in record.attempts)
