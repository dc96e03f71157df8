"""Who may ask: keys, which are kept hashed, and how much of a server one tenant may take.

A key is 256 random bits, so its SHA-256 is as good as a slow hash. The file is read again when it changes, so making
and revoking keys needs no restart. What a key is good for:

    images    make images
    train     put adapters in, change and delete them
    admin     everything that its tenant may do; on a fleet also keys, tenants and quotas of the whole server

Every key reads the lists of its tenant. Knows nothing about HTTP.
"""

import base64
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from serving.config import Limits
from serving.errors import NotReady, QueueFull
from training.errors import UserError
from training.storage.closed import Closed
from training.storage.version import check_id

logger = logging.getLogger(__name__)
PREFIX = "dfk_"
Scope = Literal["images", "train", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
REMEMBERED = 10_000  # tenants, or addresses, whose last minute is known
USUAL: tuple[Scope, ...] = ("images", "train")


class Key(Closed):
    """A key as the file holds it. `name` is public: lists and messages call the key by it."""

    name: str
    tenant: str
    sha256: str
    created: str
    scopes: tuple[Scope, ...] = USUAL
    expires: str | None = None  # ISO 8601 with an offset
    revoked: str | None = None

    def may(self, scope: Scope) -> bool:
        """Whether the key is good for `scope`."""
        return scope in self.scopes or "admin" in self.scopes

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and datetime.fromisoformat(self.expires) <= datetime.now(UTC)


class KeyFile(Closed):
    """What the file of keys holds."""

    keys: tuple[Key, ...] = ()


class Keys:
    """The keys in one file; a missing file holds none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._valid: dict[str, Key] = {}
        self._lock = threading.Lock()

    def find(self, token: str) -> Key | None:
        """The key of a token, expired or not; None for an unknown or revoked one. Raises NotReady."""
        with self._lock:
            self._refresh()
            return self._valid.get(_hash(token))

    def all(self) -> tuple[Key, ...]:
        """All keys of the file, revoked ones too. Raises UserError for a file that is damaged."""
        try:
            return KeyFile.model_validate_json(self._path.read_bytes()).keys
        except FileNotFoundError:
            return ()
        except ValueError as error:
            raise UserError(f"'{self._path}' is no keys file: {error}") from None

    def make(
        self,
        tenant: str,
        scopes: tuple[Scope, ...] = USUAL,
        expires: datetime | None = None,
        token: str | None = None,
    ) -> tuple[Key, str]:
        """Makes a key of `tenant`; returns it as the file holds it, and its token, which is stored nowhere.

        `token` is a fresh random one by default. A key that has the token already is returned as it is.
        """
        check_id(tenant, "tenant")
        token = token or PREFIX + secrets.token_urlsafe(32)
        key = Key(
            name=secrets.token_hex(4),
            tenant=tenant,
            sha256=_hash(token),
            created=_now(),
            scopes=scopes,
            expires=expires.isoformat(timespec="seconds") if expires else None,
        )
        with self._alone():
            there = self.all()
            for one in there:
                if one.sha256 == key.sha256:
                    return one, token
            self._write((*there, key))
        return key, token

    def revoke(self, name: str) -> Key:
        """The key `name` is refused from now on; raises UserError if there is none."""
        with self._alone():
            keys = {key.name: key for key in self.all()}
            if name not in keys:
                raise UserError(f"No key '{name}' in '{self._path}'. Known: {', '.join(keys) or 'none'}.")
            keys[name] = keys[name].model_copy(update={"revoked": keys[name].revoked or _now()})
            self._write(tuple(keys.values()))
        return keys[name]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A lock, so that two commands at the same time do not overwrite each other's changes."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_name(f".{self._path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _refresh(self) -> None:
        try:
            stat = self._path.stat()
            stamp = stat.st_mtime_ns, stat.st_ino
        except FileNotFoundError:
            stamp = None
        if stamp != self._stamp or stamp is None:
            try:
                keys = self.all()
            except (UserError, OSError) as error:  # names the path and shows what is in the file: for the log only
                logger.error("%s", error)
                raise NotReady("The server cannot read its keys; its log says why. Try again later.") from None
            self._valid = {key.sha256: key for key in keys if key.revoked is None}
            self._stamp = stamp

    def _write(self, keys: tuple[Key, ...]) -> None:
        temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(KeyFile(keys=keys).model_dump(), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)


class Meter:
    """Counts how many of one kind each tenant has under way, and has begun within a minute. For one event loop."""

    def __init__(self, what: str, at_once: int, per_minute: int) -> None:
        self.what = what
        self.at_once = at_once
        self.per_minute = per_minute
        self._running: dict[str, int] = {}
        self._begun: dict[str, deque[float]] = {}

    @contextmanager
    def one(self, tenant: str) -> Iterator[None]:
        """Counts one while inside; raises QueueFull if the tenant has too many."""
        now = time.monotonic()
        running = self._running.get(tenant, 0)
        if running >= self.at_once:
            raise QueueFull(f"You have {running} {self.what} under way; at most {self.at_once} may be.", 1.0)
        begun = self._begun.setdefault(tenant, deque())
        while begun and begun[0] <= now - 60:
            begun.popleft()
        if len(begun) >= self.per_minute:
            wait_s = begun[0] + 60 - now
            raise QueueFull(f"You have made {len(begun)} {self.what} within a minute, which is the limit.", wait_s)
        begun.append(now)
        if len(self._begun) > REMEMBERED:
            self._begun = {name: times for name, times in self._begun.items() if times and times[-1] > now - 60}
        self._running[tenant] = running + 1
        try:
            yield
        finally:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]

    def running(self) -> int:
        """How many are under way, of all tenants."""
        return sum(self._running.values())


class Quota:
    """How much of a server each tenant may take at once and within a minute."""

    def __init__(self, limits: Limits) -> None:
        self.requests = Meter("requests", limits.tenant_running, limits.tenant_per_minute)
        self.uploads = Meter("uploads", limits.tenant_uploads, limits.tenant_uploads_per_minute)

    def request(self, tenant: str) -> AbstractContextManager[None]:
        """Counts a request for images while inside; raises QueueFull."""
        return self.requests.one(tenant)

    def upload(self, tenant: str) -> AbstractContextManager[None]:
        """Counts an upload while inside; raises QueueFull."""
        return self.uploads.one(tenant)

    def running(self) -> int:
        """Requests for images under way, of all tenants."""
        return self.requests.running()


def derived(token: str, part: str) -> str:
    """A token made of another one and a random `part`: who lacks either cannot tell it (HMAC-SHA256)."""
    made = hmac.new(token.encode(), part.encode(), hashlib.sha256).digest()
    return PREFIX + base64.urlsafe_b64encode(made).rstrip(b"=").decode()


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
