"""Preparing a subject: its photos, their latents, its class images and its latest checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

from training.base.base import Base
from training.errors import UserError
from training.manifest.subject import SubjectSpec
from training.photos.intake import check_words, fingerprint, read_files
from training.photos.photos import Photo, PhotoFile, Photos, photos
from training.run.run import RunStore
from training.run.source import Doing, Phase, Task
from training.trainer.checkpoint import SubjectState, load_state
from training.trainer.latents import LatentSet, encode_photos, load_latents, photo_prompts, photos_key, save_latents
from training.trainer.member import Subject
from training.trainer.prior import prepare_prior
from training.trainer.worker.judging import hold_out

CHANGED = "its files have changed since the run looked at them; the same command again trains it on them as they are"
Say = Callable[[str, Doing], None]


@dataclass(frozen=True)
class Prepared:
    """A subject ready to train, the photos it is trained on and those kept out, and what a person should know."""

    subject: Subject
    photos: Photos
    held_out: tuple[Photo, ...]
    notes: tuple[str, ...]


class Preparing:
    """Prepares the subjects of one run over one base. `say` is told what a subject is at; relative folders start at
    `root`."""

    def __init__(self, base: Base, run: RunStore, root: str, say: Say) -> None:
        self._base = base
        self._run = run
        self._root = root
        self._say = say

    def prepare(self, task: Task, spec: SubjectSpec) -> Prepared:
        """Everything a subject needs. `spec`: the settings it is trained with.

        Raises UserError for photos that cannot be used or have changed since they were looked at, StorageError.
        """
        self._say(spec.id, Doing(Phase.READING))
        files = task.files if task.files is not None else read_files(spec, self._run.storage, self._root)
        if fingerprint(task.spec, self._base.hash, files, self._root) != task.fingerprint:
            raise UserError(CHANGED)
        found = self._photos(spec, files)
        trained, held_out = hold_out(spec, found)
        check_words(spec, trained.good)
        instance = self._latents(spec, trained)
        prior = self._prior(spec, trained) if spec.prior.enabled and spec.prior.source != "prediction" else None
        state, torn = self._resume(spec)
        notes = (*(f"{spec.id}: {refusal}" for refusal in found.refusals), *torn)
        return Prepared(Subject(spec, instance, prior, state), trained, held_out, notes)

    def _photos(self, spec: SubjectSpec, files: tuple[PhotoFile, ...]) -> Photos:
        return photos(
            files,
            resolution=spec.train.resolution or self._base.facts.resolution,
            min_photos=spec.min_images,
            crop=spec.train.cropping,
            backgrounds=spec.train.backgrounds,
        )

    def _latents(self, spec: SubjectSpec, found: Photos) -> LatentSet:
        key = photos_key(self._base, found.good, spec.train)
        cached = load_latents(self._run.storage, key)
        if cached is None:
            self._say(spec.id, Doing(Phase.ENCODING))
            made = encode_photos(self._base, found.good, spec.train, spec.filled_instance_prompt)
            save_latents(self._run.storage, key, made.images)
            return made
        return LatentSet(cached, photo_prompts(found.good, spec.train, spec.filled_instance_prompt, len(cached)))

    def _prior(self, spec: SubjectSpec, found: Photos) -> LatentSet:
        captions = [photo.caption for photo in found.good if photo.caption]
        for done, wanted, prior in prepare_prior(self._base, self._run.storage, spec, self._root, captions):
            self._say(spec.id, Doing(Phase.CLASS_IMAGES, done, wanted))
            if prior is not None:
                return prior
        raise AssertionError("prepare_prior ends with a set")

    def _resume(self, spec: SubjectSpec) -> tuple[SubjectState | None, list[str]]:
        """The latest whole checkpoint, and a note for each torn one that was skipped."""
        torn: list[str] = []
        for step, data in self._run.load_checkpoints(spec.id):
            try:
                return load_state(data), torn
            except UserError as error:
                torn.append(f"{spec.id}: checkpoint of step {step} is skipped: {error}")
        return None, torn
