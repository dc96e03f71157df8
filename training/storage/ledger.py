"""The ledger of one adapter id: which versions are committed, and which one is current.

Owns two kinds of file below `adapters/<tenant>/<id>/`, and every race between publishing, deleting and reading:

    commits/<fingerprint>.json    create-only: *the* commit point of a publication
    current.json                  what is served by default; compare-and-swapped, last

`current.json` also carries the id's epoch: a name that every deletion changes. A commit counts only in the epoch it was
made in, so whatever a deletion interrupts or forgets can never come back under the same id. What belongs to the adapter
and not to a version (who may see it, its trigger) is there too. Knows nothing about cards and weights.
"""

import re
import secrets
import time
from collections.abc import Mapping
from typing import NamedTuple

from pydantic import ValidationError

from training.errors import UserError
from training.storage.closed import Closed
from training.storage.storage import NotFound, Storage, StorageUnavailable

_FINGERPRINT = re.compile(r"[0-9a-f]{8,64}")
_TRIES = 100


class CorruptAdapter(UserError):
    """The stored bytes are not those that were published."""


class _Record(Closed):
    def dump(self) -> bytes:
        return self.model_dump_json(exclude_defaults=True).encode()


class Commit(_Record):
    """A published version and the epoch in which that holds."""

    version: str
    epoch: str


class Current(_Record):
    """`version` is None where there is none, or after a deletion; until `swept`, files of before may remain.

    `public` and `trigger` are the adapter's, whatever version is served; None: nobody has said, its card has it.
    `removals` counts the versions that were removed, so that each removal changes the record.
    """

    version: str | None = None
    epoch: str = ""
    swept: bool = True
    public: bool | None = None
    trigger: str | None = None
    removals: int = 0


class Tagged(NamedTuple):
    """What current.json holds and what to compare it with; the tag is None where there is none yet."""

    current: Current
    tag: str | None


