"""The registry: where versions of adapters are published and resolved.

Owns ids, versions and their files, names people give, and what nobody refers to. Knows nothing about tensors: weights
are bytes, a version is their hash. Which versions count is the `ledger.py` of each id to say.

    adapters/<tenant>/<id>/<version>/adapter.safetensors, card.json, samples/...   immutable; nothing until committed
    public/<tenant>/<id>                                                           the index of public adapters

The index may hold too much after a crash, never too little: what is public is for `current.json` to say.
"""

import logging
import time
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from pydantic import ValidationError

from training.errors import UserError
from training.storage.card import Card
from training.storage.ledger import Commit, CorruptAdapter, Ledger
from training.storage.storage import NotFound, Storage, StorageUnavailable, check_key, content_id
from training.storage.version import (
    DEFAULT_TENANT,
    SHOWN,
    Resolved,
    UnknownAdapter,
    check_id,
    is_id,
    match_version,
    resolved_as,
    split_name,
)

__all__ = [
    "CorruptAdapter",
    "CurrentVersion",
    "Published",
    "Registry",
    "StoredUsage",
]

logger = logging.getLogger(__name__)
GRACE_S = 86400.0  # an uncommitted version younger than this may belong to a publication under way
WEIGHTS = "adapter.safetensors"
_ROOT = "adapters"
_PUBLIC = "public"
_TRIES = 100


class CurrentVersion(UserError):
    """The version is the one that is served, which cannot be removed alone."""


class Published(NamedTuple):
    """The outcome of `publish`; not `new` if the same fingerprint had been published before."""

    version: str
    new: bool


class StoredUsage(NamedTuple):
    """What a tenant has stored."""

    adapters: int
    bytes: int


