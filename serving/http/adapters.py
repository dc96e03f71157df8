"""`/v1/models` and `/v1/adapters`: the adapters that a tenant may use; uploading, changing and deleting its own."""

import asyncio
import mimetypes
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, File, Form, Path, Query, Request, UploadFile
from fastapi.responses import Response
from pydantic.json_schema import SkipJsonSchema

from serving.http.defaults import ImageDefaults
from serving.http.images import ERRORS
from serving.http.intake import Intake, ref_of
from serving.http.problems import ApiError
from serving.http.service import service_of
from serving.http.wire import (
    AdapterChange,
    AdapterDetails,
    AdapterFile,
    AdapterFiles,
    AdapterInfo,
    AdapterPage,
    AdapterVersion,
    AdapterVersions,
    Deleted,
    ModelInfo,
    ModelPage,
    Name,
)
from training.adapters.adapter import AdapterError
from training.storage.version import Resolved

router = APIRouter(tags=["adapters"])
PAGE = 1000
# what other tenants may read of a public adapter's card: how to use it, not how and from what it was made
SHOWN = {
    "sha256", "size", "created", "base", "base_hash", "rank", "alpha", "targets", "text_encoder_targets",
    "instance_prompt", "class_name", "trigger",
}  # fmt: skip
After = Annotated[str | None, Query(max_length=200, description="the last of the page before, `<tenant>/<id>`")]
AdapterId = Annotated[str, Path(max_length=300)]
Version = Annotated[str, Path(pattern=r"^[0-9a-f]{6,64}$", description="a version, or a unique prefix of it")]


@router.get("/v1/models", responses=ERRORS, tags=["models"], response_model_exclude_none=True)
async def list_models(
    request: Request,
    after: After = None,
    limit: Annotated[int | None, Query(ge=1, le=10_000, description="adapters at most; else all")] = None,
) -> ModelPage:
    """The base, and every adapter that the caller may use, each as a model to name in a request."""
    service = service_of(request)
    tenant = service.tenant(request)
    library = service.intake.library
    last = None if after is None else after.removeprefix(f"{library.base}:")
    found, more = await asyncio.to_thread(library.page, tenant, last, limit)
    base = [] if after else [_base_model(service.intake)]
    return ModelPage(data=[*base, *(_model(resolved, library.base) for resolved in found)], has_more=more)


@router.get("/v1/models/{model:path}", responses=ERRORS, tags=["models"], response_model_exclude_none=True)
async def show_model(request: Request, model: Name) -> ModelInfo:
    """One model by its id."""
    service = service_of(request)
    tenant = service.tenant(request)
    library = service.intake.library
    resolved = await asyncio.to_thread(service.intake.model, tenant, model)
    return _base_model(service.intake) if resolved is None else _model(resolved, library.base)


@router.get("/v1/adapters", responses=ERRORS)
async def list_adapters(
    request: Request, after: After = None, limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE
) -> AdapterPage:
    """The caller's adapters, then public ones of others, for this server's base, page by page."""
    service = service_of(request)
    found, more = await asyncio.to_thread(service.intake.library.page, service.tenant(request), after, limit)
    return AdapterPage(
        data=[AdapterInfo.model_validate(_fields(resolved)) for resolved in found],
        first_id=found[0].name if found else None,
        last_id=found[-1].name if found else None,
        has_more=more,
    )


@router.post("/v1/adapters", status_code=201, responses=ERRORS)
async def upload_adapter(
    request: Request,
    file: Annotated[UploadFile, File(description="LoRA weights, safetensors only: diffusers, PEFT or kohya")],
    id: Annotated[str, Form(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="its id; an existing one is replaced")],
    public: Annotated[
        bool | SkipJsonSchema[None],
        Form(description="other tenants may generate with it; left out: unchanged, for a new one no"),
    ] = None,
    trigger: Annotated[str, Form(max_length=1000, description="what its prompts say")] = "",
) -> AdapterDetails:
    """Checks an adapter against the base and publishes it. Nothing is stored unless all of it is good."""
    service = service_of(request)
    tenant = service.tenant(request)
    library, spec = service.intake.library, service.intake.spec
    data = await file.read()
    if len(data) > spec.limits.upload_bytes:
        raise ApiError(413, f"The file has {len(data)} bytes; at most {spec.limits.upload_bytes} are allowed.")
    try:
        resolved = await asyncio.to_thread(
            lambda: library.upload(tenant, id, data, spec.engine, public=public, trigger=trigger, limits=spec.limits)
        )
    except AdapterError as error:
        raise ApiError(400, str(error), param="file", code="invalid_adapter") from None
    await service.engines.preload(ref_of(resolved))
    return _details(resolved, tenant)


@router.get("/v1/adapters/{id}/versions", responses=ERRORS)
async def list_versions(request: Request, id: AdapterId) -> AdapterVersions:
    """All versions of an adapter of the caller, newest first."""
    service = service_of(request)
    tenant = service.tenant(request)
    library = service.intake.library
    current = (await asyncio.to_thread(library.resolve, tenant, id)).version
    found = await asyncio.to_thread(library.versions, tenant, id)
    return AdapterVersions(
        data=[
            AdapterVersion(
                id=id,
                version=one.version,
                created=_created(one),
                bytes=one.card.size,
                steps=one.card.steps,
                current=one.version == current,
            )
            for one in found
        ]
    )


