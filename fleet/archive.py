"""What is in an uploaded zip or tar: files by folder, under names that a storage takes. Nothing is extracted to disk.

A file's folder is a subject's; one folder around everything is taken away. Names keep what an object store can keep;
captions keep the name of their photo.
"""

import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from training.errors import UserError
from training.storage.image_file import ImageLimits

MOST_FILES = 10_000
MOST_BYTES = 1024 * 2**20  # unpacked
_JUNK = {"__macosx", "thumbs.db", "desktop.ini"}
_ODD = re.compile(r"[^A-Za-z0-9._=@+,-]+")

Folders = Mapping[str, Mapping[str, bytes]]  # folder ("" for none) -> name -> data


class BadArchive(UserError):
    """An upload that cannot be read, or is too large; the message says why."""


def unpack(data: bytes) -> Folders:
    """The files of an archive. Raises BadArchive for what is none, is encrypted, or unpacks to too much."""
    found: dict[tuple[str, ...], bytes] = {}
    total = 0
    try:
        for name, content in _members(data):
            path = PurePosixPath(name.replace("\\", "/"))
            parts = tuple(part for part in path.parts if part not in ("/", "..", "."))
            if not parts or any(part.startswith(".") or part.lower() in _JUNK for part in parts):
                continue
            total += len(content)
            if len(found) >= MOST_FILES or total > MOST_BYTES:
                raise BadArchive(
                    f"The archive holds more than {MOST_FILES} files or {MOST_BYTES // 2**20} MiB unpacked. Send fewer "
                    "photos: 5 to 30 a subject are plenty."
                )
            found[parts] = content
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise BadArchive(f"The archive cannot be read: {error}. Send a zip or tar of the photos.") from None
    if not found:
        raise BadArchive("The archive is empty. Put the subject's photos into it: JPEG, PNG or WebP.")
    return _sorted(found)


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each plain file; of one that is too large for a photo, one byte more than one may have."""
    most = ImageLimits().max_bytes + 1
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                if info.flag_bits & 1:
                    raise BadArchive("The archive is encrypted. Send one without a password.")
                with archive.open(info) as file:
                    yield info.filename, file.read(most)
        return
    if not tarfile.is_tarfile(io.BytesIO(data)):
        raise BadArchive("The file is neither a zip nor a tar. Send one of the subject's photos.")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            opened = archive.extractfile(member) if member.isreg() else None
            if opened is not None:
                yield member.name, opened.read(most)


def _sorted(found: Mapping[tuple[str, ...], bytes]) -> Folders:
    """The files by folder, under plain names; without the folder that is around all of them."""
    while len({parts[0] for parts in found}) == 1 and all(len(parts) > 1 for parts in found):
        found = {parts[1:]: content for parts, content in found.items()}
    folders: dict[str, dict[str, bytes]] = {}
    stems: dict[tuple[str, str], str] = {}
    for parts, content in sorted(found.items()):
        folder = "-".join(_plain(part) for part in parts[:-1])
        inside = folders.setdefault(folder, {})
        path = PurePosixPath(parts[-1])
        stem = stems.get((folder, path.stem))
        if stem is None:  # a photo and its caption have the same stem, and keep it so
            stem, turn = _plain(path.stem), 1
            while stem in {taken for (where, _), taken in stems.items() if where == folder}:
                stem, turn = f"{_plain(path.stem)}-{turn}", turn + 1
            stems[folder, path.stem] = stem
        inside[f"{stem}{_ODD.sub('_', path.suffix)}"] = content
    return folders


def _plain(name: str) -> str:
    """The name as every storage can keep it."""
    plain = _ODD.sub("_", name).lstrip("._=@+,-")
    return plain[:100] or "photo"
