"""Which version of which adapter is meant: names, ids, version prefixes, and the error for those that do not exist.

Pure: reads no storage. `registry.py` looks versions up.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from training.errors import UserError
from training.storage.card import Card
from training.storage.ledger import Current

DEFAULT_TENANT = "default"
SHOWN = 5  # names or versions that an error message lists
_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_VERSION = re.compile(r"[0-9a-f]{6,64}")


class UnknownAdapter(UserError):
    """No such tenant, id or version, or it was deleted: the caller does not learn which."""


class Resolved(NamedTuple):
    """One committed version."""

    tenant: str
    id: str
    version: str
    card: Card
    public: bool = False  # the adapter's, not the version's, as is the trigger
    trigger: str = ""

    @property
    def name(self) -> str:
        """`tenant/id`"""
        return f"{self.tenant}/{self.id}"


def is_id(name: str) -> bool:
    """Whether `name` may be a tenant or an adapter id."""
    return _ID.fullmatch(name) is not None


def check_id(name: str, what: str = "adapter id") -> str:
    """`name`, if it is a valid tenant or adapter id; raises UnknownAdapter otherwise."""
    if not is_id(name):
        raise UnknownAdapter(
            f"Bad {what} {name[:80]!r}: use 1 to 63 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit."
        )
    return name


def resolved_as(tenant: str, id: str, version: str, card: Card, current: Current) -> Resolved:
    """A version with what belongs to its adapter. A card's own `public` counts only while it is the current one's."""
    public = current.public if current.public is not None else card.public and version == current.version
    trigger = current.trigger if current.trigger is not None else card.trigger
    return Resolved(tenant, id, version, card, public, trigger or card.instance_prompt)


def split_name(name: str, tenant: str) -> tuple[str, str]:
    """Tenant and id of `tenant/id`, or of an id of `tenant`."""
    owner, slash, id = name.partition("/")
    return (owner, id) if slash else (tenant, name)


def match_version(name: str, prefix: str, committed: set[str]) -> str:
    """The one committed version that starts with `prefix`."""
    if not _VERSION.fullmatch(prefix):
        raise UnknownAdapter(f"Bad version {prefix[:80]!r} of {name}: use 6 to 64 hex digits.")
    found = sorted(version for version in committed if version.startswith(prefix))
    if len(found) != 1:
        count = "no version" if not found else f"{len(found)} versions"
        raise UnknownAdapter(f"Adapter {name} has {count} {prefix!r}. Known: {_some(committed)}.")
    return found[0]


def _some(versions: Iterable[str]) -> str:
    """The first few versions, shortened, and how many there are."""
    known = sorted(version[:12] for version in versions)
    shown = ", ".join(known[:SHOWN])
    return shown if len(known) <= SHOWN else f"{shown}, ... ({SHOWN} of {len(known)} shown)"
