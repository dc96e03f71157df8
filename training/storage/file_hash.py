"""The hash of a file's content, read once as long as the file stays as it is. Knows no torch.

What is known is kept by the file's place, size and times in this process and, for large files, in the user's cache: a
driver, its lanes and servers on one machine read the weights of a base once between them. The time of a file's last
change of any kind (ctime), which no program sets back, is among the times.
"""

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

KEPT_BYTES = 32 * 2**20  # smaller files are read again by every process: that takes no longer than it is worth
SETTLED_SECONDS = 2.0  # a file that has just been written may be written again without its times showing it
MOST_KNOWN = 100_000

_known: dict[str, str] = {}


def cache_folder() -> Path:
    """Where this user's machine keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dreamfleet"


def hash_file(path: Path) -> str:
    """sha256 of a file's content, hex. Raises OSError if it cannot be read."""
    stamp, size, changed = _stamp(path)
    found = _known.get(stamp)
    if found is None and size >= KEPT_BYTES:
        found = _kept(stamp)
    if found is None:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if _stamp(path)[0] != stamp or time.time() - changed < SETTLED_SECONDS:
            return found
        if size >= KEPT_BYTES:
            _keep(stamp, found)
    if len(_known) >= MOST_KNOWN:
        _known.clear()
    _known[stamp] = found
    return found


def _stamp(path: Path) -> tuple[str, int, float]:
    """What tells a file's content from any other it had or may have; its size; when it was last changed."""
    seen = path.stat()
    parts = (path.resolve(), seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
    name = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
    return name, seen.st_size, max(seen.st_mtime, seen.st_ctime)


def _kept(stamp: str) -> str | None:
    try:
        found = (cache_folder() / "hashes" / stamp).read_text()
    except OSError:
        return None
    return found if len(found) == 64 else None  # cut short by a crash


def _keep(stamp: str, found: str) -> None:
    folder = cache_folder() / "hashes"
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(descriptor, "w") as file:
            file.write(found)
        os.replace(temporary, folder / stamp)
