"""A tuned subject, ready to train in many variants: its photos, their latents and its class images, each made once.

Latents of photos stay in memory; class images show nobody and are cached on the storage, as in every run.
"""

from collections.abc import Callable
from dataclasses import dataclass

from training.base.base import Base
from training.evaluation.exam import Exam
from training.manifest.subject import SubjectSpec
from training.photos.files import read_files
from training.photos.intake import Taken, take_in
from training.run.personal import check_photos, check_subject
from training.run.run import RunStore
from training.storage.interface import Storage
from training.trainer.checkpoint import SubjectState
from training.trainer.latents import LatentSet, encode_photos
from training.trainer.member import Subject
from training.trainer.prior import prepare_prior
from training.trainer.worker.finishing import middle

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Ready:
    """A subject's photos and latents, which all of its variants share."""

    taken: Taken
    instance: LatentSet
    prior: LatentSet | None

    def subject(self, spec: SubjectSpec, key: str) -> Subject:
        """A variant of the subject at its beginning, as a run would train it."""
        return Subject(spec, self.instance, self.prior if spec.prior.enabled else None, None, key)

    def exam(self, spec: SubjectSpec, state: SubjectState, base: Base) -> Exam:
        """What a variant is examined with at its present step, as its checkpoint is in a run."""
        side = spec.train.resolution or base.facts.resolution
        return Exam(
            spec=spec,
            photos=[middle(photo.image, side) for photo in self.taken.photos.good],
            held_out=[middle(photo.image, side) for photo in self.taken.held_out],
            checkpoints={state.step: state.learned},
        )


def make_ready(base: Base, storage: Storage, spec: SubjectSpec, *, tenant: str, root: str, tell: Tell) -> Ready:
    """Reads, checks and encodes a subject's photos, and makes or finds its class images.

    `tell` hears what is being done and what is not used. Raises UserError for photos that cannot be trained on, and for
    a subject whose consent is missing or was taken back.
    """
    store = RunStore(storage, "tune")  # of no run: only the storage's consents are looked at
    tell(f"{spec.id}: reading its photos")
    files = read_files(spec, storage, root)
    check_subject(store, tenant, spec, files)
    taken = take_in(spec, files, base.facts.resolution)
    check_photos(store, tenant, spec, [*taken.photos.good, *taken.held_out])
    for refusal in taken.photos.refusals:
        tell(f"{spec.id}: {refusal}")
    tell(f"{spec.id}: encoding its photos")
    instance = encode_photos(base, taken.photos.good, spec.train, spec.filled_instance_prompt)
    wants_images = spec.prior.enabled and spec.prior.source != "prediction"
    prior = _class_images(base, storage, spec, taken, root, tell) if wants_images else None
    if base.prompts is not None:  # all at once: its encoders come to the device for that
        base.encode([*instance.prompts, *(prior.prompts if prior else ()), spec.filled_class_prompt])
    return Ready(taken, instance, prior)


def _class_images(base: Base, storage: Storage, spec: SubjectSpec, taken: Taken, root: str, tell: Tell) -> LatentSet:
    captions = [photo.caption for photo in taken.photos.good if photo.caption]
    for done, wanted, prior in prepare_prior(base, storage, spec, root, captions):
        if prior is not None:
            return prior
        tell(f"{spec.id}: class images {done}/{wanted}")
    raise AssertionError("prepare_prior ends with a set")
