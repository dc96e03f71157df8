"""Where the subject loop gets its subjects from, and what it says about them. Knows no torch and no Ray.

`training.trainer.worker.worker` calls a `Source`; Ray's subject queue, a local list or a test stands behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from training.manifest.subject import SubjectSpec
from training.photos.photos import PhotoFile


class Phase(StrEnum):
    """What a worker is doing with a subject."""

    READING = "reading photos"
    ENCODING = "encoding photos"
    CLASS_IMAGES = "class images"
    TRAINING = "training"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"


@dataclass(frozen=True)
class Doing:
    """A phase, and how far it is: `done` of `wanted`, where that can be counted."""

    phase: Phase
    done: int = 0
    wanted: int = 0

    def __str__(self) -> str:
        return f"{self.phase} {self.done}/{self.wanted}" if self.wanted else str(self.phase)


Kind = Literal["done", "bad subject", "diverged", "out of memory", "too large", "cancelled", "unknown"]


@dataclass(frozen=True)
class Task:
    """A leased subject. `fingerprint` identifies what will be published.

    `spec` is as it was submitted. `may_spread`: it has somewhere to go if this device is too small for it; without, it
    is tried anyway. `rate_factor`: its learning rates are multiplied by it. `files`: those that the fingerprint was
    taken of, where that was in this process; None: the worker reads them.
    """

    spec: SubjectSpec
    fingerprint: str
    may_spread: bool = False
    rate_factor: float = 1.0
    files: tuple[PhotoFile, ...] | None = field(default=None, repr=False)

    @property
    def trained(self) -> SubjectSpec:
        """The settings it is trained with."""
        return self.spec.calmed(self.rate_factor)


@dataclass
class Beat:
    """A sign of life: what every subject of this worker is doing. Step and loss of those that train."""

    phase: dict[str, Doing] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Orders:
    """What the source replies to a beat: subjects to drop, and whether to checkpoint everything and stop."""

    cancel: frozenset[str] = frozenset()
    stop: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a subject ended here. `version` if it was published; `warnings` about its photos."""

    id: str
    kind: Kind
    reason: str | None = None
    version: str | None = None
    step: int = 0
    loss: float | None = None
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


class Source(Protocol):
    """Where subjects come from and where their outcomes go."""

    def lease(self, count: int) -> Sequence[Task]:
        """Up to `count` subjects to work on; none means that there is nothing to do now."""

    def beat(self, beat: Beat) -> Orders:
        """Takes in a sign of life and returns what to do."""

    def ended(self, outcome: Outcome) -> None:
        """Takes in how a subject ended."""
