"""Resolved adapter names, cached for a moment, and which adapters are damaged. Blocking; safe for many threads."""

import logging
import threading
import time
from collections import OrderedDict

from training.storage.registry import CorruptAdapter, Registry
from training.storage.version import Resolved, UnknownAdapter

REMEMBERED = 4096
logger = logging.getLogger(__name__)


class Known:
    """A cache of what `registry` says of adapters, up to `refresh_s` seconds old."""

    def __init__(self, registry: Registry, refresh_s: float) -> None:
        self._registry = registry
        self._refresh_s = refresh_s
        self._resolved: OrderedDict[tuple[str, str | None], tuple[float, Resolved]] = OrderedDict()
        self._damaged: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def damaged(self) -> int:
        """How many adapters were damaged when they were last read."""
        return len(self._damaged)

    def look(self, path: str, version: str | None = None) -> Resolved | None:
        """What `tenant/id` means; None if there is none. Raises CorruptAdapter, which is logged once."""
        key, now = (path, version), time.monotonic()
        with self._lock:
            expires, resolved = self._resolved.get(key, (0.0, None))
        if resolved is not None and now < expires:
            return resolved
        try:
            resolved = self._registry.look(path, version)
        except UnknownAdapter:  # no such version, or no name that any adapter could have
            resolved = None
        except CorruptAdapter as error:
            self._note(path, error)
            raise
        with self._lock:
            self._damaged.pop(path, None)
            if resolved is None:
                self._resolved.pop(key, None)
                return None
            self._resolved[key] = now + self._refresh_s, resolved
            self._resolved.move_to_end(key)
            while len(self._resolved) > REMEMBERED:
                self._resolved.popitem(last=False)
        return resolved

    def forget(self, tenant: str, id: str) -> None:
        """The adapter has changed: it is read again when it is asked for."""
        with self._lock:
            self._damaged.pop(f"{tenant}/{id}", None)
            for key in [key for key in self._resolved if key[0] == f"{tenant}/{id}"]:
                del self._resolved[key]

    def _note(self, path: str, error: CorruptAdapter) -> None:
        with self._lock:
            before = self._damaged.get(path)
            self._damaged[path] = str(error)
        if before != str(error):
            logger.error("%s", error)
