"""What a storage promises: its methods, its errors and the names a key may have.

`local.py` keeps the promise in a folder, `object_store.py` in an object store; `storage.py` opens either.

A key is a relative path of segments joined by `/`. A reader never sees half a file: a folder writes under a temporary
name, fsyncs and renames; an object store publishes a put as a whole. All errors are `StorageError`s:

    StorageError
    ├── NotFound              no such key
    ├── StorageFull           the disk or quota is full; nothing was left behind
    └── StorageUnavailable    still failing after the retries: worth another try later
"""

import hashlib
import re
from abc import ABC, abstractmethod
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from training.errors import UserError

PLAIN_OPTIONS = ("endpoint_override", "scheme", "region", "anonymous", "request_timeout", "attempts")
SECRET_OPTIONS = ("access_key", "secret_key", "session_token")
TEMPORARY = ".tmp-"
LOCKS = ".locks"
_SEGMENT = re.compile(r"[A-Za-z0-9._=@+,-][A-Za-z0-9 ._=@+,()-]*")


class StorageError(UserError):
    """The storage refused or could not do what was asked."""


class NotFound(StorageError):
    """No such key."""


class StorageFull(StorageError):
    """No space left; the key still holds what it held before."""


class StorageUnavailable(StorageError):
    """The store did not respond properly within the retries; the same call may succeed later."""


def unknown_scheme(uri: str) -> StorageError:
    """The error for a URI that no storage reads."""
    return StorageError(f"Unknown storage {masked(uri)!r}. Use a folder, s3://bucket/prefix or gs://bucket/prefix.")


def content_id(data: bytes) -> str:
    """The name of these bytes: their full SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def check_key(key: str) -> str:
    """`key`, if it is a relative path of plain segments; raises StorageError otherwise.

    The allowed characters are those that every file system and object store keeps as they are.
    """
    for segment in key.split("/"):
        if segment in ("", ".", "..") or not _SEGMENT.fullmatch(segment):
            raise StorageError(
                f"Bad storage key {key!r}: {segment!r} is no plain name. Use segments of letters, digits, spaces and "
                "._=@+,()- joined by '/', without '..' and without a leading '/'."
            )
        if segment.startswith(TEMPORARY) or segment == LOCKS:
            raise StorageError(f"Bad storage key {key!r}: names starting with {TEMPORARY} and {LOCKS} are reserved.")
    return key


def check_prefix(prefix: str) -> str:
    """Like `check_key` for a folder; the empty string is the whole storage."""
    return check_key(prefix) if prefix else ""


class Storage(ABC):
    """A folder or an object store. Safe to share between threads; pickles as its URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri  # complete, credentials included: opening it gives this storage again

    def __repr__(self) -> str:
        return f"{type(self).__name__}({masked(self.uri)!r})"

    def __str__(self) -> str:
        return masked(self.uri)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return type(self), (self.uri,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def get(self, key: str) -> bytes:
        """The bytes of `key`; raises NotFound."""
        return self.get_tagged(key)[0]

    @abstractmethod
    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """The bytes of `key` and the tag that `swap` compares; raises NotFound."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Replaces `key` as a whole."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Writes `key` only if it does not exist; False if it does. Of many callers at once one gets True."""

    @abstractmethod
    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        """Replaces `key` only if it still has `tag` (None: only if it does not exist); False if it has not."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether `key` holds something; a folder is not a key."""

    @abstractmethod
    def modified(self, key: str) -> float:
        """When `key` was last written, in seconds since the epoch, by the store's clock; raises NotFound."""

    @abstractmethod
    def folders(self, prefix: str = "") -> list[str]:
        """The names of the folders directly below `prefix` that hold something, sorted."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """All keys below the folder `prefix`, sorted; empty if there is none."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """The bytes of every key below the folder `prefix`."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes `key`; nothing happens if it does not exist."""

    @abstractmethod
    def delete_tree(self, prefix: str) -> None:
        """Removes everything below the folder `prefix`."""

    def clean(self, age_s: float) -> None:  # noqa: B027  (an object store leaves nothing to clean)
        """Removes what killed writers left behind at least `age_s` seconds ago; it was never visible."""

    @abstractmethod
    def upload(self, key: str, path: Path) -> None:
        """Replaces `key` by the file at `path`, without holding it in memory."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Replaces the file at `path` by `key`, as a whole; raises NotFound."""


def masked(uri: str) -> str:
    """`uri` for messages and logs: everything that may be a credential is `***`.

    That is what stands before an `@`, a fragment (a key with `#` in it), and the value of every option that is not
    known to be harmless: a misspelled `secret_key` is a secret, too.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return uri
    try:
        parts = urlsplit(uri)
    except ValueError:
        return f"{scheme}://***"
    options = [(name, _nameless(value) if name in PLAIN_OPTIONS else "***") for name, value in parse_qsl(parts.query)]
    shown = parts._replace(
        netloc=_nameless(parts.netloc),
        query=urlencode(options, safe="*:/@", quote_via=quote),
        fragment="***" if parts.fragment else "",
    )
    return shown.geturl()


def _nameless(host: str) -> str:
    """A host or address without the user and password before its `@`."""
    return re.sub(r"[^/]*@", "***@", host)
