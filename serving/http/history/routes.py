"""`/v1/images/history`: the caller's pictures with what made them; and the files that signed links lead to."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, JsonValue

from serving.http.images import ERRORS
from serving.http.problems import ApiError
from serving.http.service import Service, service_of
from serving.http.wire import UsedAdapter
from serving.http.withheld import withheld
from training.storage.pictures import KeptPicture, PictureShelf
from training.storage.storage import NotFound

router = APIRouter(tags=["images"])
PictureName = Annotated[str, Path(pattern=r"^[0-9]{13}-[0-9a-f]{16}$")]
OwnTenant = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'",
    "Cache-Control": "private, max-age=3600",
}


class HistoryEntry(BaseModel):
    """A picture of the history. `settings` is what else was asked for, by the names of the engine's request."""

    id: str
    object: str = "image"
    created: float = Field(description="seconds since the epoch")
    request: str = Field(description="pictures of one request have the same")
    index: int
    prompt: str
    negative_prompt: str
    adapters: list[UsedAdapter]
    seed: int
    size: str
    steps: int
    guidance_scale: float
    scheduler: str
    model: str
    output_format: str
    bytes: int
    settings: dict[str, JsonValue]
    url: str = Field(description="a link that needs no key and expires")


class HistoryPage(BaseModel):
    """A page of the history, newest first; the next one begins `after` its `last_id`."""

    object: str = "list"
    data: list[HistoryEntry]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class PictureDeleted(BaseModel):
    """What has been deleted."""

    id: str
    object: str = "image"
    deleted: bool = True


class HistoryCleared(BaseModel):
    """How many pictures have been deleted."""

    object: str = "image.history"
    deleted: int


@router.get("/v1/images/history", responses=ERRORS)
async def list_history(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=64, description="the last id of the page before")] = None,
) -> HistoryPage:
    """The pictures that the caller has made, newest first, each with what made it and a link to it."""
    service, tenant = _kept(request)
    base = str(request.base_url)

    def read() -> HistoryPage:
        found, more = service.keeper.pictures.page(tenant, after, limit)
        shown = [_entry(service, one, base) for one in found if not one.names & service.withheld.names]
        ends = (found[0].id, found[-1].id) if found else (None, None)
        return HistoryPage(data=shown, first_id=ends[0], last_id=ends[1], has_more=more)

    return await asyncio.to_thread(read)


@router.get("/v1/images/history/{id}", responses=ERRORS)
async def show_picture(request: Request, id: PictureName) -> HistoryEntry:
    """One picture of the caller's history."""
    service, tenant = _kept(request)
    one = await asyncio.to_thread(_find, service, "history", tenant, id)
    return await asyncio.to_thread(_entry, service, one, str(request.base_url))


@router.delete("/v1/images/history", responses=ERRORS)
async def clear_history(request: Request) -> HistoryCleared:
    """Deletes all of the caller's history."""
    service, tenant = _kept(request)
    return HistoryCleared(deleted=await asyncio.to_thread(service.keeper.pictures.clear, tenant))


@router.delete("/v1/images/history/{id}", responses=ERRORS)
async def delete_picture(request: Request, id: PictureName) -> PictureDeleted:
    """Deletes a picture of the caller's history; links to it end at once."""
    service, tenant = _kept(request)
    if not await asyncio.to_thread(service.keeper.pictures.delete, "history", tenant, id):
        raise _unknown(id)
    return PictureDeleted(id=id)


@router.get("/v1/images/files/{shelf}/{tenant}/{id}.{form}", responses=ERRORS, response_class=Response)
async def get_file(
    request: Request,
    shelf: PictureShelf,
    tenant: OwnTenant,
    id: PictureName,
    form: Annotated[str, Path(pattern=r"^(png|jpeg|webp)$")],
    expires: Annotated[int, Query(ge=0, le=2**40)],
    signature: Annotated[str, Query(max_length=64)],
) -> Response:
    """The picture that a signed link leads to, until it expires. Needs no key."""
    service = service_of(request)

    def read() -> bytes:
        service.keeper.links.check(f"{shelf}/{tenant}/{id}.{form}", expires, signature)
        one = _find(service, shelf, tenant, id)
        try:
            return service.keeper.pictures.read(one)
        except NotFound:
            raise _unknown(id) from None

    return Response(await asyncio.to_thread(read), media_type=f"image/{form}", headers=HEADERS)


def _kept(request: Request) -> tuple[Service, str]:
    """The service and the caller's tenant. Raises ApiError where no history is kept."""
    service = service_of(request)
    tenant = service.tenant(request)
    if not service.intake.spec.history:
        raise ApiError(
            404, "This server keeps no history of pictures: its operator starts it with --history.", code="history_off"
        )
    return service, tenant


def _find(service: Service, shelf: PictureShelf, tenant: str, id: str) -> KeptPicture:
    try:
        one = service.keeper.pictures.find(shelf, tenant, id)
    except NotFound:
        raise _unknown(id) from None
    taken = one.names & service.withheld.names
    if taken:
        raise withheld(min(taken))
    return one


def _entry(service: Service, one: KeptPicture, base: str) -> HistoryEntry:
    asked = dict(one.asked)
    uses = asked.pop("adapters", [])
    weights = [use.get("weight", 1.0) for use in uses if isinstance(use, dict)] if isinstance(uses, list) else []
    worn = [
        UsedAdapter.model_validate({"id": ref.partition("@")[0], "version": ref.partition("@")[2], "weight": weight})
        for ref, weight in zip(one.adapters, weights, strict=True)
    ]
    size = f"{asked.pop('width')}x{asked.pop('height')}"
    taken = {name: asked.pop(name, default) for name, default in _DEFAULTS.items()}
    return HistoryEntry.model_validate(
        {
            **taken,
            "id": one.id,
            "created": one.time,
            "index": one.index,
            "adapters": worn,
            "seed": one.seed,
            "size": size,
            "model": one.base,
            "output_format": one.form,
            "bytes": one.bytes,
            "settings": asked,
            "url": service.keeper.links.url(one.shelf, one.tenant, f"{one.id}.{one.form}", base),
        }
    )


_DEFAULTS: dict[str, JsonValue] = {
    "request": "", "prompt": "", "negative_prompt": "", "steps": 0, "guidance_scale": 0.0, "scheduler": "ddim",
}  # fmt: skip


def _unknown(id: str) -> ApiError:
    return ApiError(404, f"No picture '{id}': it was deleted, or is too old.", param="id", code="picture_not_found")
