"""A subject's files, from wherever the manifest says they are, and what identifies the subject's result.

`images` is a folder relative to the manifest, a URI that `open_storage` knows, or `storage:<key>` for files that were
uploaded to the run's own storage.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.manifest import SubjectSpec
from training.photos import PhotoFile, list_photo_files, subfolders
from training.storage import open_storage
from training.storage_base import Storage, masked

UPLOADED = "storage:"
# these decide what is kept or shown, not what is learned
_NO_EFFECT: dict[str, Any] = {
    "id": True,
    "images": True,
    "sample_prompts": True,
    "min_images": True,
    "public": True,
    "train": {"keep_checkpoints", "sample_every", "gradient_checkpointing", "strategy", "zero"},
}


def read_files(subject: SubjectSpec, storage: Storage, root: str = ".") -> tuple[PhotoFile, ...]:
    """The files of `subject.images`. Raises UserError saying what is missing where."""
    if subject.images.startswith(UPLOADED):
        return _read_keys(storage, subject.images.removeprefix(UPLOADED), subject.images)
    if "://" in subject.images:
        return _read_keys(open_storage(subject.images), "", masked(subject.images))
    return list_photo_files(Path(root, subject.images).expanduser())


def _read_keys(storage: Storage, prefix: str, shown: str) -> tuple[PhotoFile, ...]:
    keys = storage.list(prefix)
    if not keys:
        raise UserError(f"images '{shown}' holds no files. Put the subject's photos there.")
    start = len(prefix) + 1 if prefix else 0
    names = [key[start:] for key in keys]
    files = (PhotoFile(name, storage.get(key)) for name, key in zip(names, keys, strict=True) if "/" not in name)
    return (*files, *subfolders(name for name in names if "/" in name))


def fingerprint(subject: SubjectSpec, base_hash: str, files: Sequence[PhotoFile]) -> str:
    """What the adapter depends on, as sha256 hex: base, settings and every file. Two equal ones are one training."""
    digest = hashlib.sha256()
    digest.update(f"dreamfleet-subject-1\n{base_hash}\n".encode())
    digest.update(subject.model_dump_json(by_alias=True, exclude=_NO_EFFECT).encode())
    for file in sorted((file for file in files if not file.is_folder), key=lambda file: file.name):
        digest.update(f"\n{file.name} {hashlib.sha256(file.data).hexdigest()}".encode())
    return digest.hexdigest()
