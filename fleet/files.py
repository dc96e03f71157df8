"""Uploaded photos: kept unpacked on the storage, and checked before they are.

    files/<tenant>/<id>/file.json
    files/<tenant>/<id>/photos/<folder>/<name>      without <folder> where the archive has none

Every call is a tenant's: what is another's does not exist. Blocking; knows nothing of HTTP but its errors.
"""

import io
import re
import time
import zipfile
from collections.abc import Iterator, Sequence
from typing import Protocol

from pydantic import Field

from fleet.archive import Folders, unpack
from fleet.config import TrainLimits
from serving.errors import QuotaExceeded
from serving.http.once import digest, id_once
from serving.http.problems import ApiError
from training.errors import UserError
from training.photos.files import UPLOADED, PhotoFile
from training.photos.photo_report import TooFewPhotos
from training.photos.photos import Photo, Photos, photos
from training.photos.warning import PhotoWarning
from training.run.accepted import new_id, read_order, unfinished
from training.run.run import ENDED, RunStore
from training.storage.closed import Closed
from training.storage.interface import NotFound, Storage

PREFIX = "file-"
_ID = re.compile(rf"{PREFIX}[0-9a-f]{{8,64}}")


class BadFile(Closed):
    """A file that is not used, and why."""

    name: str
    reason: str


class FileFinding(Closed):
    """What could be better: which photos, what was found, what to do."""

    kind: str
    names: tuple[str, ...]
    message: str
    advice: str


class Checked(Closed):
    """The photos of one folder of an archive, as they were checked at the upload. `error`: nobody could train on it."""

    folder: str
    photos: int
    captions: int
    problems: tuple[BadFile, ...] = ()
    warnings: tuple[FileFinding, ...] = ()
    error: str | None = None


class StoredFile(Closed):
    """An upload. `bytes` are the archive's; `unchecked` says what was not looked at, and why."""

    id: str
    tenant: str
    filename: str
    bytes: int
    created: float = Field(default_factory=time.time)
    purpose: str = "fine-tune"
    subjects: tuple[Checked, ...]
    unchecked: tuple[str, ...] = ()


class FaceCheck(Protocol):
    """Compares the faces on photos; `missing` says why it cannot."""

    @property
    def missing(self) -> str | None:
        """Why faces are not compared, in words; None where they are."""

    def findings(self, photos: Sequence[Photo]) -> tuple[PhotoWarning, ...]:
        """Photos of another person than most."""


