"""What the subject queue is given, and what it gives out: entries and leases."""

from collections.abc import Iterable, Sequence

from pydantic import Field

from training.manifest.plan import PackPlan
from training.manifest.subject import SubjectSpec
from training.photos.files import PhotoFile
from training.run.home import Home
from training.run.run import SubjectRecord
from training.run.source import Task
from training.storage.closed import Closed


class Entry(Closed):
    """What the queue is told about a subject. Only lanes of its `profile` may lease it; high priorities go first.

    `reserve`: the profile it goes to if one device is too small for it. `run` and `tenant`: whose it is, where one
    queue serves several.
    """

    record: SubjectRecord
    profile: int
    priority: int = 0
    reserve: int | None = None
    run: str = ""
    tenant: str = ""

    @property
    def key(self) -> str:
        """What the queue calls it: its id, after its run where there are several."""
        return f"{self.run}/{self.record.id}" if self.run else self.record.id


def entries(
    subjects: Iterable[SubjectRecord], packs: Sequence[PackPlan], reserve: Sequence[PackPlan] = ()
) -> list[Entry]:
    """The entries of a run's subjects. A profile is the place of a pack among `packs`, then `reserve`."""
    place = {id: index for index, pack in enumerate(packs) for id in pack.subjects}
    spare = {id: index for index, pack in enumerate(reserve, len(packs)) for id in pack.subjects}
    return [Entry(record=one, profile=place[one.id], reserve=spare.get(one.id)) for one in subjects]


class Lease(Closed):
    """A subject a lane may work on; `id` is the queue's key, `run` empty where the queue serves one run."""

    id: str
    run: str = ""
    fingerprint: str
    rate_factor: float = Field(1.0, description="its learning rates are multiplied by it: less after it has diverged")
    may_spread: bool = Field(False, description="a gang takes it if one device is too small for it")

    def task(self, spec: SubjectSpec, home: Home | None = None, files: tuple[PhotoFile, ...] | None = None) -> Task:
        """The leased subject with its settings, as they were submitted, and its files if they have been read."""
        return Task(spec, self.fingerprint, self.may_spread, self.rate_factor, files, home)