class Registry:
    """The adapters of one storage. Keeps no state: any number of them may work on the same storage at once."""

    def __init__(self, storage: Storage, takeover_s: float = 10.0) -> None:
        self.storage = storage
        self.takeover_s = takeover_s  # how long a deletion may stand still before a publisher finishes it

    def publish(
        self,
        tenant: str,
        id: str,
        weights: bytes,
        card: Card,
        extras: Mapping[str, bytes] | None = None,
        *,
        aside: bool = False,
    ) -> Published:
        """Publishes `weights` as a version of `tenant/id` and makes it current: once, whatever dies when.

        With `aside` the current version stays so; the adapter must be there.

        `extras` maps names such as `samples/0.png` to files kept beside it. If `card.fingerprint` was published
        already, that version is returned and these bytes stay uncommitted. May be repeated after any failure.
        """
        ledger, version = self._ledger(tenant, id), content_id(weights)
        _check_card(card, version, len(weights))
        for _ in range(_TRIES):
            epoch = ledger.ready(self.takeover_s).epoch
            commit, new = ledger.commit_of(card.fingerprint, epoch), False
            if commit is None:
                self._write_version(f"{ledger.folder}/{version}", weights, card, extras or {})
                commit, new = ledger.commit(card.fingerprint, Commit(version=version, epoch=epoch))
            end = ledger.set_aside if aside else ledger.finish
            if end(card.fingerprint, commit):
                return Published(commit.version, new)
        raise StorageUnavailable(f"Adapter {tenant}/{id} is deleted again and again while it is published. Try later.")

    def find(self, tenant: str, id: str, fingerprint: str) -> str | None:
        """The version that was published under `fingerprint`, if any; completes a publication that died half-way."""
        ledger = self._ledger(tenant, id)
        commit = ledger.commit_of(fingerprint, ledger.read().current.epoch)
        return commit.version if commit and ledger.finish(fingerprint, commit) else None

    def resolve(self, name: str, version: str | None = None, tenant: str = DEFAULT_TENANT) -> Resolved:
        """The committed version that `name` means now, or its `version`, which may be a unique prefix of 6 or more.

        `name` is `tenant/id`, or an id of `tenant`; who may see it is the caller's to decide. Raises UnknownAdapter,
        CorruptAdapter. Without `version`, reads two objects and lists none.
        """
        found = self.look(name, version, tenant)
        if found is None:
            raise self._unknown(*split_name(name, tenant))
        return found

    def look(self, name: str, version: str | None = None, tenant: str = DEFAULT_TENANT) -> Resolved | None:
        """Like `resolve`; None if there is no such adapter, without looking for names that are near."""
        owner, id = split_name(name, tenant)
        ledger = self._ledger(owner, id)
        current = ledger.read().current
        if current.version is None:
            return None
        chosen = current.version
        if version is not None and version != chosen:
            chosen = match_version(f"{owner}/{id}", version, ledger.committed(current.epoch))
        try:
            card = Card.model_validate_json(self.storage.get(f"{ledger.folder}/{chosen}/card.json"))
        except (NotFound, ValidationError) as error:
            if ledger.read().current != current:  # deleted or replaced between the two reads
                return self.look(name, version, tenant)
            raise CorruptAdapter(
                f"Adapter {owner}/{id}@{chosen[:12]} has no readable card. Delete the adapter and publish it again."
            ) from error
        return resolved_as(owner, id, chosen, card, current)

    def weights(self, resolved: Resolved) -> bytes:
        """The file of a version; raises CorruptAdapter if it is not what was published, UnknownAdapter if deleted."""
        return self.fetch(resolved.tenant, resolved.id, resolved.version)

    def fetch(self, tenant: str, id: str, version: str) -> bytes:
        """The weights of a version that was resolved before, by its whole name: one read, whatever is current.

        Raises CorruptAdapter if they are not what was published, UnknownAdapter if the version has been deleted.
        """
        key, name = f"{self._ledger(tenant, id).folder}/{version}/{WEIGHTS}", f"{tenant}/{id}@{version[:12]}"
        try:
            data = self.storage.get(key)
        except NotFound:
            self.resolve(f"{tenant}/{id}", version)  # UnknownAdapter if it was deleted meanwhile
            try:
                data = self.storage.get(key)  # or it was, and is published again
            except NotFound as error:
                raise CorruptAdapter(
                    f"Adapter {name} has lost its weights. Delete the adapter and publish it again."
                ) from error
        if content_id(data) != version:
            raise CorruptAdapter(
                f"Adapter {name} is damaged: its {len(data)} stored bytes do not have the published hash. Delete the "
                "adapter and publish it again."
            )
        return data

    def read(self, resolved: Resolved, file: str) -> bytes:
        """A file of a version, such as `samples/0.png`; raises NotFound."""
        return self.storage.get(f"{self._ledger(resolved.tenant, resolved.id).folder}/{resolved.version}/{file}")

    def files(self, resolved: Resolved) -> list[str]:
        """The names of all files of a version, sorted."""
        return list(self.sizes(resolved))

    def sizes(self, resolved: Resolved) -> dict[str, int]:
        """The bytes of each file of a version, by name, sorted."""
        folder = f"{self._ledger(resolved.tenant, resolved.id).folder}/{resolved.version}"
        sizes = self.storage.sizes(folder)
        return {key.removeprefix(f"{folder}/"): sizes[key] for key in sorted(sizes)}

    def versions(self, tenant: str, id: str) -> list[str]:
        """All committed versions of an adapter, sorted; raises UnknownAdapter."""
        ledger = self._ledger(tenant, id)
        current = ledger.read().current
        if current.version is None:
            raise self._unknown(tenant, id)
        return sorted(ledger.committed(current.epoch))

    def set_current(self, tenant: str, id: str, version: str) -> Resolved:
        """Makes a committed version (or unique prefix) the one that is served; raises UnknownAdapter."""
        ledger = self._ledger(tenant, id)
        for _ in range(_TRIES):
            epoch = ledger.read().current.epoch
            resolved = self.resolve(f"{tenant}/{id}", version)
            if ledger.choose(resolved.version, epoch):
                return resolved
        raise StorageUnavailable(f"Adapter {tenant}/{id} is deleted again and again. Try again.")

    def describe(self, tenant: str, id: str, *, public: bool | None = None, trigger: str | None = None) -> None:
        """Says who may see an adapter and what its prompts say, for all its versions; None leaves it as it is.

        Raises UnknownAdapter.
        """
        given = {"public": public, "trigger": trigger}
        changes = {name: value for name, value in given.items() if value is not None}
        mark = f"{_PUBLIC}/{tenant}/{id}"
        ledger = self._ledger(tenant, id)
        if public and ledger.read().current.version is not None:
            self.storage.put(mark, b"")  # before and below after: the index never lacks a public one
        if not ledger.describe(changes):
            raise self._unknown(tenant, id)
        if public is False:
            self.storage.delete(mark)

    def remove_version(self, tenant: str, id: str, version: str) -> str:
        """Removes one version (or unique prefix) for good and returns its name.

        Raises UnknownAdapter; CurrentVersion if it is the one that is served.
        """
        ledger = self._ledger(tenant, id)
        current = ledger.read().current
        if current.version is None:
            raise self._unknown(tenant, id)
        chosen = match_version(f"{tenant}/{id}", version, ledger.committed(current.epoch))
        if not ledger.withdraw(chosen, current.epoch):
            raise CurrentVersion(
                f"Version {chosen[:12]} of {tenant}/{id} is the one that is served. Make another version current "
                "first, or delete the adapter."
            )
        self.storage.delete_tree(f"{ledger.folder}/{chosen}")
        return chosen

    def usage(self, tenant: str) -> StoredUsage:
        """What `tenant` has stored, all versions with all their files. One listing of the storage."""
        prefix = f"{_ROOT}/{check_id(tenant, 'tenant')}"
        sizes = self.storage.sizes(prefix)
        ids = {key.split("/")[2] for key in sizes if key.endswith(f"/{WEIGHTS}")}
        return StoredUsage(len(ids), sum(sizes.values()))

    def delete(self, tenant: str, id: str) -> None:
        """Removes an adapter: at once for every reader, then its files. Raises UnknownAdapter if there is none.

        A damaged adapter is deleted like any other.
        """
        if not self._ledger(tenant, id).delete():
            raise self._unknown(tenant, id)
        self.storage.delete(f"{_PUBLIC}/{tenant}/{id}")

    def orphans(self, grace_s: float = GRACE_S) -> list[str]:
        """Folders of versions that no commit refers to and nothing has touched for `grace_s` seconds, as keys."""
        found = []
        for tenant in self.storage.folders(_ROOT):
            for id in self.ids(tenant):
                ledger = self._ledger(tenant, id)
                try:
                    current = ledger.read().current
                    known = ledger.committed(current.epoch) | {"commits", current.version}
                except CorruptAdapter as error:  # nobody can say what belongs to it
                    _logged(f"{tenant}/{id}", error)
                    continue
                unknown = [name for name in self.storage.folders(ledger.folder) if name not in known]
                found += [f"{ledger.folder}/{name}" for name in unknown]
        return [folder for folder in found if self._age_s(folder) >= grace_s]

    def gc(self, dry_run: bool = True, grace_s: float = GRACE_S) -> list[str]:
        """Removes the orphans, and what killed writers left; with `dry_run` only says which."""
        found = self.orphans(grace_s)
        if not dry_run:
            for folder in found:
                self.storage.delete_tree(folder)
            self.storage.clean(grace_s)
        return found

    def _ledger(self, tenant: str, id: str) -> Ledger:
        return Ledger(self.storage, f"{_ROOT}/{check_id(tenant, 'tenant')}/{check_id(id)}")

    def _exists(self, tenant: str, id: str) -> bool:
        try:
            return self._ledger(tenant, id).read().current.version is not None
        except CorruptAdapter:
            return False

    def _write_version(self, folder: str, weights: bytes, card: Card, extras: Mapping[str, bytes]) -> None:
        """Creates the files of a version; those that are there already hold the same or were first."""
        for name, data in extras.items():
            self.storage.create(f"{folder}/{check_key(name)}", data)
        key = f"{folder}/{WEIGHTS}"
        if not self.storage.create(key, weights) and self.storage.get(key) != weights:
            self.storage.put(key, weights)  # the name is the hash of its content: whatever else is there is damaged
        self.storage.create(f"{folder}/card.json", card.model_dump_json(by_alias=True, indent=1).encode())

    def _age_s(self, folder: str) -> float:
        """Seconds since anything in `folder` was written; 0 if it vanishes meanwhile."""
        try:
            return time.time() - max(self.storage.modified(key) for key in self.storage.list(folder))
        except (NotFound, ValueError):
            return 0.0

    def _unknown(self, tenant: str, id: str) -> UnknownAdapter:
        """The error for a missing id: names that are near it, of the same tenant only."""
        near = get_close_matches(id, self.ids(tenant), n=SHOWN, cutoff=0.5)
        alive = [name for name in near if self._exists(tenant, name)]
        hint = f" Near: {', '.join(alive)}." if alive else ""
        return UnknownAdapter(f"Unknown adapter {tenant}/{id}.{hint} `dreamfleet adapters list` shows all.")

    def ids(self, tenant: str) -> list[str]:
        """The ids below which `tenant` has anything, sorted; some may be deleted or damaged. One listing."""
        names = self.storage.folders(f"{_ROOT}/{check_id(tenant, 'tenant')}")
        return [name for name in names if is_id(name)]

    def public_names(self) -> list[str]:
        """`tenant/id` of every adapter that may be public, sorted. One listing."""
        return [key.removeprefix(f"{_PUBLIC}/") for key in self.storage.list(_PUBLIC)]

    def list(self, tenant: str = DEFAULT_TENANT, on_damage: "OnDamage | None" = None) -> list[Resolved]:
        """The current version of every adapter of `tenant`, by id. Reads two objects for each.

        Passes over damaged ones: `on_damage` gets the name and the error, by default the log does.
        """
        found = []
        for id in self.ids(tenant):
            try:
                found.append(self.look(f"{tenant}/{id}"))
            except CorruptAdapter as error:
                (on_damage or _logged)(f"{tenant}/{id}", error)
        return [resolved for resolved in found if resolved is not None]


OnDamage = Callable[[str, CorruptAdapter], None]


def _logged(name: str, error: CorruptAdapter) -> None:
    logger.error("skipped %s: %s", name, error)


def _check_card(card: Card, version: str, size: int) -> None:
    if (card.sha256, card.size) != (version, size):
        raise ValueError(f"the card is of {card.sha256} ({card.size} bytes), the weights are {version} ({size} bytes)")
