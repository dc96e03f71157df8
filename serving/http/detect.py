"""`POST /v1/detect`: whether pictures were made here. Free and without a key; whose they are is for their owners."""

from typing import Annotated

from fastapi import APIRouter, File, Query, Request, UploadFile
from pydantic import BaseModel, Field

from serving.http.detection import Detected, Detector
from serving.http.images import ERRORS
from serving.http.problems import ApiError
from serving.http.service import Service, service_of
from serving.marking.serials import Issued

router = APIRouter(tags=["provenance"])
MOST = 8


class DetectedPicture(BaseModel):
    """What is known about one picture. The last fields are for the tenant that made it, and for the operator."""

    file: str
    made_here: bool
    false_positive: float = Field(description="how likely an unmarked picture reads as clearly")
    c2pa: str = Field(description="valid, invalid or none: the signed manifest in the file")
    signer: str | None = Field(default=None, description="who signed the manifest")
    adapter: str | None = Field(default=None, description="`<tenant>/<id>`, the first one worn")
    adapters: list[str] | None = Field(default=None, description="`<tenant>/<id>@<version>` of all")
    tenant: str | None = None
    request: str | None = None
    time: str | None = None


class DetectAnswer(BaseModel):
    """One entry for each picture, in order."""

    images: list[DetectedPicture]


@router.post("/v1/detect", responses=ERRORS)
async def detect(
    request: Request,
    image: Annotated[list[UploadFile], File(description="PNG, JPEG or WebP files")],
    thorough: Annotated[bool, Query(description="also suppose that parts were cut off; needs a key")] = False,
) -> DetectAnswer:
    """Reads manifest and noise of pictures."""
    service = service_of(request)
    caller = service.caller(request)
    if thorough and caller is None:
        raise ApiError(401, "'thorough' takes long: send 'Authorization: Bearer <key>'.", code="invalid_api_key")
    if len(image) > MOST:
        raise ApiError(400, f"{len(image)} pictures sent; at most {MOST} are looked at in a call.", param="image")
    detector = detector_of(service)
    found = []
    for one in image:
        with service.looks.one(caller.tenant if caller else address_of(request)):
            name = one.filename or "picture"
            detected = await detector.detect(await one.read(), name, thorough=thorough)
            found.append(shown(name, detected, [one for one in detected.records if service.may_know(caller, one)]))
    return DetectAnswer(images=found)


def shown(name: str, detected: Detected, records: list[Issued]) -> DetectedPicture:
    """A picture as somebody may see it who may see these of its records."""
    told = DetectedPicture(
        file=name,
        made_here=detected.made_here,
        false_positive=detected.false_positive,
        c2pa=detected.c2pa,
        signer=detected.signer,
    )
    if not records:
        return told
    record = records[0]
    names = [f"{worn.tenant}/{worn.id}" for worn in record.adapters]
    return told.model_copy(
        update={
            "adapter": names[0] if names else None,
            "adapters": [f"{name}@{worn.version}" for name, worn in zip(names, record.adapters, strict=True)],
            "tenant": record.tenant,
            "request": record.request,
            "time": record.time,
        }
    )


def detector_of(service: Service) -> Detector:
    """The detector of a server. Raises ApiError if it keeps no marks at all."""
    if service.marks is None:
        raise ApiError(404, "This server marks no pictures, so it can tell nothing about any.", code="no_marks")
    return Detector(
        engines=service.engines,
        facts=service.intake.facts,
        serials=service.marks.serials,
        most_px=service.intake.spec.limits.side_px,
        reads=service.marks.noise is not None,
        pixels=service.marks.pixels,
    )


def address_of(request: Request) -> str:
    """Who calls without a key, as limits count it."""
    return f"address {request.client.host}" if request.client else "address unknown"
