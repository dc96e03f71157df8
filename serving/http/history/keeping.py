"""Keeps finished pictures on the storage: all where the operator keeps a history, else those that links lead to."""

import asyncio
import logging
import time
from dataclasses import dataclass, field

from pydantic import JsonValue

from serving.config import ServeSpec
from serving.engine.request import FinishedPicture, GenerateRequest
from serving.errors import Withheld
from serving.http.history.links import Links
from serving.http.withheld import withheld_names
from training.errors import UserError
from training.storage.pictures import KeptPicture, PictureShelf, PictureStore, new_id
from training.storage.storage import Storage, StorageError

logger = logging.getLogger(__name__)
TIDY_S = 60.0  # a tenant's pictures are counted at most so often while it makes some
PERIOD_S = 600.0  # and everybody's so often
# what of a request is the server's own or another picture's
_OWN = {"request_id", "tenant", "seed", "count", "deadline_s", "previews", "linked", "reading", "expected", "cut_cells"}


@dataclass(eq=False, slots=True)
class PictureKeeper:
    """What one HTTP app keeps. `base` and `base_hash` are the server's."""

    storage: Storage
    spec: ServeSpec
    base: str
    base_hash: str
    pictures: PictureStore = field(init=False)
    links: Links = field(init=False)
    _tidied: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pictures = PictureStore(self.storage)
        self.links = Links(self.storage, self.spec.link_s, self.spec.site)

    async def keep(self, picture: FinishedPicture, wanted: GenerateRequest) -> FinishedPicture:
        """The picture, kept where it is to be: `kept` names its place.

        Raises StorageError where a link is asked for; a history that cannot be written costs nobody the picture.
        """
        if not self.spec.history and not wanted.linked:
            return picture
        try:
            kept = await asyncio.to_thread(self._keep, picture, wanted)
        except StorageError as error:
            if wanted.linked:
                raise
            logger.error("request %s: its picture is not in the history: %s", wanted.request_id, error)
            return picture
        return picture.model_copy(update={"kept": kept})

    def _keep(self, picture: FinishedPicture, wanted: GenerateRequest) -> str:
        now = time.time()
        shelf: PictureShelf = "history" if self.spec.history else "links"
        one = KeptPicture(
            id=new_id(now),
            shelf=shelf,
            tenant=wanted.tenant,
            time=now,
            form=wanted.output_format,
            bytes=len(picture.data),
            seed=picture.seed,
            index=picture.index,
            base=self.base,
            base_hash=self.base_hash,
            adapters=tuple(str(use.ref) for use in wanted.adapters),
            asked={"request": wanted.request_id, **asked_of(wanted)},
        )
        self.pictures.keep(one, picture.data)
        # after the picture is there: either this sees a revocation, or the revocation's search sees the picture
        if one.names and one.names & withheld_names(self.storage):
            self.pictures.delete(shelf, one.tenant, one.id)
            return ""
        if now - self._tidied.get(one.tenant, 0.0) > TIDY_S:
            self._tidied[one.tenant] = now
            self.tidy(one.tenant)
        return f"{shelf}/{one.id}"

    def link(self, picture: FinishedPicture, wanted: GenerateRequest, asked_at: str) -> str:
        """The link to a picture that was kept. Raises Withheld if what it wears was withdrawn meanwhile. Blocks."""
        shelf, _, id = picture.kept.partition("/")
        if not id:
            raise Withheld("An adapter of the picture was withdrawn meanwhile.")
        return self.links.url(shelf, wanted.tenant, f"{id}.{wanted.output_format}", asked_at)

    def tidy(self, tenant: str) -> int:
        """Removes a tenant's pictures that are too old or too many; how many. Blocks."""
        lasts: dict[PictureShelf, float] = {"history": self.spec.history_days * 86400.0, "links": self.spec.link_s}
        return self.pictures.tidy(tenant, lasts_s=lasts, most_bytes=self.spec.picture_bytes)

    def tidy_all(self) -> int:
        """The same for everybody."""
        return sum(self.tidy(tenant) for tenant in self.pictures.tenants())

    async def watch(self) -> None:
        """Removes what is too old again and again; ends when it is cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.tidy_all)
            except UserError as error:
                logger.error("kept pictures cannot be tidied: %s", error)
            await asyncio.sleep(PERIOD_S)


def asked_of(wanted: GenerateRequest) -> dict[str, JsonValue]:
    """What was asked, without the server's own fields; of pictures in it only that they were there."""
    found = _without_bytes(wanted.model_dump(exclude=_OWN, exclude_defaults=True))
    assert isinstance(found, dict)
    return found


def _without_bytes(value: object) -> JsonValue:
    if isinstance(value, bytes):
        return True
    if isinstance(value, dict):
        return {str(key): _without_bytes(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_bytes(one) for one in value]
    assert value is None or isinstance(value, str | int | float | bool), type(value)
    return value
