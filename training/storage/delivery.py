"""What a user asks to have written, whole or not there: a folder is filled under a temporary name beside its place."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from training.storage.interface import TEMPORARY
from training.storage.local import explain, write_file


def deliver(files: Mapping[str, bytes], out: Path) -> list[Path]:
    """Writes `files`, by their names below `out`, and returns their paths; raises StorageError and leaves nothing."""
    with delivered(out) as folder:
        for name, data in files.items():
            write_file(folder / name, [data])
    return [out / name for name in files]


@contextlib.contextmanager
def delivered(out: Path) -> Iterator[Path]:
    """A folder to fill: where the block ends well its files are in `out`, else `out` is as it was.

    A new `out` appears by one rename. Into one that is there, files are moved one by one once all are written, those of
    folders first: an adapter's words are there before its weights. Raises StorageError where the disk refuses.
    """
    room = (out if out.is_dir() else out.absolute().parent) / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        room.mkdir(parents=True)
        yield room
        if out.is_dir():
            _move(room, out)
        else:
            os.rename(room, out)
    except OSError as error:
        raise explain(error, f"write {out}") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _move(room: Path, out: Path) -> None:
    """Moves everything in `room` to `out`; takes away again what is new there where that fails."""
    below = sorted(path.relative_to(room) for path in room.rglob("*"))
    folders = [path for path in below if (room / path).is_dir()]
    files = sorted((path for path in below if path not in folders), key=lambda path: -len(path.parts))
    made: list[Path] = []
    try:
        for path in [*folders, *files]:
            target = out / path
            if not target.exists():
                made.append(target)
            if (room / path).is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(room / path, target)
    except OSError:
        for target in reversed(made):
            if target.is_dir():
                target.rmdir()
            else:
                target.unlink(missing_ok=True)
        raise
