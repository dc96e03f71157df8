"""How the lanes of a fleet stand, as its driver writes it for those who look on, and when subjects will be done."""

import time
from collections.abc import Mapping, Sequence

from pydantic import Field

from training.storage.closed import Closed
from training.storage.interface import NotFound, Storage

STANDING = "fleet/standing.json"
OLD_SECONDS = 30.0  # a driver that has written nothing for so long is not there, or has nothing to tell

Left = tuple[str, int, int]  # a subject's key, the steps it still has to take, the rows of each


class LaneStanding(Closed):
    """A lane, and what is being done with each subject in its pack."""

    lane: int
    profile: int
    subjects: dict[str, str]
    images_per_second: float


class Standing(Closed):
    """All lanes, what waits (the next first), and when each subject is expected to end, in seconds since the epoch."""

    time: float = Field(default_factory=time.time)
    lanes: tuple[LaneStanding, ...]
    waiting: tuple[str, ...]
    finish: dict[str, float]


def read_standing(storage: Storage) -> Standing:
    """How the fleet stands, as its driver has last written it; nothing trains if there has been none."""
    try:
        return Standing.model_validate_json(storage.get(STANDING))
    except NotFound:
        return Standing(time=0.0, lanes=(), waiting=(), finish={})


class Finishes:
    """Foresees ends from the lanes' real rates: images/s by profile. Those that wait follow those that train."""

    def __init__(self, rates: Mapping[int, float]) -> None:
        self._rates = rates
        self._seconds: dict[str, float] = {}
        self._ahead: dict[int, float] = {}  # images that a profile has to train before the next one that waits

    def train(self, profile: int, pack: Sequence[Left]) -> None:
        """Subjects that train together: each takes its part of the rate, and those that stay get what ends leave."""
        rate = self._rates.get(profile)
        self._ahead[profile] = self._ahead.get(profile, 0.0) + sum(steps * rows for _, steps, rows in pack)
        if not rate:
            return
        now, done = 0.0, 0
        left = sorted(pack, key=lambda one: one[1])
        for place, (key, steps, _) in enumerate(left):
            now += (steps - done) * sum(rows for _, _, rows in left[place:]) / rate
            self._seconds[key], done = now, steps

    def wait(self, profile: int, one: Left) -> None:
        """The next of those that wait."""
        key, steps, rows = one
        self._ahead[profile] = self._ahead.get(profile, 0.0) + steps * rows
        if rate := self._rates.get(profile):
            self._seconds[key] = self._ahead[profile] / rate

    def at(self, now: float) -> dict[str, float]:
        """When each subject ends; those whose profile has no rate yet are left out."""
        return {key: round(now + seconds, 1) for key, seconds in self._seconds.items()}
