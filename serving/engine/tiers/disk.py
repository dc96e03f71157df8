"""Adapter files on the local disk, so that what came over the network once is not fetched again.

Files are named by the SHA-256 of their content; a file that does not match its name is thrown away. Knows nothing about
what the bytes mean.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from training.storage.storage import content_id


class DiskCache:
    """At most `budget_bytes` below `folder`, least recently used out first. Safe for several processes at once."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder = folder
        self._budget = budget_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, digest: str) -> bytes | None:
        """The content whose SHA-256 is `digest` (hex), if it is here and whole."""
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if content_id(data) != digest:
            path.unlink(missing_ok=True)
            return None
        with suppress(FileNotFoundError):
            os.utime(path)
        return data

    def put(self, data: bytes) -> None:
        """Stores `data` under its SHA-256, whole or not at all; evicts what exceeds the budget. Raises OSError."""
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            file.write(data)
        os.replace(file.name, self._path(content_id(data)))
        self._shrink()

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"

    def _shrink(self) -> None:
        files = []
        for path in self._folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._budget:
                return
            path.unlink(missing_ok=True)
            total -= size
