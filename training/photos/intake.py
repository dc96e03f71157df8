"""What a subject's files come to: the photos to train on, those kept out to judge by, and the fingerprint of it all."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from training.errors import UserError
from training.manifest.subject import SubjectSpec
from training.photos.files import PhotoFile, read_files
from training.photos.photos import Photo, Photos, photos
from training.storage.file_hash import hash_file
from training.storage.interface import Storage

# photos with one of these warnings are no good references
_UNFIT = {"small", "blurry", "dark", "overexposed", "identical", "near-duplicate"}
# settings that decide what is kept or shown, not what is learned
_NO_EFFECT: dict[str, Any] = {
    "id": True,
    "images": True,
    "sample_prompts": True,
    "samples": True,
    "min_images": True,
    "public": True,
    "consent": True,
    "keep_photos": True,
    "preset": True,
    "train": {"keep_checkpoints", "sample_every", "gradient_checkpointing", "strategy", "zero"},
}


class Taken(NamedTuple):
    """A subject's photos: those to train on, and those kept out of training to judge by."""

    photos: Photos
    held_out: tuple[Photo, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is not used, and what could be better, a sentence each."""
        warned = (f"{', '.join(warning.names)}: {warning.message}" for warning in self.photos.warnings)
        return (*self.photos.refusals, *warned)


def take_in(subject: SubjectSpec, files: Sequence[PhotoFile], resolution: int) -> Taken:
    """Reads a subject's files as its settings ask. `resolution` in px is the base's, for a subject that names none.

    Raises UserError for files that cannot be trained on: too few photos, too many, words that no photo trains.
    """
    train = subject.train
    found = photos(
        files,
        resolution=train.resolution or resolution,
        min_photos=subject.min_images,
        crop=train.cropping,
        backgrounds=train.backgrounds,
    )
    taken = hold_out(subject, found)
    check_words(subject, taken.photos.good)
    return taken


def hold_out(subject: SubjectSpec, found: Photos) -> Taken:
    """Keeps `evaluate.hold_out` photos out of training: sound ones, drawn by their content, the same in every attempt.

    They are fewer than asked for, or none, if fewer than `min_images` would be left to train on.
    """
    asked = subject.evaluate.hold_out if subject.evaluate.enabled else 0
    unfit = {name for warning in found.warnings if warning.kind in _UNFIT for name in warning.names}
    fit = [photo for photo in found.good if photo.name not in unfit]
    count = max(0, min(asked, len(found.good) - subject.min_images, len(fit)))
    drawn = sorted(fit, key=lambda photo: _draw(subject, photo))[:count]
    names = {photo.name for photo in drawn}
    kept = replace(found, good=tuple(photo for photo in found.good if photo.name not in names))
    return Taken(kept, tuple(drawn))


def _draw(subject: SubjectSpec, photo: Photo) -> str:
    return hashlib.sha256(f"{subject.evaluate.seed} {photo.sha256}".encode()).hexdigest()


def check_words(subject: SubjectSpec, found: Sequence[Photo]) -> None:
    """Raises UserError for textual-inversion words that no photo's caption contains: nothing would train them."""
    prompts = {photo.caption or subject.filled_instance_prompt for photo in found}
    if subject.train.backgrounds and any(photo.mask is not None for photo in found):
        prompts.add(subject.filled_instance_prompt)  # where the background is replaced, the caption is not used
    lost = [word for word in subject.words.tokens if not any(word in prompt for prompt in prompts)]
    if lost:
        raise UserError(
            f"Word '{lost[0]}' of `words.tokens` is in none of the photos' captions, so nothing would train it. Write "
            "it into captions, or leave a photo without one: that photo takes the `instance_prompt`."
        )


def current_fingerprint(subject: SubjectSpec, base_hash: str, storage: Storage, root: str = ".") -> str:
    """The fingerprint of a subject with its files as they lie now. Raises UserError saying what is missing where."""
    return fingerprint(subject, base_hash, read_files(subject, storage, root), root)


def class_folder(subject: SubjectSpec, root: str = ".") -> Path:
    """The folder of a subject's own class images (`prior.source: folder`). Raises UserError if it is none."""
    folder = Path(root, subject.prior.folder or "").expanduser()
    if not folder.is_dir():
        raise UserError(
            f"prior.folder '{subject.prior.folder}' of subject '{subject.id}' is no folder. Give the folder of the "
            "class images, relative to the manifest."
        )
    return folder


def fingerprint(subject: SubjectSpec, base_hash: str, files: Sequence[PhotoFile], root: str = ".") -> str:
    """What the adapter depends on, as sha256 hex: base, settings, and every file of its own and of its class folder.

    Trainings with equal fingerprints give the same adapter. `root` is where relative folders start. Raises UserError
    without the class folder.
    """
    digest = hashlib.sha256()
    digest.update(f"dreamfleet-subject-1\n{base_hash}\n".encode())
    digest.update(subject.model_dump_json(by_alias=True, exclude=_NO_EFFECT).encode())
    readable = [file for file in files if not file.problem]  # unreadable files are neither trained on nor uploaded
    for file in sorted(readable, key=lambda file: file.name):
        digest.update(f"\n{file.name} {hashlib.sha256(file.data).hexdigest()}".encode())
    if subject.prior.enabled and subject.prior.source == "folder":
        folder = class_folder(subject, root)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"\nclass {path.relative_to(folder).as_posix()} {hash_file(path)}".encode())
    return digest.hexdigest()
