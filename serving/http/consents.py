"""`/v1/consents` and `/v1/reports`: consent records and taking them back; pictures that somebody complains about."""

import asyncio
import secrets
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, File, Form, Path, Request, UploadFile
from pydantic import BaseModel

from serving.http.detect import address_of, detector_of
from serving.http.images import ERRORS
from serving.http.once import Once, digest, id_once
from serving.http.problems import ApiError
from serving.http.service import Service, service_of
from serving.http.withheld import lift, suspend
from training.errors import UserError
from training.storage.closed import Closed
from training.storage.consents import ConsentRecord, find_consent, list_consents
from training.storage.erasure import Receipt, revoke
from training.storage.storage import NotFound, content_id

router = APIRouter(tags=["provenance"])
Id = Annotated[str, Path(pattern=r"^[0-9a-f]{8,64}$")]


class ConsentPage(BaseModel):
    """The caller's consent records."""

    data: list[ConsentRecord]


class Report(Closed):
    """A complaint about a picture. `adapters` are what its mark resolved to; the picture itself is not kept."""

    id: str
    time: str
    reason: str
    contact: str = ""
    picture: str
    made_here: bool
    false_positive: float
    adapters: tuple[str, ...] = ()
    suspended: bool = False


class ReportAnswer(BaseModel):
    """What whoever reported learns."""

    id: str
    made_here: bool
    suspended: bool


class ReportPage(BaseModel):
    """All reports, for the operator."""

    data: list[Report]


@router.get("/v1/consents", responses=ERRORS)
async def list_mine(request: Request) -> ConsentPage:
    """The consent records of the caller's subjects."""
    service = service_of(request)
    tenant = service.tenant(request)
    return ConsentPage(data=await asyncio.to_thread(list_consents, service.storage, tenant))


@router.get("/v1/consents/{id}", responses=ERRORS)
async def show(request: Request, id: Id) -> ConsentRecord:
    """One record."""
    service = service_of(request)
    return await _find(service, id, service.tenant(request))


@router.post("/v1/consents/{id}/revoke", responses=ERRORS)
async def take_back(request: Request, id: Id) -> Receipt:
    """Takes a consent back: nothing of its subject is served or trained any more, and all that is held is erased."""
    service = service_of(request)
    tenant = service.tenant(request)
    record = await _find(service, id, tenant)
    receipt = await asyncio.to_thread(
        lambda: revoke(service.storage, tenant, record.subject, by=f"tenant {tenant}", reason="revoked")
    )
    await _spread(service)
    return receipt


@router.post("/v1/reports", responses=ERRORS)
async def report(
    request: Request,
    image: Annotated[UploadFile, File(description="the picture")],
    reason: Annotated[str, Form(min_length=1, max_length=2000)],
    contact: Annotated[str, Form(max_length=300, description="where an answer may be sent")] = "",
    idempotency_key: Once = None,
) -> ReportAnswer:
    """Complains about a picture. Free and without a key."""
    service = service_of(request)
    caller = service.caller(request)
    who = caller.tenant if caller else address_of(request)
    with service.looks.one(who):
        data = await image.read()
        owner = caller.tenant if caller else f"_{content_id(who.encode())[:16]}"
        asked = digest("report", data, reason, contact)
        id = await asyncio.to_thread(id_once, service.storage, owner, idempotency_key, asked, secrets.token_hex(8))
        if idempotency_key is not None and (before := await asyncio.to_thread(_filed, service, id)) is not None:
            return ReportAnswer(id=id, made_here=before.made_here, suspended=before.suspended)
        found = await detector_of(service).detect(data, image.filename or "picture", thorough=False)
    worn = found.records[0].adapters if found.records else ()
    automatic = service.intake.spec.marks.suspend_reported and bool(worn)
    one = Report(
        id=id, time=datetime.now(UTC).isoformat(timespec="seconds"), reason=reason, contact=contact,
        picture=content_id(data), made_here=found.made_here, false_positive=found.false_positive,
        adapters=tuple(f"{adapter.tenant}/{adapter.id}@{adapter.version}" for adapter in worn), suspended=automatic,
    )  # fmt: skip
    await asyncio.to_thread(service.storage.put, f"reports/{one.id}.json", one.model_dump_json().encode())
    for adapter in worn if automatic else ():
        await asyncio.to_thread(suspend, service.storage, adapter.tenant, adapter.id, f"report {one.id}")
    if automatic:
        await _spread(service)
    return ReportAnswer(id=one.id, made_here=one.made_here, suspended=one.suspended)


def _filed(service: Service, id: str) -> Report | None:
    """The report of an id, if there is one."""
    try:
        return Report.model_validate_json(service.storage.get(f"reports/{id}.json"))
    except NotFound:
        return None


@router.get("/v1/reports", responses=ERRORS)
async def list_reports(request: Request) -> ReportPage:
    """All reports; for the operator."""
    service = _operated(request)

    def read() -> list[Report]:
        return [Report.model_validate_json(service.storage.get(key)) for key in service.storage.list("reports")]

    return ReportPage(data=await asyncio.to_thread(read))


@router.post("/v1/reports/{id}/suspend", responses=ERRORS)
async def suspend_reported(request: Request, id: Id) -> Report:
    """Takes off what a report resolved to, at once; for the operator."""
    return await _decide(request, id, suspended=True)


@router.post("/v1/reports/{id}/lift", responses=ERRORS)
async def lift_reported(request: Request, id: Id) -> Report:
    """Puts back what a report has taken off; for the operator."""
    return await _decide(request, id, suspended=False)


async def _decide(request: Request, id: str, *, suspended: bool) -> Report:
    service = _operated(request)
    key = f"reports/{id}.json"

    def decide() -> Report:
        one = Report.model_validate_json(service.storage.get(key)).model_copy(update={"suspended": suspended})
        for name in one.adapters:
            tenant, _, rest = name.partition("/")
            adapter = rest.partition("@")[0]
            if suspended:
                suspend(service.storage, tenant, adapter, f"report {id}")
            else:
                lift(service.storage, tenant, adapter)
        service.storage.put(key, one.model_dump_json().encode())
        return one

    try:
        decided = await asyncio.to_thread(decide)
    except NotFound:
        raise ApiError(404, f"No report '{id}'. GET /v1/reports lists them.", param="id") from None
    await _spread(service)
    return decided


def _operated(request: Request) -> Service:
    service = service_of(request)
    service.tenant(request)
    if not service.operates(service.caller(request)):
        raise ApiError(403, "This is for the operator: an admin key of `operator_tenant`.", code="missing_scope")
    return service


async def _find(service: Service, id: str, tenant: str) -> ConsentRecord:
    try:
        return await asyncio.to_thread(find_consent, service.storage, id, tenant)
    except UserError as error:
        raise ApiError(404, str(error), param="id", code="consent_not_found") from None


async def _spread(service: Service) -> None:
    """Tells every engine at once; other ingresses follow within a second or two."""
    await asyncio.to_thread(service.withheld.refresh)
    await service.engines.withhold(service.withheld.names)