@router.get("/v1/adapters/{id}/versions/{version}", responses=ERRORS)
async def show_version(request: Request, id: AdapterId, version: Version) -> AdapterDetails:
    """One version of an adapter of the caller, with its card."""
    service = service_of(request)
    tenant = service.tenant(request)
    return _details(await asyncio.to_thread(service.intake.library.resolve, tenant, f"{id}@{version}"), tenant)


@router.delete("/v1/adapters/{id}/versions/{version}", responses=ERRORS)
async def delete_version(request: Request, id: AdapterId, version: Version) -> Deleted:
    """Deletes one version of an adapter of the caller; not the one that is served."""
    service = service_of(request)
    tenant = service.tenant(request)
    gone = await asyncio.to_thread(service.intake.library.remove_version, tenant, id, version)
    await service.engines.forget(gone)
    return Deleted(id=f"{id}@{gone.version}", object="adapter.version")


@router.get("/v1/adapters/{id}/versions/{version}/files", responses=ERRORS)
async def list_files(request: Request, id: AdapterId, version: Version) -> AdapterFiles:
    """The files of a version of an adapter of the caller: weights, card, samples."""
    service = service_of(request)
    tenant = service.tenant(request)
    resolved, files = await asyncio.to_thread(service.intake.library.files, tenant, id, version)
    data = [AdapterFile(name=name, bytes=size) for name, size in files.items()]
    return AdapterFiles(version=resolved.version, data=data)


@router.get(
    "/v1/adapters/{id}/versions/{version}/files/{file:path}",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "the file"}, **ERRORS},
)
async def download_file(
    request: Request, id: AdapterId, version: Version, file: Annotated[str, Path(max_length=300)]
) -> Response:
    """One file of a version of an adapter of the caller, such as `adapter.safetensors`."""
    service = service_of(request)
    tenant = service.tenant(request)
    data = await asyncio.to_thread(service.intake.library.read, tenant, id, version, file)
    kind = mimetypes.guess_type(file)[0] or "application/octet-stream"
    name = file.rpartition("/")[2]
    headers = {"Content-Disposition": f'attachment; filename="{id}-{name}"', "X-Content-Type-Options": "nosniff"}
    return Response(data, media_type=kind, headers=headers)


@router.patch("/v1/adapters/{id}", responses=ERRORS)
async def change_adapter(request: Request, id: AdapterId, change: AdapterChange) -> AdapterDetails:
    """Changes who may see an adapter of the caller, its trigger, or which version is served."""
    service = service_of(request)
    tenant = service.tenant(request)
    given = change.model_dump(exclude_none=True)
    return _details(await asyncio.to_thread(lambda: service.intake.library.change(tenant, id, **given)), tenant)


@router.get("/v1/adapters/{id:path}", responses=ERRORS)
async def show_adapter(request: Request, id: Name) -> AdapterDetails:
    """One adapter with its card; `id`, `tenant/id`, either with `@version`."""
    service = service_of(request)
    tenant = service.tenant(request)
    return _details(await asyncio.to_thread(service.intake.library.resolve, tenant, id), tenant)


@router.delete("/v1/adapters/{id}", responses=ERRORS)
async def delete_adapter(request: Request, id: Name) -> Deleted:
    """Deletes an adapter of the caller; requests under way finish with it."""
    service = service_of(request)
    tenant = service.tenant(request)
    gone = await asyncio.to_thread(service.intake.library.delete, tenant, id)
    if gone is not None:
        await service.engines.forget(ref_of(gone))
    return Deleted(id=id)


def _base_model(intake: Intake) -> ModelInfo:
    facts, limits = intake.facts, intake.spec.limits
    defaults = ImageDefaults(
        size=f"{facts.resolution}x{facts.resolution}",
        multiple=facts.multiple_px,
        largest_side=limits.side_px,
        largest_pixels=limits.pixels,
        steps=intake.steps,
        largest_steps=limits.steps,
        guidance_scale=intake.guidance_scale,
        scheduler=intake.scheduler,
        negative_prompt=facts.negative,
        largest_n=limits.images,
        largest_adapters=limits.adapters,
        largest_weight=limits.weight,
        history=intake.spec.history,
    )
    return ModelInfo(id=intake.library.base, created=0, owned_by="dreamfleet", defaults=defaults)


def _model(resolved: Resolved, base: str) -> ModelInfo:
    return ModelInfo(id=f"{base}:{resolved.tenant}/{resolved.id}", created=_created(resolved), owned_by=resolved.tenant)


def _details(resolved: Resolved, tenant: str) -> AdapterDetails:
    """An adapter as `tenant` may see it."""
    shown = None if resolved.tenant == tenant else SHOWN
    card = resolved.card.model_dump(mode="json", by_alias=True, exclude_none=True, include=shown, exclude={"public"})
    return AdapterDetails.model_validate({**_fields(resolved), "card": card})


def _fields(resolved: Resolved) -> dict[str, object]:
    card = resolved.card
    return {
        "id": resolved.id,
        "tenant": resolved.tenant,
        "version": resolved.version,
        "base": card.base,
        "created": _created(resolved),
        "bytes": card.size,
        "rank": card.rank,
        "public": resolved.public,
        "trigger": resolved.trigger,
    }


def _created(resolved: Resolved) -> int:
    return int(datetime.fromisoformat(resolved.card.created).timestamp())
