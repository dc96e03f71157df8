"""Before a subject trains: its files are read and checked, and become latents; its prior and its last checkpoint are
found. Knows no pack and no queue."""

from collections.abc import Callable
from functools import partial

from training.base.base import Base
from training.errors import UserError
from training.manifest.subject import SubjectSpec
from training.photos.files import read_files
from training.photos.intake import Taken, fingerprint, take_in
from training.photos.photos import Photos
from training.run.home import Home
from training.run.personal import note_latents
from training.run.source import Doing, Phase, Say, Task
from training.trainer.checkpoint import SubjectState, read_states
from training.trainer.latents import LatentSet, photo_latents, photos_key
from training.trainer.member import Subject
from training.trainer.prior import prepare_prior

CHANGED = "its files have changed since the run looked at them; the same command again trains it on them as they are"


class Preparing:
    """Prepares subjects, each of its own run.

    `say(keys, doing)` is told what is being done, `note(text)` what a person should read.
    """

    def __init__(
        self,
        base: Base,
        say: Say,
        note: Callable[[str], None],
    ) -> None:
        self._base = base
        self._say = say
        self._note = note

    def photos(self, task: Task, home: Home) -> Taken:
        """Reads and checks the files of a leased subject: its photos, and those kept out of training.

        Raises UserError if they are not those of the task's fingerprint, or cannot be trained on.
        """
        spec = task.trained
        self._say([task.key], Doing(Phase.READING))
        files = task.files if task.files is not None else read_files(spec, home.run.storage, home.root)
        if fingerprint(task.spec, self._base.identity, files, home.root) != task.fingerprint:
            raise UserError(CHANGED)
        taken = take_in(spec, files, self._base.facts.resolution)
        for refusal in taken.photos.refusals:
            self._note(f"{task.key}: {refusal}")
        return taken

    def subject(self, task: Task, home: Home, found: Photos) -> Subject:
        """The subject, ready to join a pack: latents, prior, and the state of its latest whole checkpoint if any."""
        spec = task.trained
        encoding = partial(self._say, [task.key], Doing(Phase.ENCODING))
        prompt = spec.filled_instance_prompt
        note_latents(home.run, spec.id, photos_key(self._base, found.good, spec.train))
        instance = photo_latents(self._base, home.run.storage, found.good, spec.train, prompt, encoding)
        wants_images = spec.prior.enabled and spec.prior.source != "prediction"
        prior = self._prior(task.key, spec, home, found) if wants_images else None
        if self._base.prompts is not None:  # all at once: its encoders come to the device for that
            self._base.encode([*instance.prompts, *(prior.prompts if prior else ()), spec.filled_class_prompt])
        return Subject(spec, instance, prior, self._state(task.key, spec, home), task.key)

    def _prior(self, key: str, spec: SubjectSpec, home: Home, found: Photos) -> LatentSet:
        captions = [photo.caption for photo in found.good if photo.caption]
        for done, wanted, prior in prepare_prior(self._base, home.run.storage, spec, home.root, captions):
            self._say([key], Doing(Phase.CLASS_IMAGES, done, wanted))
            if prior is not None:
                return prior
        raise AssertionError("prepare_prior ends with a set")

    def _state(self, key: str, spec: SubjectSpec, home: Home) -> SubjectState | None:
        def torn(step: int, error: UserError) -> None:
            self._note(f"{key}: checkpoint of step {step} is skipped: {error}")

        return next((state for _, state in read_states(home.run, spec.id, torn)), None)
