"""An object store (S3 or compatible, Google Cloud Storage) as a storage.

Owns the options of its URI, the retries and what they may conclude. Retries are made here and not in obstore: only
a caller that retries a conditional write may be refused because of its own first attempt, whose response was lost.
"""

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import GCSStore, S3Store

from training.storage.interface import (
    PLAIN_OPTIONS,
    SECRET_OPTIONS,
    NotFound,
    Storage,
    StorageError,
    StorageUnavailable,
    check_key,
    check_prefix,
    masked,
)
from training.storage.local import write_file

if TYPE_CHECKING:  # obstore has these only as types
    from obstore import ObjectMeta, PutMode
    from obstore.store import ClientConfig, RetryConfig, S3Config

T = TypeVar("T")

_OPTIONS = (*PLAIN_OPTIONS, *SECRET_OPTIONS)
_REFUSED = (AlreadyExistsError, PreconditionError)
_LARGE = 64 << 20  # bytes; a larger file goes up in parts, which a killed writer leaves to the bucket's lifecycle rule
_CHUNK = 4 << 20


class ObjectStorage(Storage):
    """The objects below one prefix of one bucket."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        try:
            parts = urlsplit(uri)
        except ValueError as error:
            raise StorageError(f"Bad storage {masked(uri)!r}: {error}. Expected s3://bucket/prefix.") from None
        options = _options(uri)
        self.scheme = parts.scheme
        self.attempts = int(options.get("attempts", "5"))
        if not parts.hostname or "@" in parts.netloc:
            raise StorageError(
                f"Bad storage {masked(uri)!r}: expected {parts.scheme}://bucket/prefix, credentials in the "
                "environment or as the options access_key and secret_key."
            )
        prefix = check_prefix(parts.path.strip("/"))
        if parts.fragment:
            raise StorageError(f"Bad storage {masked(uri)!r}: it ends at the '#'. Write %23 for a '#' in an option.")
        try:
            self._store = _connect(parts.scheme, parts.netloc, prefix, options)
        except BaseError as error:
            raise StorageError(f"Storage {self} cannot be opened: {_short(error)}. Check its options.") from None

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """See `Storage`."""
        path = check_key(key)

        def read() -> tuple[bytes, str]:
            response = obstore.get(self._store, path)
            return bytes(response.bytes()), self._tag(response.meta)

        return self._tried("read", key, read)

    def put(self, key: str, data: bytes) -> None:
        """See `Storage`."""
        path = check_key(key)
        self._tried("write", key, lambda: obstore.put(self._store, path, data, use_multipart=False))

    def create(self, key: str, data: bytes) -> bool:
        """See `Storage`."""
        return self._write_if(key, data, "create")

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        """See `Storage`."""
        if tag is None:
            return self.create(key, data)
        # Google compares generations, everybody else entity tags; S3 refuses a `version` it cannot compare.
        return self._write_if(key, data, {"version": tag} if self.scheme == "gs" else {"e_tag": tag})

    def exists(self, key: str) -> bool:
        """See `Storage`."""
        try:
            self._head(key)
        except NotFound:
            return False
        return True

    def modified(self, key: str) -> float:
        """See `Storage`."""
        return float(self._head(key)["last_modified"].timestamp())

    def folders(self, prefix: str = "") -> list[str]:
        """See `Storage`."""
        folder = check_prefix(prefix)
        found = self._tried("list", prefix, lambda: obstore.list_with_delimiter(self._store, folder or None))
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

    def list(self, prefix: str = "") -> list[str]:
        """See `Storage`."""
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See `Storage`."""
        folder = check_prefix(prefix)

        def collect() -> dict[str, int]:
            return {meta["path"]: meta["size"] for page in obstore.list(self._store, folder or None) for meta in page}

        return self._tried("list", prefix, collect)

    def delete(self, key: str) -> None:
        """See `Storage`."""
        path = check_key(key)
        with contextlib.suppress(NotFound):
            self._tried("delete", key, lambda: obstore.delete(self._store, path))

    def delete_tree(self, prefix: str) -> None:
        """See `Storage`."""
        keys = self.list(prefix)
        if keys:
            self._tried("delete", prefix, lambda: obstore.delete(self._store, keys))

    def upload(self, key: str, path: Path) -> None:
        """See `Storage`."""
        target, parts = check_key(key), path.stat().st_size > _LARGE
        self._tried("write", key, lambda: obstore.put(self._store, target, path, use_multipart=parts))

    def download(self, key: str, path: Path) -> None:
        """See `Storage`."""
        source = check_key(key)

        def fetch() -> None:
            response = obstore.get(self._store, source)
            write_file(path, _whole(response.stream(min_chunk_size=_CHUNK), response.meta["size"]))

        self._tried("read", key, fetch)

    def _head(self, key: str) -> "ObjectMeta":
        path = check_key(key)
        return self._tried("look up", key, lambda: obstore.head(self._store, path))

    def _tag(self, meta: "ObjectMeta") -> str:
        tag = meta["version"] if self.scheme == "gs" else meta["e_tag"]
        if not tag:
            raise StorageError(f"Storage {self} gives its objects no tag, so it cannot compare and swap. Use another.")
        return tag

    def _write_if(self, key: str, data: bytes, mode: "PutMode") -> bool:
        """A conditional put. Refused after a lost response, it has succeeded if the key holds exactly `data`."""
        path, tries = check_key(key), 0

        def write() -> None:
            nonlocal tries
            tries += 1
            obstore.put(self._store, path, data, mode=mode, use_multipart=False)

        try:
            self._tried("write", key, write)
        except (*_REFUSED, NotFound):
            return tries > 1 and self._holds(key, data)
        return True

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.get(key) == data
        except NotFound:
            return False

    def _tried(self, verb: str, key: str, action: Callable[[], T]) -> T:
        """`action`, repeated with jittered exponential pauses while the store fails; refusals are not repeated."""
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except _REFUSED:
                raise
            except (BaseError, FileNotFoundError, PermissionError, TimeoutError, ConnectionError) as error:
                final = _final(error, f"{verb} {key!r} in storage {self}")
                if final:
                    raise final from error
                if attempt == self.attempts:
                    raise StorageUnavailable(
                        f"Cannot {verb} {key!r} in storage {self}: {attempt} attempts failed, the last with "
                        f"{_short(error)}. Check that the store is up and reachable, then try again."
                    ) from error
                time.sleep(random.uniform(0.5, 1.0) * min(0.1 * 2**attempt, 5.0))
        raise AssertionError("unreachable")


