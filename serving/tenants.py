"""Who may ask: keys, which are kept hashed, and how much of a server one tenant may take.

A key is 256 random bits, so its SHA-256 is as good as a slow hash. The file is read again when it changes, so making
and revoking keys needs no restart. Knows nothing about HTTP.
"""

import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from serving.config import Limits
from serving.errors import NotReady, QueueFull
from serving.request import Closed
from training.errors import UserError
from training.registry import check_id

logger = logging.getLogger(__name__)
PREFIX = "dfk_"


class Key(Closed):
    """A key as it is kept. `name` is public: it is how one speaks about a key."""

    name: str
    tenant: str
    sha256: str
    created: str
    revoked: str | None = None


class KeyFile(Closed):
    keys: tuple[Key, ...] = ()


class Keys:
    """The keys in one file; a missing file holds none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._tenants: dict[str, str] = {}
        self._lock = threading.Lock()

    def tenant_of(self, token: str) -> str | None:
        """Whose key this is; None for an unknown or revoked one. Raises NotReady if the file cannot be read."""
        with self._lock:
            self._refresh()
            return self._tenants.get(_hash(token))

    def all(self) -> tuple[Key, ...]:
        try:
            return KeyFile.model_validate_json(self._path.read_bytes()).keys
        except FileNotFoundError:
            return ()
        except ValueError as error:
            raise UserError(f"'{self._path}' is no keys file: {error}") from None

    def make(self, tenant: str) -> tuple[Key, str]:
        """A new key of `tenant`: as it is kept, and the token, which is shown this once."""
        check_id(tenant, "tenant")
        token = PREFIX + secrets.token_urlsafe(32)
        key = Key(name=secrets.token_hex(4), tenant=tenant, sha256=_hash(token), created=_now())
        self._write((*self.all(), key))
        return key, token

    def revoke(self, name: str) -> Key:
        """The key `name` is refused from now on; raises UserError if there is none."""
        keys = {key.name: key for key in self.all()}
        if name not in keys:
            raise UserError(f"No key '{name}' in '{self._path}'. Known: {', '.join(keys) or 'none'}.")
        keys[name] = keys[name].model_copy(update={"revoked": keys[name].revoked or _now()})
        self._write(tuple(keys.values()))
        return keys[name]

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
            self._tenants = {key.sha256: key.tenant for key in keys if key.revoked is None}
            self._stamp = stamp

    def _write(self, keys: tuple[Key, ...]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(KeyFile(keys=keys).model_dump(), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)


class Quota:
    """How many requests each tenant has under way and has begun in the last minute. For one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._running_limit = limits.tenant_running
        self._minute_limit = limits.tenant_per_minute
        self._running: dict[str, int] = {}
        self._begun: dict[str, deque[float]] = {}

    @contextmanager
    def request(self, tenant: str) -> Iterator[None]:
        """Counts a request while inside; raises QueueFull if the tenant has too many."""
        now = time.monotonic()
        running = self._running.get(tenant, 0)
        if running >= self._running_limit:
            raise QueueFull(f"You have {running} requests under way; at most {self._running_limit} may be.", 1.0)
        begun = self._begun.setdefault(tenant, deque())
        while begun and begun[0] <= now - 60:
            begun.popleft()
        if len(begun) >= self._minute_limit:
            wait_s = begun[0] + 60 - now
            raise QueueFull(f"You have made {len(begun)} requests within a minute, which is the limit.", wait_s)
        begun.append(now)
        self._running[tenant] = running + 1
        try:
            yield
        finally:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]

    def running(self) -> int:
        return sum(self._running.values())


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