class Ledger:
    """The commits of one adapter id, in `folder` of `storage`."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self.storage = storage
        self.folder = folder

    def read(self) -> Tagged:
        """What is current now; raises CorruptAdapter."""
        try:
            data, tag = self.storage.get_tagged(f"{self.folder}/current.json")
        except NotFound:
            return Tagged(Current(), None)
        try:
            return Tagged(Current.model_validate_json(data), tag)
        except ValidationError:
            raise self._corrupt("current.json") from None

    def swap(self, tag: str | None, current: Current) -> bool:
        """Replaces what `read` gave with `tag`; False if somebody else was faster."""
        return self.storage.swap(f"{self.folder}/current.json", current.dump(), tag)

    def commit_of(self, fingerprint: str, epoch: str) -> Commit | None:
        """The commit under `fingerprint`, if it was made in `epoch`."""
        try:
            commit = Commit.model_validate_json(self.storage.get(self._key(fingerprint)))
        except NotFound:
            return None
        except ValidationError:
            raise self._corrupt(f"commits/{fingerprint}.json") from None
        return commit if commit.epoch == epoch else None

    def committed(self, epoch: str) -> set[str]:
        """All versions committed in `epoch`."""
        return set(self._commits(epoch).values())

    def commit(self, fingerprint: str, mine: Commit) -> tuple[Commit, bool]:
        """The first commit under `fingerprint` in its epoch, and whether that is `mine`."""
        key = self._key(fingerprint)
        for _ in range(_TRIES):
            if self.storage.create(key, mine.dump()):
                return mine, True
            try:
                data, tag = self.storage.get_tagged(key)
            except NotFound:
                continue
            try:
                there = Commit.model_validate_json(data)
            except ValidationError:
                raise self._corrupt(f"commits/{fingerprint}.json") from None
            if there.epoch == mine.epoch:
                return there, False
            if self.storage.swap(key, mine.dump(), tag):  # left by an epoch that is over
                return mine, True
        raise self._busy()

    def finish(self, fingerprint: str, commit: Commit) -> bool:
        """Makes a committed version current, once per commit; False if its epoch is over."""
        mark = self._mark(fingerprint, commit.epoch)
        for _ in range(_TRIES):
            current, tag = self.read()
            if current.epoch != commit.epoch or not current.swept:
                return False
            if self.storage.exists(mark):  # it was current once; whatever is now was chosen later
                return True
            update = current.model_copy(update={"version": commit.version})
            if current == update or self.swap(tag, update):
                self.storage.create(mark, b"")
                return True
        raise self._busy()

    def set_aside(self, fingerprint: str, commit: Commit) -> bool:
        """Lets a committed version be, without ever making it current by itself; False if its epoch is over."""
        current = self.read().current
        if current.epoch != commit.epoch or not current.swept:
            return False
        self.storage.create(self._mark(fingerprint, commit.epoch), b"")
        return True

    def choose(self, version: str, epoch: str) -> bool:
        """Makes a version committed in `epoch` current; False if it is not committed or that epoch is over."""
        for _ in range(_TRIES):
            current, tag = self.read()
            if current.epoch != epoch or current.version is None or version not in self.committed(epoch):
                return False
            if self.swap(tag, current.model_copy(update={"version": version})):
                return True
        raise self._busy()

    def describe(self, changes: Mapping[str, object]) -> bool:
        """Changes what belongs to the adapter (`public`, `trigger`); False if there is no adapter."""
        for _ in range(_TRIES):
            current, tag = self.read()
            if current.version is None:
                return False
            update = current.model_copy(update=changes)
            if current == update or self.swap(tag, update):
                return True
        raise self._busy()

    def withdraw(self, version: str, epoch: str) -> bool:
        """Takes a version that is not current out of `epoch`; False, and nothing has changed, if it is current.

        Nobody can choose it any more when this has returned True: `choose` looks for its commits after it has read the
        record that the last line changes.
        """
        mine = [one for one, committed in self._commits(epoch).items() if committed == version]
        if self.read().current.version == version:
            return False
        for fingerprint in mine:
            self.storage.delete(self._key(fingerprint))
            self.storage.delete(self._mark(fingerprint, epoch))
        for _ in range(_TRIES):
            current, tag = self.read()
            if current.version == version:  # chosen a moment before
                for fingerprint in mine:
                    self.storage.create(self._mark(fingerprint, epoch), b"")
                    self.storage.create(self._key(fingerprint), Commit(version=version, epoch=epoch).dump())
                return False
            if current.epoch != epoch or self.swap(tag, current.model_copy(update={"removals": current.removals + 1})):
                return True
        raise self._busy()

    def delete(self) -> bool:
        """Ends the epoch, which hides everything at once, then removes the files; False if there was nothing.

        A record that cannot be read is deleted like any other.
        """
        for _ in range(_TRIES):
            try:
                current, tag = self.read()
            except CorruptAdapter:
                current, tag = Current(swept=False), self.storage.get_tagged(f"{self.folder}/current.json")[1]
            if current.version is None and current.swept:
                return False
            gone = Current(epoch=secrets.token_hex(8), swept=False)
            if self.swap(tag, gone):
                self._sweep(gone)
                return True
        raise self._busy()

    def ready(self, takeover_s: float) -> Current:
        """The state of an id that can be published to; finishes a deletion that stood still for `takeover_s`."""
        waited_s, epoch = 0.0, ""
        while True:
            current, tag = self.read()
            if current.swept:
                return current
            if current.epoch != epoch:
                waited_s, epoch = 0.0, current.epoch
            if waited_s < takeover_s:
                time.sleep(0.1)
                waited_s += 0.1
                continue
            mine = current.model_copy(update={"epoch": secrets.token_hex(8)})
            if self.swap(tag, mine):
                self._sweep(mine)

    def _sweep(self, gone: Current) -> None:
        """Removes all files of a deleted id, commits first; stops if another writer has taken over."""
        for name in sorted(self.storage.folders(self.folder), key=lambda name: name != "commits"):
            if self.read().current != gone:
                return
            self.storage.delete_tree(f"{self.folder}/{name}")
        current, tag = self.read()
        if current == gone:
            self.swap(tag, gone.model_copy(update={"swept": True}))

    def _commits(self, epoch: str) -> dict[str, str]:
        """The version committed under each fingerprint in `epoch`."""
        names = [key.rpartition("/")[2] for key in self.storage.list(f"{self.folder}/commits")]
        fingerprints = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        found = {fingerprint: self.commit_of(fingerprint, epoch) for fingerprint in fingerprints}
        return {fingerprint: commit.version for fingerprint, commit in found.items() if commit is not None}

    def _mark(self, fingerprint: str, epoch: str) -> str:
        """The key whose existence says that a commit has been current."""
        return f"{self.folder}/commits/{fingerprint}.{epoch or 'first'}.current"

    def _key(self, fingerprint: str) -> str:
        if not _FINGERPRINT.fullmatch(fingerprint):
            raise ValueError(f"bad fingerprint {fingerprint!r}: expected 8 to 64 hex digits")
        return f"{self.folder}/commits/{fingerprint}.json"

    def _corrupt(self, file: str) -> CorruptAdapter:
        _, tenant, id = self.folder.split("/")
        return CorruptAdapter(
            f"Adapter {tenant}/{id} is damaged: its {file} cannot be read. Delete the adapter and publish it again."
        )

    def _busy(self) -> StorageUnavailable:
        return StorageUnavailable(f"{self.folder} changes all the time. Try again.")
