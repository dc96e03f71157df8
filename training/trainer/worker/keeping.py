"""While a subject trains: its checkpoints, events and sample pictures are kept with the run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from training.base.base import Base
from training.evaluation.exam import candidate_steps
from training.manifest.subject import SubjectSpec
from training.photos.intake import Taken
from training.run.fault import apart, together
from training.run.home import Home
from training.sampling.samples import WornSubject, draw_samples
from training.trainer.checkpoint import dump_state
from training.trainer.member import StepReport, Subject
from training.trainer.pack import Pack
from training.trainer.worker.events import NAME as EVENTS, event_file
from training.trainer.worker.publish import Finished, png_bytes

Missed = Callable[[str, str, Exception], None]  # what is missing, the subject's key, error


@dataclass
class Kept:
    """A subject, and what was kept of it: the step of its last checkpoint (-1: none), images/s and pictures by step."""

    spec: SubjectSpec
    home: Home
    fingerprint: str
    taken: Taken
    step: int = -1
    rates: dict[int, float] = field(default_factory=dict)
    samples: dict[int, list[Image.Image]] = field(default_factory=dict)


class Keeping:
    """Keeps the subjects of one pack, each with its run. A subject goes on without what cannot be kept; `missed` is
    called with what it is, the subject's key and the error. All ids here are keys.
    """

    def __init__(self, base: Base, pack: Pack, missed: Missed) -> None:
        self._base = base
        self._pack = pack
        self._missed = missed
        self._kept: dict[str, Kept] = {}

    def join(self, home: Home, fingerprint: str, taken: Taken, subject: Subject) -> None:
        """Begins to keep a subject, from the step of its state on."""
        step = subject.state.step if subject.state else -1
        self._kept[subject.id] = Kept(subject.spec, home, fingerprint, taken, step)

    def leave(self, id: str) -> Kept | None:
        """Forgets a subject; returns what was kept of it, None if it never joined."""
        return self._kept.pop(id, None)

    def finished(self, id: str) -> Finished:
        """A subject as it stands in its slot, with all that was kept of it."""
        kept = self._kept[id]
        state = self._pack.state(id)
        return Finished(id, kept.spec, kept.home, kept.fingerprint, state, *kept.taken, kept.rates, kept.samples)

    def follow(self, reports: Sequence[StepReport], images_per_second: float) -> None:
        """Keeps what is due after a step of these subjects: samples first, so that the events hold them."""
        sound = [report for report in reports if report.failure is None]
        self._sample([report for report in sound if self._samples_are_due(report)])
        for report in sound:
            self._kept[report.id].rates[report.step] = images_per_second
            if self._checkpoint_is_due(report):
                self.checkpoint([report.id], f"no checkpoint of step {report.step}")

    def checkpoint(self, ids: Sequence[str], otherwise: str) -> None:
        """Writes checkpoint and events of subjects as they stand; `otherwise` is said of those that cannot be."""
        apart(ids, self._checkpoint, lambda id, error: self._missed(otherwise, id, error))

    def checkpoint_all(self) -> None:
        """Checkpoints all subjects of the pack. Raises the first error after every subject has been tried."""
        errors: list[Exception] = []
        apart(
            [id for id in self._pack.ids if id in self._kept], self._checkpoint, lambda _, error: errors.append(error)
        )
        if errors:
            raise errors[0]

    def pictures(self, ids: Sequence[str]) -> dict[str, list[Image.Image]]:
        """Sample pictures of subjects as they are in their slots, drawn together; without those that fail."""

        def draw(ids: Sequence[str]) -> Mapping[str, list[Image.Image]]:
            worn = [WornSubject(self._kept[id].spec, *self._pack.slot(id)) for id in ids]
            return dict(zip(ids, draw_samples(self._base, self._pack.bank, worn), strict=True))

        return together(ids, draw, lambda id, error: self._missed("no sample pictures", id, error))

    # -- pieces --

    def _samples_are_due(self, report: StepReport) -> bool:
        every = self._kept[report.id].spec.train.sample_every
        return every is not None and report.step % every == 0

    def _checkpoint_is_due(self, report: StepReport) -> bool:
        spec = self._kept[report.id].spec
        return report.step % spec.train.checkpoint_every == 0 or report.step in _spared_steps(spec)

    def _sample(self, due: Sequence[StepReport]) -> None:
        steps = {report.id: report.step for report in due}
        drawn = self.pictures(list(steps))

        def keep(id: str) -> None:
            kept = self._kept[id]
            kept.samples[steps[id]] = drawn[id]
            for index, image in enumerate(drawn[id]):
                key = kept.home.run.subject_key(kept.spec.id, "samples", f"{steps[id]:08d}-{index}.png")
                kept.home.run.storage.put(key, png_bytes(image))

        apart(list(drawn), keep, lambda id, error: self._missed("its samples could not be kept", id, error))

    def _checkpoint(self, id: str) -> None:
        state, kept = self._pack.state(id), self._kept[id]
        if state.step <= max(kept.step, 0):
            return
        spec, run = kept.spec, kept.home.run
        run.save_checkpoint(spec.id, state.step, dump_state(state), spec.train.keep_checkpoints, _spared_steps(spec))
        events = event_file(state.history, kept.rates, kept.samples)
        run.storage.put(run.subject_key(spec.id, "events", EVENTS), events)
        kept.step = state.step


def _spared_steps(spec: SubjectSpec) -> frozenset[int]:
    """Steps whose checkpoints are always made and kept: the last, and those that are compared."""
    compared = candidate_steps(spec.train.max_steps, spec.evaluate.candidates) if spec.evaluate.enabled else ()
    return frozenset({*compared, spec.train.max_steps})