def _options(uri: str) -> dict[str, str]:
    options = dict(parse_qsl(urlsplit(uri).query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            near = get_close_matches(name, _OPTIONS, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise StorageError(f"Unknown option {name!r} of {masked(uri)}. Known: {', '.join(_OPTIONS)}.{hint}")
    for name in ("request_timeout", "attempts"):
        if name in options and not options[name].isdecimal() or options.get(name) == "0":
            raise StorageError(f"Bad {name}={options[name]!r} of {masked(uri)}: expected a whole number above 0.")
    return options


def _connect(scheme: str, bucket: str, prefix: str, options: dict[str, str]) -> "S3Store | GCSStore":
    """A client without retries of its own. The timeouts bound each request, a hanging one included."""
    seconds = int(options.get("request_timeout", "60"))
    client: ClientConfig = {"timeout": f"{seconds}s", "connect_timeout": f"{min(seconds, 10)}s", "allow_http": True}
    retries: RetryConfig = {"max_retries": 0}
    if scheme == "gs":
        return GCSStore(bucket, prefix=prefix or None, client_options=client, retry_config=retries)
    return S3Store(
        bucket, prefix=prefix or None, config=_s3_config(options), client_options=client, retry_config=retries
    )


def _s3_config(options: dict[str, str]) -> "S3Config":
    config: S3Config = {}
    if "region" in options:
        config["region"] = options["region"]
    if "access_key" in options:
        config["access_key_id"] = options["access_key"]
    if "secret_key" in options:
        config["secret_access_key"] = options["secret_key"]
    if "session_token" in options:
        config["session_token"] = options["session_token"]
    if "endpoint_override" in options:
        endpoint = options["endpoint_override"]
        config["endpoint"] = endpoint if "://" in endpoint else f"{options.get('scheme', 'https')}://{endpoint}"
    if options.get("anonymous", "").lower() in ("1", "true"):
        config["skip_signature"] = True
    return config


def _whole(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """`chunks`, raising ConnectionError if they end before `size` bytes."""
    seen = 0
    for chunk in chunks:
        seen += len(chunk)
        yield bytes(chunk)
    if seen != size:
        raise ConnectionError(f"truncated response: {seen} of {size} bytes")


def _final(error: Exception, what: str) -> StorageError | None:
    """The error that no retry would mend; None for those that one may."""
    if isinstance(error, NotFoundError | FileNotFoundError):
        return NotFound(f"Cannot {what}: nothing there. Check the name, the bucket and the prefix.")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        return StorageError(f"Cannot {what}: access denied. Check the credentials and what they allow.")
    return None


def _short(error: Exception) -> str:
    """The first line of a client's error, without the pages of debug output behind it and without passwords in it."""
    text = re.sub(r"://[^/\s]*@", "://***@", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
