"""A subject's files as they lie: in a folder, on an object store, or uploaded with the run. They are bytes with a name.

`images` of a subject is a folder relative to the manifest, a URI that `open_storage` knows, or `storage:<key>` for
files that were uploaded to the run's own storage. Knows nothing about pixels.
"""

import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from threading import Lock

from training.errors import UserError
from training.manifest.subject import SubjectSpec
from training.photos.warning import listed
from training.storage.image_file import MIB, ImageLimits
from training.storage.interface import Storage
from training.storage.storage import open_storage

UPLOADED = "storage:"
CACHE_BYTES = 512 * MIB
# What lies beside photos and is none: notes, captions, metadata, other trainers' caches.
SIDECARS = {".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".toml", ".xmp", ".aae"}
SIDECARS |= {".npz", ".safetensors"}
MAX_TOTAL_BYTES = 1024 * MIB
MAX_LISTED = 10_000


@dataclass(frozen=True, slots=True)
class PhotoFile:
    """One file of a subject's folder; `problem` says why it could not be read (then `data` is empty).

    A subfolder with files in it is one too: a problem that is said, and no part of what is trained on.
    """

    name: str
    data: bytes
    problem: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether it stands for a subfolder."""
        return self.name.endswith("/")

    @property
    def is_hidden(self) -> bool:
        """Whether it is the system's own, and no photo."""
        return _is_hidden(self.name)

    @property
    def is_sidecar(self) -> bool:
        """Whether it lies beside photos and is none: a caption, metadata, a cache."""
        return _is_sidecar(self.name)


def read_files(subject: SubjectSpec, storage: Storage, root: str = ".") -> tuple[PhotoFile, ...]:
    """The files of `subject.images`. Raises UserError saying what is missing where."""
    if is_local(subject.images):
        return list_photo_files(Path(root, subject.images).expanduser())
    if subject.images.startswith(UPLOADED):
        return _read_keys(storage, subject.images.removeprefix(UPLOADED), subject.images)
    return _read_keys(open_storage(subject.images), "")


def is_local(images: str) -> bool:
    """Whether `images` of a subject is a folder of this machine."""
    return "://" not in images and not images.startswith(UPLOADED)


def _read_keys(storage: Storage, prefix: str, shown: str = "") -> tuple[PhotoFile, ...]:
    keys = storage.list(prefix)
    if not keys:
        raise UserError(f"images '{shown or storage}' holds no files. Put the subject's photos there.")
    start = len(prefix) + 1 if prefix else 0
    names = [key[start:] for key in keys]
    files = (PhotoFile(name, storage.get(key)) for name, key in zip(names, keys, strict=True) if "/" not in name)
    return (*files, *subfolders(name for name in names if "/" in name))


def list_photo_files(folder: Path) -> tuple[PhotoFile, ...]:
    """The files of a folder without hidden ones, then its subfolders that hold any, unread and with that as problem.

    Reads at most one byte more of a file than an image may have, and `MAX_TOTAL_BYTES` in all. Raises `UserError` if
    there is nothing to read.
    """
    if not folder.exists():
        raise UserError(f"No folder {folder}. Give the folder that holds the subject's photos.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file. Give the folder that holds the subject's photos.")
    try:
        paths = sorted(path for path in folder.iterdir() if not _is_hidden(path.name))
    except OSError as error:
        raise UserError(f"Cannot read folder {folder}: {error.strerror}. Check its permissions.") from None
    files, total = [], 0
    if len(paths) > MAX_LISTED:
        raise UserError(f"{folder} holds {len(paths)} files, at most {MAX_LISTED}. Give a folder of one subject.")
    for path in paths:
        if path.is_dir():
            continue
        files.append(_read_file(path))
        total += len(files[-1].data)
        if total > MAX_TOTAL_BYTES:
            raise UserError(f"{folder} holds more than {MAX_TOTAL_BYTES // MIB} MiB. Leave the best photos in it.")
    if not any(not _is_sidecar(file.name) for file in files):
        inside = [path.name for path in paths if path.is_dir()]
        hint = f" Its subfolders ({listed(inside)}) are not searched." if inside else ""
        raise UserError(f"No photos in {folder}.{hint} Put JPEG, PNG or WebP files there.")
    return (*files, *subfolders(_names_below(folder)))


def subfolders(names: Iterable[str]) -> tuple[PhotoFile, ...]:
    """The subfolders among relative file names such as `trip/a.jpg`, as files that cannot be read. They say how many
    files they hold that may be photos; those that hold none are left out."""
    paths = (PurePath(name) for name in names)
    counts = Counter(
        path.parts[0] for path in paths if not any(map(_is_hidden, path.parts)) and not _is_sidecar(path.name)
    )
    return tuple(
        PhotoFile(
            f"{name}/", b"", f"a subfolder, which is not searched; move its files ({count}) up if they belong here"
        )
        for name, count in sorted(counts.items())
    )


def _names_below(folder: Path) -> Iterator[str]:
    """The files in the subfolders of a folder, relative to it; `MAX_LISTED` at most."""
    found = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
    for path in itertools.islice((path for path in found if path.parent != folder), MAX_LISTED):
        yield path.relative_to(folder).as_posix()


def _read_file(path: Path) -> PhotoFile:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return PhotoFile(path.name, b"", "unreadable: not a regular file")
        with path.open("rb") as file:
            return PhotoFile(path.name, file.read(ImageLimits().max_bytes + 1))
    except OSError as error:
        return PhotoFile(path.name, b"", f"unreadable: {error.strerror}")


class FileCache:
    """Files of subjects, so that one process reads each once: it trains on what it took the fingerprint of.

    Keeps up to `room` bytes; other files are read again. `root` is where a manifest's relative folders start. Threads
    may share it.
    """

    def __init__(self, storage: Storage, root: str = ".", room: int = CACHE_BYTES) -> None:
        self._storage = storage
        self._root = root
        self._room = room
        self._kept: dict[str, tuple[PhotoFile, ...]] = {}
        self._lock = Lock()

    def read(self, subject: SubjectSpec) -> tuple[PhotoFile, ...]:
        """The files of a subject as they were first read. Raises UserError saying what is missing where."""
        with self._lock:
            if subject.id in self._kept:
                return self._kept[subject.id]
        files = read_files(subject, self._storage, self._root)
        size = sum(len(file.data) for file in files)
        with self._lock:
            if size <= self._room:
                self._room -= size
                self._kept[subject.id] = files
        return files

    def take_out(self, id: str) -> tuple[PhotoFile, ...] | None:
        """Removes and returns a subject's files; None if they are not kept."""
        with self._lock:
            files = self._kept.pop(id, None)
            self._room += sum(len(file.data) for file in files or ())
            return files


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def _is_sidecar(name: str) -> bool:
    return PurePath(name).suffix.lower() in SIDECARS
