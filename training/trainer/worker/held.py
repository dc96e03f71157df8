"""A leased subject while a worker has it, from its lease to its outcome."""

import time
from dataclasses import dataclass, field

from PIL import Image

from training.manifest.subject import SubjectSpec
from training.photos.photos import Photo, Photos
from training.run.source import Task


@dataclass
class Held:
    """`spec` are the settings it is trained with; `since` the seconds since the epoch at which it was leased.

    `saved_step` is that of its latest checkpoint, -1 without; `rates` are images a second by step, `samples` the sample
    pictures by step.
    """

    task: Task
    spec: SubjectSpec
    since: float = field(default_factory=time.time)
    found: Photos | None = None
    held_out: tuple[Photo, ...] = ()
    saved_step: int = -1
    rates: dict[int, float] = field(default_factory=dict)
    samples: dict[int, list[Image.Image]] = field(default_factory=dict)

    @property
    def photos(self) -> Photos:
        """The photos it is trained on, once it has been prepared."""
        assert self.found is not None
        return self.found

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its card and its record say about its photos."""
        if self.found is None:
            return ()
        return (*self.found.refusals, *(f"{', '.join(w.names)}: {w.message}" for w in self.found.warnings))