class Files:
    """The uploads of one storage. `resolution` is the base's, in px."""

    def __init__(self, storage: Storage, resolution: int, limits: TrainLimits, faces: FaceCheck) -> None:
        self.storage = storage
        self._resolution = resolution
        self._limits = limits
        self._faces = faces

    def add(self, tenant: str, filename: str, data: bytes, key: str | None = None) -> StoredFile:
        """Checks an archive and keeps its photos. Raises UserError if it is none, or holds nothing to train on."""
        if len(data) > self._limits.file_bytes:
            raise ApiError(413, f"The file has {len(data)} bytes; at most {self._limits.file_bytes} are allowed.")
        if len(self.storage.folders(f"files/{tenant}")) >= self._limits.files:
            raise QuotaExceeded(f"You have {self._limits.files} files, which is the limit. Delete some.")
        folders = unpack(data)
        checked = tuple(self._check(folder, files) for folder, files in _groups(folders))
        if not any(one.photos for one in checked):
            said = "; ".join(f"{bad.name}: {bad.reason}" for one in checked for bad in one.problems[:8])
            raise ApiError(
                400,
                f"There is no usable photo in '{filename}'. {said or 'It holds no pictures.'} Send JPEG, PNG or WebP "
                "files, 5 to 30 a subject.",
                param="file",
            )
        id = id_once(self.storage, tenant, key, digest(filename, data), new_id(PREFIX))
        unchecked = () if self._faces.missing is None else (self._faces.missing,)
        found = StoredFile(
            id=id, tenant=tenant, filename=filename, bytes=len(data), subjects=checked, unchecked=unchecked
        )
        for folder, files in folders.items():
            for name, content in files.items():
                self.storage.put("/".join(filter(None, (self._folder(tenant, id), "photos", folder, name))), content)
        self.storage.put(f"{self._folder(tenant, id)}/file.json", found.model_dump_json().encode())
        return found

    def get(self, tenant: str, id: str) -> StoredFile:
        """A tenant's file. Raises ApiError 404."""
        try:
            if not _ID.fullmatch(id):
                raise NotFound(id)
            return StoredFile.model_validate_json(self.storage.get(f"{self._folder(tenant, id)}/file.json"))
        except NotFound:
            raise ApiError(
                404, f"No file '{id[:80]}'. `GET /v1/files` lists yours.", param="id", code="file_not_found"
            ) from None

    def list(self, tenant: str) -> list[str]:
        """The ids of a tenant's files, the latest first."""
        return sorted(self.storage.folders(f"files/{tenant}"), reverse=True)

    def delete(self, tenant: str, id: str) -> None:
        """Removes a file. Raises ApiError: 404, or 409 while a subject that has not ended trains on it."""
        self.get(tenant, id)
        for run in unfinished(self.storage, tenant):
            order = read_order(self.storage, run)
            if order is not None and id in order.files and not self._has_ended(run):
                raise ApiError(
                    409, f"File '{id}' is used by {run}, which has not ended. Cancel it first.", code="file_in_use"
                )
        self.storage.delete(f"{self._folder(tenant, id)}/file.json")
        self.storage.delete_tree(self._folder(tenant, id))

    def content(self, tenant: str, id: str) -> bytes:
        """A zip of what was uploaded, as it is kept."""
        self.get(tenant, id)
        prefix = f"{self._folder(tenant, id)}/photos"
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for key in self.storage.list(prefix):
                archive.writestr(key.removeprefix(f"{prefix}/"), self.storage.get(key))
        return buffer.getvalue()

    def photos(self, tenant: str, id: str, folder: str, names: Sequence[str]) -> Sequence[Photo]:
        """The good photos of a folder of a file; those of `names`, if any are given.

        Raises ApiError 404 for a file, folder or photo that is not there.
        """
        found, images = self.images(tenant, f"{id}/{folder}" if folder else id)
        prefix = images.removeprefix(UPLOADED)
        keys = [key for key in self.storage.list(prefix) if "/" not in key.removeprefix(f"{prefix}/")]
        files = [PhotoFile(key.removeprefix(f"{prefix}/"), self.storage.get(key)) for key in keys]
        good = photos(files, resolution=self._resolution, min_photos=0, with_report=False).good
        there = {photo.name: photo for photo in good}
        if lost := next((name for name in names if name not in there), None):
            known = ", ".join(list(there)[:20])
            raise ApiError(404, f"File '{found.id}' has no usable photo '{lost[:80]}', only {known}.", param="names")
        return [there[name] for name in names] if names else good

    def images(self, tenant: str, name: str) -> tuple[StoredFile, str]:
        """The file that `file-...` or `file-.../folder` means, and where its photos lie, as a subject's `images`.

        Raises ApiError if there is none, or the file has several folders and none is named.
        """
        id, _, folder = name.partition("/")
        found = self.get(tenant, id)
        folders = [one.folder for one in found.subjects]
        if not folder and "" not in folders:
            if len(folders) > 1:
                raise ApiError(
                    400,
                    f"File '{id}' holds several subjects: {', '.join(folders[:20])}. Name one: '{id}/{folders[0]}'.",
                    param="training_file",
                )
            folder = folders[0]
        if folder not in folders:
            raise ApiError(
                404, f"File '{id}' has no folder '{folder[:80]}', only {', '.join(folders[:20])}.", param="images"
            )
        return found, f"{UPLOADED}{self._folder(tenant, id)}/photos" + (f"/{folder}" if folder else "")

    def bytes(self, tenant: str) -> int:
        """What a tenant's files take, unpacked."""
        return sum(self.storage.sizes(f"files/{tenant}").values())

    def _has_ended(self, run: str) -> bool:
        """Whether every subject of a run has ended, which the driver may not have written down as the run's end yet."""
        store = RunStore(self.storage, run)
        states = [store.subject(spec.id) for spec in store.record().manifest.subjects]
        return all(state is not None and state.state in ENDED for state in states)

    def _folder(self, tenant: str, id: str) -> str:
        return f"files/{tenant}/{id}"

    def _check(self, folder: str, files: tuple[PhotoFile, ...]) -> Checked:
        captions = sum(file.name.lower().endswith(".txt") for file in files)
        try:
            found = photos(files, resolution=self._resolution, min_photos=0)
        except TooFewPhotos as error:
            bad = tuple(BadFile(name=one.name, reason=one.reason) for one in error.rejected)
            return Checked(folder=folder, photos=0, captions=captions, problems=bad, error=str(error))
        except UserError as error:
            return Checked(folder=folder, photos=0, captions=captions, error=str(error))
        return _checked(folder, captions, found, self._faces.findings(found.good))


def _checked(folder: str, captions: int, found: Photos, faces: Sequence[PhotoWarning]) -> Checked:
    return Checked(
        folder=folder,
        photos=len(found.good),
        captions=captions,
        problems=tuple(BadFile(name=one.name, reason=one.reason) for one in found.rejected),
        warnings=tuple(
            FileFinding(kind=one.kind, names=one.names, message=one.message, advice=one.advice)
            for one in (*found.warnings, *faces)
        ),
    )


def _groups(folders: Folders) -> Iterator[tuple[str, tuple[PhotoFile, ...]]]:
    """The files of each folder."""
    for folder, files in folders.items():
        yield folder, tuple(PhotoFile(name, data) for name, data in files.items())
