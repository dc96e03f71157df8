"""`POST /v1/images/edits`: OpenAI's call to redraw a part of a picture, or to draw by reference pictures."""

import asyncio
import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BeforeValidator, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from serving.config import Limits
from serving.engine.pictures.codec import has_alpha, measure
from serving.engine.request import EditMask, GenerateRequest
from serving.errors import Refused
from serving.http.images import ERRORS, STREAM, respond
from serving.http.intake import Intake
from serving.http.problems import ApiError
from serving.http.service import request_id, service_of
from serving.http.wire import MAX_NAME, ImagesAnswer, ImagesBody, WornAdapter, from_json

router = APIRouter(tags=["images"])
MAX_FILES, MAX_FIELDS = 20, 60
PICTURES = ("image", "image[]")


class EditsBody(ImagesBody):
    """The fields of the form beside its files. `adapters` and `hires` are written as JSON."""

    adapters: Annotated[tuple[WornAdapter, ...] | None, BeforeValidator(from_json)] = None
    input_fidelity: Annotated[str | None, Field(max_length=MAX_NAME)] = None  # known to OpenAI's models only
    feather: int | None = Field(None, ge=0, le=64, description="pixels over which the edit fades in inside the mask")
    only_masked: bool | None = Field(None, description="draws the part around the mask, at `size`")
    padding: int | None = Field(None, ge=0, le=1024, description="pixels around the mask, with `only_masked`")
    fill: str | None = Field(None, pattern="^(original|fill|noise|nothing)$", max_length=8)


def _schema() -> dict[str, Any]:
    """The form as the OpenAPI document has it."""
    schema = EditsBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    schema.pop("examples", None)
    file = {"type": "string", "format": "binary"}
    schema["properties"] |= {
        "image": {**file, "description": "the picture; its transparent part is redrawn where there is no mask"},
        "image[]": {"type": "array", "items": file, "description": "pictures that the prompt refers to"},
        "mask": {**file, "description": "of the picture's size; its transparent part is redrawn"},
        "adapters": {"type": "string", "description": "as in generations, written as JSON"},
        "hires": {"type": "string", "description": "not with a mask"},
    }
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


@router.post(
    "/v1/images/edits",
    response_model=ImagesAnswer,
    responses={200: {"content": STREAM, "description": "the images, or their events with `stream`"}, **ERRORS},
    openapi_extra={"requestBody": _schema()},
)
async def edit_images(
    request: Request,
    idempotency_key: Annotated[
        str | None, Header(max_length=255, description="a request with the same key is made once")
    ] = None,
) -> Response:
    """Redraws the transparent part of a picture or mask; or draws by reference pictures, where the base does."""
    service = service_of(request)
    tenant = service.tenant(request)
    async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
        body = _body(form)
        pictures = [await _read(file, name) for name, file in form.multi_items() if name in PICTURES]
        mask = await _read(form["mask"], "mask") if "mask" in form else None
    wanted = await asyncio.to_thread(edit_request, service.intake, tenant, body, pictures, mask, request_id(request))
    digest = hashlib.sha256(body.model_dump_json().encode())
    for data in (*pictures, mask or b""):
        digest.update(hashlib.sha256(data).digest())
    return await respond(request, service, wanted, body, idempotency_key, digest.hexdigest(), "image_edit")


def edit_request(
    intake: Intake, tenant: str, body: EditsBody, pictures: list[bytes], mask: bytes | None, request_id: str
) -> GenerateRequest:
    """The engine's request of an edit. Raises ApiError."""
    facts, base = intake.facts, intake.library.base
    if not pictures:
        raise ApiError(400, "'image' is missing.", param="image", code="missing_required_parameter")
    if len(pictures) > max(1, facts.references):
        allowed = (
            f"base '{base}' takes up to {facts.references} reference pictures"
            if facts.references
            else f"base '{base}' draws without reference pictures. Send one picture, with a mask"
        )
        raise ApiError(400, f"There are {len(pictures)} pictures; {allowed}.", param="image")
    try:
        size, *_ = [measure(data, "picture") for data in pictures]
        masked = mask is not None or not facts.references or has_alpha(pictures[0])
    except Refused as error:
        raise ApiError(400, str(error), param="image") from None
    own_size = body.size in (None, "auto")
    native = masked and (own_size or bool(body.only_masked))
    if masked and body.hires is not None:
        raise ApiError(400, "'hires' is for pictures that are drawn as a whole. Leave it out.", param="hires")
    if native:
        check_native(intake.spec.limits, size, body.n or 1, "image")
    if own_size:
        width, height = working_size(size, facts.resolution, facts.multiple_px)
        body = body.model_copy(update={"size": f"{width}x{height}"})
    wanted = intake.images(tenant, body, request_id)
    if not masked:
        return wanted.model_copy(update={"references": tuple(pictures)})
    feather = facts.cell_px // 2 if body.feather is None else body.feather
    asked = EditMask(
        data=mask,
        required=not facts.references,
        feather_px=feather,
        fill=body.fill or "original",  # type: ignore[arg-type]
        only_masked=bool(body.only_masked),
        padding_px=32 if body.padding is None else body.padding,
        keep_size=native,
    )
    references = tuple(pictures) if facts.references else ()
    changes = {"image": pictures[0], "mask": asked, "strength": body.strength or 1.0, "references": references}
    return wanted.model_copy(update=changes)


def working_size(size: tuple[int, int], resolution: int, multiple_px: int) -> tuple[int, int]:
    """The size at which a picture of `size` is drawn on a base: its own, or in its shape with the base's pixels."""
    area = size[0] * size[1]
    if resolution**2 / 2 <= area <= 2 * resolution**2 and not any(side % multiple_px for side in size):
        return size
    scale = (resolution**2 / area) ** 0.5
    width, height = (max(1, round(side * scale / multiple_px)) * multiple_px for side in size)
    return width, height


def check_native(limits: Limits, size: tuple[int, int], count: int, param: str) -> None:
    """Raises ApiError for a picture that is edited in its own size, if that is more than a request may make."""
    if max(size) > limits.side_px or size[0] * size[1] * count > limits.pixels:
        raise ApiError(
            400,
            f"The picture has {size[0]}x{size[1]} px, and the edited one has as many; a request may make up to "
            f"{limits.side_px} px a side and {limits.pixels} pixels in all. Send a smaller one, or say its 'size'.",
            param=param,
        )


def _body(form: FormData) -> EditsBody:
    """The fields of a form. Raises RequestValidationError, ApiError."""
    fields: dict[str, object] = {}
    for name, value in form.multi_items():
        if name in (*PICTURES, "mask"):
            continue
        if isinstance(value, UploadFile):
            raise ApiError(
                400, f"'{name[:80]}' is sent as a file. Files are 'image', 'image[]' and 'mask'.", param=name
            )
        fields[name] = value
    try:
        return EditsBody.model_validate(fields)
    except ValidationError as error:
        told = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_context=False)]
        raise RequestValidationError(told) from None


async def _read(value: UploadFile | str, name: str) -> bytes:
    if isinstance(value, str):
        raise ApiError(400, f"'{name}' must be a file of the form.", param=name)
    return await value.read()
