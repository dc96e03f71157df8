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
from training.run.run import RunStore
from training.run.source import Doing, Phase, Say, Task
from training.trainer.checkpoint import SubjectState, read_states
from training.trainer.latents import LatentSet, photo_latents
from training.trainer.member import Subject
from training.trainer.prior import prepare_prior

CHANGED = "its files have changed since the run looked at them; the same command again trains it on them as they are"


class Preparing:
    """Prepares the subjects of one run.

    `say(ids, doing)` is told what is being done, `note(text)` what a person should read. `root` is where the manifest's
    relative folders start.
    """

    def __init__(
        self,
        base: Base,
        run: RunStore,
        root: str,
        say: Say,
        note: Callable[[str], None],
    ) -> None:
        self._base = base
        self._run = run
        self._root = root
        self._say = say
        self._note = note

    def photos(self, task: Task) -> Taken:
        """Reads and checks the files of a leased subject: its photos, and those kept out of training.

        Raises UserError if they are not those of the task's fingerprint, or cannot be trained on.
        """
        spec = task.trained
        self._say([spec.id], Doing(Phase.READING))
        files = task.files if task.files is not None else read_files(spec, self._run.storage, self._root)
        if fingerprint(task.spec, self._base.hash, files, self._root) != task.fingerprint:
            raise UserError(CHANGED)
        taken = take_in(spec, files, self._base.facts.resolution)
        for refusal in taken.photos.refusals:
            self._note(f"{spec.id}: {refusal}")
        return taken

    def subject(self, spec: SubjectSpec, found: Photos) -> Subject:
        """The subject, ready to join a pack: latents, prior, and the state of its latest whole checkpoint if any."""
        encoding = partial(self._say, [spec.id], Doing(Phase.ENCODING))
        prompt = spec.filled_instance_prompt
        instance = photo_latents(self._base, self._run.storage, found.good, spec.train, prompt, encoding)
        wants_images = spec.prior.enabled and spec.prior.source != "prediction"
        prior = self._prior(spec, found) if wants_images else None
        return Subject(spec, instance, prior, self._state(spec))

    def _prior(self, spec: SubjectSpec, found: Photos) -> LatentSet:
        captions = [photo.caption for photo in found.good if photo.caption]
        for done, wanted, prior in prepare_prior(self._base, self._run.storage, spec, self._root, captions):
            self._say([spec.id], Doing(Phase.CLASS_IMAGES, done, wanted))
            if prior is not None:
                return prior
        raise AssertionError("prepare_prior ends with a set")

    def _state(self, spec: SubjectSpec) -> SubjectState | None:
        def torn(step: int, error: UserError) -> None:
            self._note(f"{spec.id}: checkpoint of step {step} is skipped: {error}")

        return next((state for _, state in read_states(self._run, spec.id, torn)), None)
