"""The subject queue of a run, or of a fleet: who works on which subject, and how each stands. Plain Python; it knows no
Ray.

A lane leases subjects, beats while it holds them and says how they ended. A lease that is not renewed, or whose lane
died, goes back to the queue with the reason kept as an attempt. `Turns` says in which order subjects are leased; the
seconds that a lane works are charged to the tenants of what it holds. Nothing here is durable: the storage is, and
after a restart the queue is made from the records there.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from training.run.choosing import SUSPECT_ATTEMPTS, Choosing, QueueLane, Spent
from training.run.lease import Entry, Lease
from training.run.run import ENDED, State, SubjectRecord
from training.run.source import Beat, EndKind, Orders, Outcome, Phase, Release
from training.run.standings import CANCELLED, Standings
from training.run.turns import Turns
from training.run.view import LaneView, RunView

LEASE_SECONDS = 300.0
MAX_ATTEMPTS = 3
CALMER = 0.1  # what the learning rates of a subject are multiplied by after it has diverged, once

# the state in which an outcome of a kind ends; kinds that are not here are tried again
_STATES: dict[EndKind, State] = {
    "done": "published",
    "bad subject": "failed",
    "out of memory": "failed",
    "cancelled": "cancelled",
}
# one device was too small: where the entry has a reserve profile, a gang of devices tries it
_TOO_SMALL: tuple[EndKind, ...] = ("too large", "out of memory")
_STATE_IN: dict[Phase, State] = {
    Phase.PREPARING: "preparing",
    Phase.READING: "preparing",
    Phase.ENCODING: "preparing",
    Phase.CLASS_IMAGES: "preparing",
    Phase.TRAINING: "training",
    Phase.EVALUATING: "evaluating",
    Phase.PUBLISHING: "evaluating",
}


class SubjectQueue:
    """See the module. Not thread-safe: one caller at a time. `clock` is monotonic, in seconds.

    `seats`: lanes that can be open at once; with all of them taken, a lane ends when what waits for another profile has
    its turn. None: profiles do not wait for each other's lanes.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        *,
        lease_s: float = LEASE_SECONDS,
        max_attempts: int = MAX_ATTEMPTS,
        clock: Callable[[], float] = time.monotonic,
        turns: Turns | None = None,
        seats: int | None = None,
    ) -> None:
        self.turns = turns or Turns()
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self._clock = clock
        self._stopped = False
        self._dismissed: set[int] = set()
        self._lanes: dict[int, QueueLane] = {}
        self._barren: dict[int, int] = {}  # workers in a row that ended before they leased anything
        self._troubles: dict[int, str] = {}
        self._standings = Standings(max_attempts)
        self._items = self._standings.items
        self._choosing = Choosing(self._items, self._lanes, self._standings.waiting, self.turns, seats)
        self.add(entries)

    def add(self, entries: Iterable[Entry]) -> None:
        """Subjects come in; those that wait already, or train, stay as they are."""
        for entry in entries:
            self._standings.add(entry)

    def remove(self, run: str) -> None:
        """Forgets the subjects of a run, all of which have ended."""
        self._standings.remove(run)

    # -- lanes --

    def enter(
        self, lane: int, profile: int, reason: str = "its worker died", kind: Release = "lost", devices: int = 1
    ) -> bool:
        """A lane's worker begins. What an earlier worker of the lane still held goes back, for `reason`.

        False: the lane is dismissed, or too many of its workers ended before they did anything.
        """
        self.release(lane, reason, kind)
        self._lanes[lane] = QueueLane(profile, devices, self._clock())
        self._barren[lane] = self._barren.get(lane, -1) + 1
        return self._barren[lane] < self._max_attempts and lane not in self._dismissed

    def lease(self, lane: int, count: int) -> list[Lease]:
        """Up to `count` subjects for the lane, which holds them until they end or it stops beating."""
        self.expire()
        here = self._lane(lane)
        self._charge(here)
        if self._ends(lane) or any(self._items[id].losses >= SUSPECT_ATTEMPTS for id in here.held):
            return []
        self._barren[lane] = -1
        chosen = [] if self._choosing.outranked(here) else self._choosing.choose(here, count)
        for id in chosen:
            item = self._items[id]
            self._standings.leave(id)
            item.holder, item.until, item.since = lane, self._clock() + self._lease_s, time.time()
            item.counted[lane] = 0
            here.held.add(id)
            self._standings.change(id, state="preparing", pack=lane)
        return [self._lease_of(id) for id in chosen]

    def beat(self, lane: int, beat: Beat) -> Orders:
        """Renews the lane's leases and takes in its news. Returns what it must drop."""
        here = self._lane(lane)
        self._charge(here)
        here.phases, here.images_per_second = dict(beat.phase), beat.images_per_second
        for note in beat.notes:
            self._standings.note(note)
        for id in here.held:  # also those that wait for their turn: their lane lives
            self._items[id].until = self._clock() + self._lease_s
        drop = {id for id in beat.phase if not self._hold(lane, id)}
        for id in set(beat.phase) - drop:
            self._take_in(id, lane, beat)
        self.expire()
        return Orders(
            cancel=frozenset(drop | {id for id in here.held if self._items[id].cancel}),
            pause=frozenset(id for id in here.held if self._items[id].pause),
            stop=self._ends(lane),
        )

    def stays(self, lane: int) -> bool:
        """Whether a lane that holds nothing should wait for subjects."""
        self.expire()
        return not self._ends(lane) and not self._choosing.outranked(self._lane(lane))

    def ended(self, lane: int, outcome: Outcome) -> None:
        """A subject's end, as its lane saw it. A lane that lost the subject is heard only if it has published it."""
        item = self._standings.open(outcome.id)
        if item is None or (item.holder != lane and outcome.kind != "done"):
            return
        seconds = item.record.seconds + outcome.seconds
        if item.holder in self._lanes:
            self._charge(self._lanes[item.holder])
        item.count(lane, outcome.step, outcome.trained)
        self._let_go(outcome.id)
        state = _STATES.get(outcome.kind)
        news = {"step": max(outcome.step, item.record.step), "seconds": seconds, "warnings": outcome.warnings}
        if outcome.loss is not None:
            news["loss"] = outcome.loss
        self._standings.change(outcome.id, **news)
        if outcome.kind in _TOO_SMALL and item.reserve is not None:
            item.profile, item.reserve = item.reserve, None
            self._standings.again(outcome.id, f"{outcome.reason}; it goes on over several devices", "too large")
        elif outcome.kind == "diverged" and not _divergences(item.record):
            self._standings.again(
                outcome.id, f"{outcome.reason}; once more from its checkpoint with {CALMER} x the rate", "diverged"
            )
        elif outcome.kind == "diverged":
            self._standings.attempt(outcome.id, outcome.reason or "diverged", "diverged")
            self._standings.end(outcome.id, "failed", reason=outcome.reason)
        elif outcome.kind == "paused":
            self._standings.again(outcome.id, outcome.reason or "paused", "stopped")
        elif state is None:
            self._standings.again(outcome.id, outcome.reason or "unknown failure", "unknown")
        elif state == "failed":
            self._standings.attempt(outcome.id, outcome.reason or outcome.kind, outcome.kind)
            self._standings.end(outcome.id, state, reason=outcome.reason or outcome.kind)
        else:
            self._standings.end(outcome.id, state, reason=outcome.reason, version=outcome.version)
            if state == "published" and item.run:
                self._reuse(outcome.id)
            self.turns.ended(item.device_s)

    def release(self, lane: int, reason: str, kind: Release = "lost") -> None:
        """Everything the lane holds goes back to the queue; the lane is forgotten.

        Of a lane only the first reason counts: that Ray then ends its worker is a consequence.
        """
        gone = self._lanes.pop(lane, None)
        if gone is None:
            return
        self._charge(gone)
        if kind != "stopped":
            self._troubles[lane] = reason
            if not gone.held:
                self._standings.note(f"pack {lane}: {reason}")
        for id in self._standings.in_order(gone.held):
            self._let_go(id)
            self._standings.again(id, reason, kind)

    def trouble(self, lane: int) -> str | None:
        """Why the lane cannot work, if it cannot."""
        return self._troubles.get(lane) if self._barren.get(lane, 0) >= self._max_attempts else None

    def expire(self) -> None:
        """Takes back the leases that were not renewed in time."""
        now = self._clock()
        for id in [id for lane in self._lanes.values() for id in lane.held if self._items[id].until < now]:
            self._let_go(id)
            self._standings.again(id, f"no sign of life for {self._lease_s:.0f} s", "lost")

    # -- the driver --

    def cancel(self, ids: Sequence[str] | None = None) -> None:
        """Cancels subjects, all by default: waiting ones now, leased ones when their lane beats next."""
        for id in list(self._items) if ids is None else ids:
            item = self._standings.open(id)
            if item is None:
                continue
            if item.holder is not None:
                item.cancel = True
                continue
            if item.record.state != "paused":
                self._standings.leave(id)
            self._standings.end(id, "cancelled", reason=CANCELLED)

    def pause(self, ids: Sequence[str]) -> None:
        """Pauses subjects: waiting ones now, leased ones with a checkpoint when their lane beats next."""
        for id in ids:
            item = self._standings.open(id)
            if item is None or item.record.state == "paused":
                continue
            item.pause = True
            if item.holder is None:
                self._standings.leave(id)
                self._standings.change(id, state="paused")

    def resume(self, ids: Sequence[str]) -> None:
        """Lets paused subjects wait for their turn again."""
        for id in ids:
            item = self._items.get(id)
            if item is None:
                continue
            item.pause = False
            if item.record.state == "paused":
                self._standings.change(id, state="queued")
                self._standings.wait(id)

    def give_up(self, profile: int, reason: str) -> None:
        """Fails what waits for a profile that no lane can serve."""
        for id in list(self._standings.waiting.get(profile, [])):
            self._standings.leave(id)
            self._standings.attempt(id, reason, "no lane")
            self._standings.end(id, "failed", reason=reason)

    def dismiss(self, lane: int) -> None:
        """Tells one lane to checkpoint and end. Its subjects go back; no attempt is counted."""
        self._dismissed.add(lane)

    def stop(self) -> None:
        """No more leases; every lane is told to checkpoint and end. Unfinished subjects stay unfinished."""
        self._stopped = True

    def view(self, since: int = 0) -> RunView:
        """How everything stands; the records and notes that changed after `since`."""
        self.expire()
        unfinished = [id for id, item in self._items.items() if item.record.state not in ENDED]
        return RunView(
            seq=self._standings.seq,
            changed=tuple(item.record for item in self._items.values() if item.seq > since),
            keys=tuple(key for key, item in self._items.items() if item.seq > since),
            lanes=tuple(
                LaneView(
                    lane=name,
                    profile=lane.profile,
                    held=tuple(self._standings.in_order(lane.held)),
                    phases=lane.phases,
                    images_per_second=lane.images_per_second,
                )
                for name, lane in self._lanes.items()
            ),
            waiting={profile: len(ids) for profile, ids in self._standings.waiting.items() if ids},
            unfinished=len(unfinished),
            notes=self._standings.notes(since),
        )

    def order(self, profile: int | None = None) -> list[str]:
        """See `Choosing.order`."""
        return self._choosing.order(profile)

    def set_seats(self, seats: int | None) -> None:
        """How many lanes can be open at once."""
        self._choosing.seats = seats

    def profile(self, key: str) -> int:
        """The profile of a subject."""
        return self._items[key].profile

    def standing(self, tenant: str) -> int:
        """How many subjects of a tenant wait."""
        return sum(self._items[key].tenant == tenant for key in self._standings.waiting_keys())

    def spent(self) -> dict[str, Spent]:
        """What each subject has used since the last call."""
        return {key: used for key, item in self._items.items() if (used := item.spend()) is not None}

    # -- pieces --

    def _charge(self, lane: QueueLane) -> None:
        """Charges the time since the last charge to what the lane holds, a part each."""
        now = self._clock()
        if lane.held:
            each = (now - lane.charged) * lane.devices / len(lane.held)
            for key in lane.held:
                item = self._items[key]
                item.device_s += each
                self.turns.charge(item.tenant, each)
        lane.charged = now

    def _ends(self, lane: int) -> bool:
        return self._stopped or lane in self._dismissed

    def _lease_of(self, id: str) -> Lease:
        item = self._items[id]
        factor = CALMER if _divergences(item.record) else 1.0
        return Lease(
            id=id,
            run=item.run,
            fingerprint=item.record.fingerprint or "",
            rate_factor=factor,
            may_spread=item.reserve is not None,
        )

    def _lane(self, lane: int) -> QueueLane:
        """The lane's own entry. After a restart the queue learns of its lanes from their calls."""
        return self._lanes.setdefault(lane, QueueLane(profile=-1, charged=self._clock()))

    def _hold(self, lane: int, id: str) -> bool:
        """Renews the lane's lease of a subject, or takes it up if nobody holds the subject; False if it may not."""
        item = self._standings.open(id)
        if item is None or item.holder not in (None, lane):
            return False
        if item.holder is None:
            self._standings.leave(id)
            item.holder, item.since = lane, time.time()
            here = self._lane(lane)
            here.profile = item.profile
            here.held.add(id)
        item.until = self._clock() + self._lease_s
        return True

    def _take_in(self, id: str, lane: int, beat: Beat) -> None:
        news: dict[str, object] = {"state": _STATE_IN[beat.phase[id].phase]}
        if id in beat.steps:
            self._items[id].count(lane, beat.steps[id], beat.trained.get(id, 0))
            news |= {"step": beat.steps[id], "loss": beat.losses[id]}
        self._standings.change(id, **news)

    def _reuse(self, id: str) -> None:
        """What waits to become the same adapter for another run has it now."""
        item, same = self._items[id], self._choosing.print_of(id)
        for other in [key for key in self._standings.waiting_keys() if self._choosing.print_of(key) == same]:
            self._standings.leave(other)
            step = self._items[other].record.max_steps
            self._standings.change(other, state="reused", version=item.record.version, step=step)

    def _let_go(self, id: str) -> None:
        item = self._items[id]
        if item.holder in self._lanes:
            self._lanes[item.holder].held.discard(id)
        elif item.record.state not in ENDED and id in self._standings.waiting.get(item.profile, []):
            self._standings.leave(id)
        item.holder = None


def _divergences(record: SubjectRecord) -> int:
    return sum(attempt.kind == "diverged" for attempt in record.attempts)
