"""The worker's way to a chosen step: photos kept out of training, checkpoints as exams, records, the gate.

What `training.trainer.worker.worker` calls between the last step and publication. Knows no slot and no source.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from training.adapters.adapter import Adapter
from training.base.base import Base
from training.errors import UserError
from training.evaluation.evaluate import Evaluation, evaluate_subjects
from training.evaluation.exam import Exam, candidate_steps
from training.evaluation.judges.box import JudgeBox, Judges
from training.evaluation.record import save_record
from training.manifest.gate import failures, gate_reason
from training.manifest.subject import SubjectSpec
from training.photos.photos import Photo, Photos
from training.photos.variants import variants
from training.run.run import RunStore
from training.trainer.checkpoint import load_state

# a photo with one of these is a poor judge
_UNFIT = {"small", "blurry", "dark", "overexposed", "identical", "near-duplicate"}


@dataclass(frozen=True)
class Finished:
    """A subject at its last step. `adapter` is as trained."""

    spec: SubjectSpec
    step: int
    adapter: Adapter
    photos: Photos
    held_out: tuple[Photo, ...]


class Judging:
    """Judges the subjects of one run on one device."""

    def __init__(self, base: Base, run: RunStore) -> None:
        self._base = base
        self._run = run
        self._box = JudgeBox(base)

    def check(self, spec: SubjectSpec) -> None:
        """Raises UserError if the weights of the subject's judges are missing: better before training than after."""
        if spec.evaluate.enabled:
            self._judges(spec)

    def judge(
        self, finished: Sequence[Finished], alive: Callable[[int, int], None] | None = None
    ) -> dict[str, Evaluation]:
        """Judges those that asked for it, together, and writes their records. By subject id."""
        asked = [subject for subject in finished if subject.spec.evaluate.enabled]
        if not asked:
            return {}
        found = evaluate_subjects(self._base, [self._exam(subject) for subject in asked], self._judges, alive=alive)
        for subject, evaluation in zip(asked, found, strict=True):
            save_record(self._run, evaluation, subject.photos, subject.held_out)
        return {evaluation.id: evaluation for evaluation in found}

    def checkpoint(self, spec: SubjectSpec, step: int) -> Adapter:
        """The adapter at a step that was judged, as trained."""
        return next(load_state(data).adapter for at, data in self._run.load_checkpoints(spec.id) if at == step)

    def _judges(self, spec: SubjectSpec) -> Judges:
        return self._box.judges(spec.evaluate.likeness_model, spec.evaluate.fidelity_model)

    def _exam(self, subject: Finished) -> Exam:
        spec = subject.spec
        wanted = set(candidate_steps(spec.train.max_steps, spec.evaluate.candidates))
        checkpoints: dict[int, Adapter] = {}
        for step, data in self._run.load_checkpoints(spec.id):
            if step in wanted and step < subject.step:
                try:
                    checkpoints[step] = load_state(data).adapter
                except UserError:
                    continue  # a torn one is no candidate
        checkpoints[subject.step] = subject.adapter
        side = spec.train.resolution or self._base.facts.resolution
        return Exam(
            spec=spec,
            photos=[_at(photo.image, side) for photo in subject.photos.good],
            held_out=[_at(photo.image, side) for photo in subject.held_out],
            checkpoints=dict(sorted(checkpoints.items())),
        )


def hold_out(spec: SubjectSpec, found: Photos) -> tuple[Photos, tuple[Photo, ...]]:
    """The photos to train on, and those kept out to judge by: sound ones, drawn by their content, so that every attempt
    keeps out the same. Fewer than asked, or none, where `min_images` would not stay."""
    asked = spec.evaluate.hold_out if spec.evaluate.enabled else 0
    unfit = {name for warning in found.warnings if warning.kind in _UNFIT for name in warning.names}
    fit = [photo for photo in found.good if photo.name not in unfit]
    count = max(0, min(asked, len(found.good) - spec.min_images, len(fit)))
    drawn = sorted(fit, key=lambda photo: _draw(spec, photo))[:count]
    names = {photo.name for photo in drawn}
    return replace(found, good=tuple(photo for photo in found.good if photo.name not in names)), tuple(drawn)


def gate_failure(spec: SubjectSpec, evaluation: Evaluation | None) -> str | None:
    """Why a subject may not be published, or None."""
    scores = evaluation.of_step(evaluation.choice.step) if evaluation is not None else ()
    found = failures(spec.publish_if, scores)
    return gate_reason(found) if found else None


def _draw(spec: SubjectSpec, photo: Photo) -> str:
    return hashlib.sha256(f"{spec.evaluate.seed} {photo.sha256}".encode()).hexdigest()


def _at(image: Image.Image, side: int) -> Image.Image:
    """The middle of a photo at the size that is drawn, so that both have the same detail."""
    return Image.fromarray(variants(image, side)[0])
