"""A folder as a storage.

Owns crash-safe writes on a POSIX file system: a temporary name in the same folder, fsync, rename, fsync of the folder.
Writers of one key take turns by `flock` on one of 256 lock files, which the kernel drops when its holder dies.
"""

import contextlib
import errno
import fcntl
import io
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from training.storage.interface import (
    LOCKS,
    TEMPORARY,
    NotFound,
    Storage,
    StorageError,
    StorageFull,
    check_key,
    check_prefix,
    content_id,
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK = 1 << 20
_RACES = 16  # how often a folder that a neighbour's delete has just pruned is made again


class LocalStorage(Storage):
    """Everything below one folder, which is made on the first write."""

    def __init__(self, uri: str) -> None:
        super().__init__(os.path.abspath(os.path.expanduser(uri)))
        self.root = Path(self.uri)

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """See `Storage`."""
        with self._explained("read", key):
            data = self._path(key).read_bytes()
        return data, content_id(data)

    def put(self, key: str, data: bytes) -> None:
        """See `Storage`."""
        with self._explained("write", key), self._locked(key):
            self._write(key, io.BytesIO(data), _replace)

    def create(self, key: str, data: bytes) -> bool:
        """See `Storage`."""
        with self._explained("write", key):
            return not self._path(key).exists() and self._write(key, io.BytesIO(data), _link)

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        """See `Storage`."""
        if tag is None:
            return self.create(key, data)
        with self._explained("write", key), self._locked(key):
            try:
                current = content_id(self._path(key).read_bytes())
            except FileNotFoundError:
                return False
            return current == tag and self._write(key, io.BytesIO(data), _replace)

    def exists(self, key: str) -> bool:
        """See `Storage`."""
        return self._path(key).is_file()

    def modified(self, key: str) -> float:
        """See `Storage`."""
        with self._explained("read", key):
            return self._path(key).stat().st_mtime

    def folders(self, prefix: str = "") -> list[str]:
        """See `Storage`."""
        folder = self.root / check_prefix(prefix)
        with self._explained("list", prefix):
            return sorted(
                entry.name
                for entry in _entries(folder)
                if entry.is_dir() and next(_files(Path(entry.path)), None) is not None
            )

    def list(self, prefix: str = "") -> list[str]:
        """See `Storage`."""
        folder = self.root / check_prefix(prefix)
        with self._explained("list", prefix):
            return sorted(str(path.relative_to(self.root)) for path in _files(folder))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See `Storage`."""
        found = {}
        for key in self.list(prefix):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                found[key] = self._path(key).stat().st_size
        return found

    def delete(self, key: str) -> None:
        """See `Storage`."""
        path = self._path(key)
        with self._explained("delete", key), self._locked(key):
            path.unlink(missing_ok=True)
            self._prune(path.parent)

    def delete_tree(self, prefix: str) -> None:
        """See `Storage`."""
        folder = self.root / check_prefix(prefix)
        gone = self.root / f"{TEMPORARY}{secrets.token_hex(8)}"
        with self._explained("delete", prefix):
            if folder == self.root:
                for entry in list(_entries(folder)):
                    self.delete_tree(entry.name) if entry.is_dir() else self.delete(entry.name)
                return
            if not folder.is_dir():
                return
            os.rename(folder, gone)  # gone for every reader at once
            self._prune(folder.parent)
            shutil.rmtree(gone)

    def clean(self, age_s: float) -> None:
        """See `Storage`."""
        before = time.time() - age_s
        for parent, folders, files in os.walk(self.root):
            for name in [name for name in folders + files if name.startswith(TEMPORARY)]:
                path = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime <= before:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def upload(self, key: str, path: Path) -> None:
        """See `Storage`."""
        with path.open("rb") as source, self._explained("write", key), self._locked(key):
            self._write(key, source, _replace)

    def download(self, key: str, path: Path) -> None:
        """See `Storage`."""
        with self._explained("read", key), self._path(key).open("rb") as source:
            write_file(path, iter(lambda: source.read(_CHUNK), b""))

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextlib.contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        """Turns the operating system's errors into ours."""
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"Nothing at {key!r} in storage {self}. Check the name and the storage.") from error
        except OSError as error:
            raise explain(error, f"{verb} {key!r} in storage {self}") from error

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Alone, among all threads and processes of this machine, in changing `key`."""
        lock = self.root / LOCKS / content_id(key.encode())[:2]
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(self, key: str, source: BinaryIO, publish: Callable[[Path, Path], bool]) -> bool:
        """Lets `publish` move a durable copy of `source` to `key`; again if a delete took the folder away meanwhile."""
        path = self._path(key)
        for race in range(_RACES):
            temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
            source.seek(0)
            try:
                _make_folder(path.parent)
                _write_durably(temporary, iter(lambda: source.read(_CHUNK), b""))
                return publish(temporary, path)
            except FileNotFoundError:
                if race == _RACES - 1:
                    raise
            finally:
                temporary.unlink(missing_ok=True)
        raise AssertionError("unreachable")

    def _prune(self, folder: Path) -> None:
        """Removes `folder` and its parents as far as they are empty, so that an empty folder is no folder."""
        while folder != self.root and self.root in folder.parents:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Replaces the file at `path` by `chunks` as a whole and durably; on any error it keeps what it held.

    Raises StorageFull or StorageError if this machine's disk refuses.
    """
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        _make_folder(path.parent)
        _write_durably(temporary, chunks)
        _replace(temporary, path)
    except OSError as error:
        raise explain(error, f"write {path}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def explain(error: OSError, what: str) -> StorageError:
    """Our error for the operating system's, `what` being what could not be done."""
    if error.errno in _FULL:
        return StorageFull(f"Cannot {what}: no space left. Free some space or use another storage, then try again.")
    reason = error.strerror or str(error)
    return StorageError(f"Cannot {what}: {reason}. Check that the path is right and that you may write there.")


def _write_durably(path: Path, chunks: Iterable[bytes]) -> None:
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _replace(temporary: Path, path: Path) -> bool:
    os.replace(temporary, path)
    _sync_folder(path.parent)
    return True


def _link(temporary: Path, path: Path) -> bool:
    """Create-only: link(2) fails, as one step, where the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    _sync_folder(path.parent)
    return True


def _make_folder(folder: Path) -> None:
    """Makes `folder` and its parents, each entry durable."""
    missing = [folder, *folder.parents]
    for made in reversed([path for path in missing if not path.exists()]):
        with contextlib.suppress(FileExistsError):
            made.mkdir()
        _sync_folder(made.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    """What a reader may see directly in `folder`; nothing if it does not exist."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(TEMPORARY) and entry.name != LOCKS]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files(folder: Path) -> Iterator[Path]:
    """All files below `folder` that a reader may see."""
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _files(Path(entry.path))
        else:
            yield Path(entry.path)
