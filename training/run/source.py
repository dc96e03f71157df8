"""Where the subject loop gets its subjects from, and what it says about them. Knows no torch and no Ray.

`training.trainer.worker.worker` calls a `Source`; Ray's subject queue, a local list or a test stands behind it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, Protocol

from training.manifest.subject import SubjectSpec
from training.photos.files import PhotoFile

if TYPE_CHECKING:
    from training.run.home import Home

EndKind = Literal["done", "bad subject", "diverged", "out of memory", "too large", "cancelled", "paused", "unknown"]
# how a worker lets go of a subject that has not ended
Release = Literal["lost", "preempted", "stopped"]
# why an attempt ended
Why = EndKind | Release | Literal["no lane"]


class Phase(StrEnum):
    """What is being done with a subject; the value is what a person reads.

    `PREPARING` covers the three after it, where no more is known.
    """

    PREPARING = "preparing"
    READING = "reading photos"
    ENCODING = "encoding photos"
    CLASS_IMAGES = "class images"
    TRAINING = "training"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"


@dataclass(frozen=True)
class Doing:
    """A phase and, where it is counted, how much of it is done: `done` of `wanted`."""

    phase: Phase
    done: int = 0
    wanted: int | None = None

    def __str__(self) -> str:
        return self.phase if self.wanted is None else f"{self.phase} {self.done}/{self.wanted}"


@dataclass(frozen=True)
class Task:
    """A leased subject. `fingerprint` identifies what will be published.

    `spec` is as it was submitted. `may_spread`: it has somewhere to go if this device is too small for it; without, it
    is tried anyway. `rate_factor`: its learning rates are multiplied by it. `files`: those that the fingerprint was
    taken of, where that was in this process; None: the worker reads them. `home`: its run and tenant; None: those of
    the worker, which then trains one run.
    """

    spec: SubjectSpec
    fingerprint: str
    may_spread: bool = False
    rate_factor: float = 1.0
    files: tuple[PhotoFile, ...] | None = field(default=None, repr=False)
    home: "Home | None" = None

    @property
    def key(self) -> str:
        """What the worker and its source call it: its id, with the run where subjects of several runs meet."""
        return self.spec.id if self.home is None else self.home.key(self.spec.id)

    @property
    def trained(self) -> SubjectSpec:
        """The settings it is trained with."""
        return self.spec.calmed(self.rate_factor)


Say = Callable[[Sequence[str], Doing], None]  # what is being done with these subjects


@dataclass
class Beat:
    """A sign of life, by the subjects' keys: what is being done with each subject of this worker; step and loss of
    those that train, and how many steps each has made here. `notes` are for a person to read."""

    phase: dict[str, Doing] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    images_per_second: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Orders:
    """What the source replies to a beat: subjects to drop, subjects to checkpoint and give back, and whether to
    checkpoint everything and stop."""

    cancel: frozenset[str] = frozenset()
    pause: frozenset[str] = frozenset()
    stop: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a subject ended here; `id` is its key. `version` if it was published; `trained`: steps that it made here;
    `warnings` about its photos."""

    id: str
    kind: EndKind
    reason: str | None = None
    version: str | None = None
    step: int = 0
    loss: float | None = None
    seconds: float = 0.0
    trained: int = 0
    warnings: tuple[str, ...] = ()


class Source(Protocol):
    """Where subjects come from and where their outcomes go."""

    def lease(self, count: int) -> Sequence[Task]:
        """Up to `count` subjects to work on; none means that there is nothing to do now."""

    def beat(self, beat: Beat) -> Orders:
        """Takes in a sign of life and returns what to do."""

    def ended(self, outcome: Outcome) -> None:
        """Takes in how a subject ended."""
