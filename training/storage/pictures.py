"""Pictures that a server keeps, each with everything that made it: a tenant's history, and what links lead to.

    pictures/history/<tenant>/<id>/picture.png, entry.json      until they are too old, too many, deleted or revoked
    pictures/links/<tenant>/<id>/...                            only as long as a link to them lasts

An id begins with its time, so names alone tell age and order. The entry is written last, and removed first. The storage
is all there is: any number of servers work on it.
"""

import secrets
import time
from collections.abc import Collection, Iterator
from typing import Annotated, Literal, get_args

from pydantic import JsonValue, StringConstraints, ValidationError

from training.storage.closed import Closed
from training.storage.storage import NotFound, Storage

PictureShelf = Literal["history", "links"]
SHELVES: tuple[PictureShelf, ...] = get_args(PictureShelf)
PictureId = Annotated[str, StringConstraints(pattern=r"^[0-9]{13}-[0-9a-f]{16}$")]
_ENTRY = "entry.json"


class KeptPicture(Closed):
    """One picture. `adapters` are `tenant/id@version`; `asked` is the engine's request, without pictures."""

    id: PictureId
    shelf: PictureShelf
    tenant: str
    time: float
    form: Literal["png", "jpeg", "webp"]
    bytes: int
    seed: int
    index: int
    base: str
    base_hash: str
    adapters: tuple[str, ...] = ()
    asked: dict[str, JsonValue] = {}

    @property
    def names(self) -> frozenset[str]:
        """`tenant/id` of the adapters that it wears."""
        return frozenset(one.partition("@")[0] for one in self.adapters)


def new_id(now: float) -> str:
    """The id of a picture made at `now`, seconds since the epoch."""
    return f"{int(now * 1000):013d}-{secrets.token_hex(8)}"


class PictureStore:
    """The pictures on one storage. Every call blocks, and raises StorageError where the storage refuses."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def keep(self, picture: KeptPicture, data: bytes) -> None:
        """Writes the file and then its entry."""
        self._storage.put(self._file(picture), data)
        self._storage.put(
            f"{_folder(picture.shelf, picture.tenant, picture.id)}/{_ENTRY}", picture.model_dump_json().encode()
        )

    def read(self, picture: KeptPicture) -> bytes:
        """The file. Raises NotFound."""
        return self._storage.get(self._file(picture))

    def find(self, shelf: PictureShelf, tenant: str, id: str) -> KeptPicture:
        """One entry. Raises NotFound, also for one that cannot be read."""
        key = f"{_folder(shelf, tenant, id)}/{_ENTRY}"
        try:
            return KeptPicture.model_validate_json(self._storage.get(key))
        except ValidationError as error:
            raise NotFound(f"'{key}' cannot be read: {error.errors()[0]['msg']}.") from None

    def page(self, tenant: str, after: str | None, limit: int) -> tuple[list[KeptPicture], bool]:
        """At most `limit` entries of a tenant's history older than `after`, newest first, and whether more are."""
        keys = self._storage.list(f"pictures/history/{tenant}")
        ids = sorted({key.split("/")[3] for key in keys if key.endswith(f"/{_ENTRY}")}, reverse=True)
        found: list[KeptPicture] = []
        for id in ids:
            if after is not None and id >= after:
                continue
            if len(found) == limit:
                return found, True
            try:
                found.append(self.find("history", tenant, id))
            except NotFound:  # deleted meanwhile
                continue
        return found, False

    def delete(self, shelf: PictureShelf, tenant: str, id: str) -> bool:
        """Removes a picture; whether it was there."""
        folder = _folder(shelf, tenant, id)
        there = self._storage.exists(f"{folder}/{_ENTRY}")
        self._storage.delete(f"{folder}/{_ENTRY}")
        for key in self._storage.list(folder):
            self._storage.delete(key)
        return there

    def clear(self, tenant: str) -> int:
        """Removes a tenant's whole history; how many pictures it had."""
        ids = {key.split("/")[3] for key in self._storage.list(f"pictures/history/{tenant}")}
        return sum(self.delete("history", tenant, id) for id in ids)

    def tidy(
        self, tenant: str, *, lasts_s: dict[PictureShelf, float], most_bytes: int, now: float | None = None
    ) -> int:
        """Removes what is older than its shelf lasts and then the oldest beyond `most_bytes`; how many pictures."""
        now = time.time() if now is None else now
        sizes: dict[tuple[str, PictureShelf], int] = {}
        for shelf in SHELVES:
            for key, size in self._storage.sizes(f"pictures/{shelf}/{tenant}").items():
                place = (key.split("/")[3], shelf)
                sizes[place] = sizes.get(place, 0) + size
        left, gone = sum(sizes.values()), 0
        for id, shelf in sorted(sizes):
            old = now - int(id.partition("-")[0]) / 1000 > lasts_s[shelf]
            if old or left > most_bytes:
                self.delete(shelf, tenant, id)
                left, gone = left - sizes[id, shelf], gone + 1
        return gone

    def tenants(self) -> list[str]:
        """Those who have pictures here."""
        return sorted({tenant for shelf in SHELVES for tenant in self._storage.folders(f"pictures/{shelf}")})

    def wearing(self, names: Collection[str], tenant: str | None = None) -> Iterator[KeptPicture]:
        """All pictures, of a tenant or of all, that wear one of the adapters `tenant/id`. Reads every entry."""
        wanted = frozenset(names)
        for key in self._storage.list("pictures"):
            _, shelf, owner, id, name = key.split("/")
            if name != _ENTRY or tenant not in (None, owner):
                continue
            try:
                picture = KeptPicture.model_validate_json(self._storage.get(key))
            except (NotFound, ValidationError):
                continue
            if picture.names & wanted:
                yield picture

    def keys(self, picture: KeptPicture) -> list[str]:
        """What is stored of one."""
        return self._storage.list(_folder(picture.shelf, picture.tenant, picture.id))

    def _file(self, picture: KeptPicture) -> str:
        return f"{_folder(picture.shelf, picture.tenant, picture.id)}/picture.{picture.form}"


def _folder(shelf: PictureShelf, tenant: str, id: str) -> str:
    return f"pictures/{shelf}/{tenant}/{id}"
