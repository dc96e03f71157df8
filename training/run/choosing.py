"""Which of the subjects that wait a lane is lent, and when it has to make room for another profile's. Plain Python.

It looks at the queue's own books and changes nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from training.run.run import ENDED, SubjectRecord
from training.run.source import Doing
from training.run.turns import Turns, Waiting

SUSPECT_ATTEMPTS = 2  # after so many lost workers a subject trains alone: so that the one that kills its pack is found


class Spent(NamedTuple):
    """What a subject has used: device-seconds, and training steps."""

    device_s: float
    steps: int


@dataclass
class QueuedSubject:
    """A subject in the queue: its record, whose it is, who holds it until when, and what is asked of it."""

    record: SubjectRecord
    profile: int
    priority: int
    order: int
    reserve: int | None = None
    run: str = ""
    tenant: str = ""
    holder: int | None = None
    until: float = 0.0
    since: float = 0.0
    cancel: bool = False
    pause: bool = False
    device_s: float = 0.0  # device-seconds since this queue was made
    told_s: float = 0.0  # of them, those that `spent` has told
    trained: int = 0  # steps since this queue was made, also those that are made again after a lane was lost
    told_steps: int = 0
    counted: dict[int, int] = field(default_factory=dict)  # lane -> of its steps since the lease, those in `trained`
    losses: int = 0  # counted attempts since this queue was made
    seq: int = 0

    def count(self, lane: int, step: int, trained: int) -> None:
        """Takes in how many steps a lane has made of the subject since it was leased, and at which step it stands."""
        before = self.counted.get(lane, 0)
        if not before:  # it may have begun at a checkpoint that was written after the last beat of a lane that died
            self.trained += max(0, step - trained - self.record.step)
        self.trained += max(0, trained - before)
        self.counted[lane] = trained

    def spend(self) -> "Spent | None":
        """What the subject has used since the last call; None if nothing."""
        used = Spent(self.device_s - self.told_s, self.trained - self.told_steps)
        self.told_s, self.told_steps = self.device_s, self.trained
        return used if used.device_s > 0 or used.steps > 0 else None


@dataclass
class QueueLane:
    """A lane as the queue knows it: what it holds, and up to when its time is charged."""

    profile: int
    devices: int = 1
    charged: float = 0.0  # up to when its time is charged
    held: set[str] = field(default_factory=set)
    phases: dict[str, Doing] = field(default_factory=dict)
    images_per_second: float = 0.0


class Choosing:
    """The books of a queue: its items by key, its lanes, and the keys that wait for each profile, in order.

    `seats`: lanes that can be open at once."""

    def __init__(
        self,
        items: Mapping[str, QueuedSubject],
        lanes: Mapping[int, QueueLane],
        waiting: Mapping[int, Sequence[str]],
        turns: Turns,
        seats: int | None,
    ) -> None:
        self.items = items
        self.lanes = lanes
        self.waiting = waiting
        self.turns = turns
        self.seats = seats

    def order(self, profile: int | None = None) -> list[str]:
        """What waits, the next first: of one profile, or of all. What a tenant's quotas hold back comes last."""
        profiles = self.waiting if profile is None else (profile,)
        waiting = [one for each in profiles for one in self._places(each)]
        waiting.sort(key=lambda one: (-one.priority, one.order))
        held = Counter(self.items[key].tenant for lane in self.lanes.values() for key in lane.held)
        free = [one for one in waiting if not self.turns.spent(one.tenant)]
        bound = [one.key for one in waiting if self.turns.spent(one.tenant)]
        return [*self.turns.choose(free, held, len(free)), *bound]

    def outranked(self, here: QueueLane) -> bool:
        """Whether the lane should end: no other can open, and what waits for one has its turn first."""
        if self.seats is None or len(self.lanes) < self.seats:
            return False
        served = {lane.profile for lane in self.lanes.values()}
        if not any(keys for profile, keys in self.waiting.items() if profile not in served):
            return False
        return next((self.items[key].profile not in served for key in self.order()), False)

    def _places(self, profile: int) -> list[Waiting]:
        """What waits for a profile, in order of priority and age; not what is trained already for another run."""
        busy = {self.print_of(key) for lane in self.lanes.values() for key in lane.held}
        keys = [key for key in self.waiting.get(profile, ()) if self.print_of(key) not in busy]
        items = [self.items[key] for key in keys]
        return [Waiting(key, item.tenant, item.priority, item.order) for key, item in zip(keys, items, strict=True)]

    def print_of(self, key: str) -> tuple[str, ...]:
        """What two subjects of different runs share if they become the same adapter."""
        item = self.items[key]
        return (item.tenant, item.record.id, item.record.fingerprint or key) if item.run else (key,)

    def choose(self, here: QueueLane, count: int) -> list[str]:
        """The next `count` waiting subjects of the profile. One that may have killed its workers is leased alone."""
        waiting = self._places(here.profile)
        held = Counter(self.items[key].tenant for lane in self.lanes.values() for key in lane.held)
        self.turns.active({item.tenant for item in self.items.values() if item.record.state not in ENDED})
        calm = [one for one in waiting if self.items[one.key].losses < SUSPECT_ATTEMPTS]
        chosen: list[str] = []
        seen: set[tuple[str, ...]] = set()
        for key in self.turns.choose([one for one in calm if not self.turns.spent(one.tenant)], held, len(calm)):
            if len(chosen) == count:
                break
            if self.print_of(key) not in seen and self._may_work(here, self.items[key].tenant, chosen):
                chosen.append(key)
                seen.add(self.print_of(key))
        if chosen or here.held:
            return chosen
        suspects = [one for one in waiting if one not in calm and not self.turns.spent(one.tenant)]
        return [one.key for one in suspects if self._may_work(here, one.tenant, ())][:1]

    def _may_work(self, here: QueueLane, tenant: str, chosen: Sequence[str]) -> bool:
        """Whether one more subject here keeps the tenant within its devices; one that has none always may."""
        most = self.turns.devices(tenant)
        if most is None:
            return True
        taken = 0.0
        for lane in self.lanes.values():
            keys = [*lane.held, *(chosen if lane is here else ())]
            mine, all_ = sum(self.items[key].tenant == tenant for key in keys), len(keys)
            if lane is here:
                mine, all_ = mine + 1, all_ + 1
            taken += lane.devices * mine / max(1, all_)
        first = not any(self.items[key].tenant == tenant for lane in self.lanes.values() for key in lane.held)
        return taken <= most or (first and not any(self.items[key].tenant == tenant for key in chosen))
