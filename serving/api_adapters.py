"""`/v1/models` and `/v1/adapters`: what a tenant may wear, and putting adapters in and taking them away."""

import asyncio
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, File, Form, Request, UploadFile

from serving.api_images import ERRORS
from serving.intake import ref_of
from serving.problems import ApiError
from serving.service import service_of
from serving.wire import AdapterDetails, AdapterInfo, Adapters, Deleted, Model, Models, Name
from training.adapter import AdapterError
from training.registry import Resolved

router = APIRouter(tags=["adapters"])


@router.get("/v1/models", responses=ERRORS, tags=["models"])
async def list_models(request: Request) -> Models:
    """The base, and every adapter that the caller may wear, each as a model to name in a request."""
    service = service_of(request)
    tenant = service.tenant(request)
    library = service.intake.library
    found = await asyncio.to_thread(library.list, tenant)
    return Models(data=[_base_model(library.base), *(_model(resolved, library.base) for resolved in found)])


@router.get("/v1/models/{model:path}", responses=ERRORS, tags=["models"])
async def show_model(request: Request, model: Name) -> Model:
    """One model by its id."""
    service = service_of(request)
    tenant = service.tenant(request)
    library = service.intake.library
    uses = await asyncio.to_thread(service.intake.adapters, tenant, model, ())
    if not uses:
        return _base_model(library.base)
    name = f"{uses[0].ref.tenant}/{uses[0].ref.id}@{uses[0].ref.version}"
    return _model(await asyncio.to_thread(library.resolve, tenant, name), library.base)


@router.get("/v1/adapters", responses=ERRORS)
async def list_adapters(request: Request) -> Adapters:
    """The caller's adapters, and public ones of others, for this server's base."""
    service = service_of(request)
    found = await asyncio.to_thread(service.intake.library.list, service.tenant(request))
    return Adapters(data=[AdapterInfo.model_validate(_fields(resolved)) for resolved in found])


@router.post("/v1/adapters", status_code=201, responses=ERRORS)
async def upload_adapter(
    request: Request,
    file: Annotated[UploadFile, File(description="LoRA weights, safetensors only: diffusers, PEFT or kohya")],
    id: Annotated[str, Form(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="its id; an existing one is replaced")],
    public: Annotated[bool, Form(description="other tenants may generate with it")] = False,
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
            lambda: library.upload(tenant, id, data, spec.engine, public=public, trigger=trigger)
        )
    except AdapterError as error:
        raise ApiError(400, str(error), param="file", code="invalid_adapter") from None
    await service.engines.preload(ref_of(resolved))
    return _details(resolved)


@router.get("/v1/adapters/{id:path}", responses=ERRORS)
async def show_adapter(request: Request, id: Name) -> AdapterDetails:
    """One adapter with its card; `id`, `tenant/id`, either with `@version`."""
    service = service_of(request)
    tenant = service.tenant(request)
    return _details(await asyncio.to_thread(service.intake.library.resolve, tenant, id))


@router.delete("/v1/adapters/{id}", responses=ERRORS)
async def delete_adapter(request: Request, id: Name) -> Deleted:
    """Deletes an adapter of the caller; requests under way finish with it."""
    service = service_of(request)
    tenant = service.tenant(request)
    gone = await asyncio.to_thread(service.intake.library.delete, tenant, id)
    await service.engines.forget(ref_of(gone))
    return Deleted(id=id)


def _base_model(name: str) -> Model:
    return Model(id=name, created=0, owned_by="dreamfleet")


def _model(resolved: Resolved, base: str) -> Model:
    return Model(id=f"{base}:{resolved.tenant}/{resolved.id}", created=_created(resolved), owned_by=resolved.tenant)


def _details(resolved: Resolved) -> AdapterDetails:
    card = resolved.card.model_dump(mode="json", by_alias=True, exclude_none=True)
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
        "public": card.public,
        "trigger": card.trigger or card.instance_prompt,
    }


def _created(resolved: Resolved) -> int:
    return int(datetime.fromisoformat(resolved.card.created).timestamp())
