"""`/v1/runs`: a whole manifest at once."""

import asyncio
import json

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from fleet.http.bodies import RunBody
from fleet.http.context import check_admin, fleet_of, look_at
from fleet.http.params import After, Limit, RunId, SubjectId
from fleet.http.wire import RunInfo, RunPage, RunSubject, RunSubjects
from fleet.manifests import values_of
from fleet.showing import run_info, run_subject
from serving.http.images import ERRORS
from serving.http.once import Once
from serving.http.problems import ApiError
from serving.http.service import service_of
from training.run.accepted import Verb

router = APIRouter(tags=["training"])
_YAML = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")
_SCHEMA = RunBody.model_json_schema(ref_template="#/components/schemas/{model}")
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {name: part for name, part in _SCHEMA.items() if name != "$defs"}},
            "application/yaml": {"schema": {"type": "string", "description": "the manifest's YAML file"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["manifest"],
                    "properties": {
                        "manifest": {"type": "string", "description": "the manifest, YAML or JSON"},
                        "photos": {
                            "type": "string",
                            "format": "binary",
                            "description": "a zip or tar with a folder for each subject, named as its `images` or id",
                        },
                    },
                }
            },
        },
    }
}


@router.post("/v1/runs", responses=ERRORS, openapi_extra=_BODY)
async def create_run(request: Request, idempotency_key: Once = None) -> RunInfo:
    """Submits a manifest, as JSON, YAML or a form with photos; it is on the storage when this is answered."""
    fleet, tenant = fleet_of(request), service_of(request).tenant(request)
    body, photos = await _body(request)
    if body.priority > 0:
        check_admin(request)
    if photos is not None:
        key = None if idempotency_key is None else f"{idempotency_key} photos"
        file = await asyncio.to_thread(fleet.desk.files.add, tenant, "photos", photos, key)
        body = _with_photos(body, file.id, {one.folder for one in file.subjects})
    look = await asyncio.to_thread(fleet.desk.submit_run, tenant, body, idempotency_key)
    return run_info(look, await asyncio.to_thread(fleet.board.standing))


@router.get("/v1/runs", responses=ERRORS)
async def list_runs(request: Request, after: After = None, limit: Limit = 20) -> RunPage:
    """The caller's runs, the latest first."""
    fleet, tenant = fleet_of(request), service_of(request).tenant(request)
    found, more = await asyncio.to_thread(fleet.board.page, tenant, "run", after, limit)
    standing = await asyncio.to_thread(fleet.board.standing)
    data = [run_info(look, standing) for look in found]
    return RunPage.of(data, more, lambda one: one.id)


@router.get("/v1/runs/{id}", responses=ERRORS)
async def show_run(request: Request, id: RunId) -> RunInfo:
    """One run of the caller."""
    look = await look_at(request, "run", id)
    return run_info(look, await asyncio.to_thread(fleet_of(request).board.standing))


@router.get("/v1/runs/{id}/subjects", responses=ERRORS)
async def list_subjects(request: Request, id: RunId) -> RunSubjects:
    """The subjects of a run, in manifest order."""
    look = await look_at(request, "run", id)
    standing = await asyncio.to_thread(fleet_of(request).board.standing)
    return RunSubjects(data=[run_subject(look, subject, standing) for subject in look.subjects])


@router.get("/v1/runs/{id}/subjects/{subject}", responses=ERRORS)
async def show_subject(request: Request, id: RunId, subject: SubjectId) -> RunSubject:
    """One subject of a run."""
    look = await look_at(request, "run", id)
    standing = await asyncio.to_thread(fleet_of(request).board.standing)
    return run_subject(look, look.subject(subject), standing)


@router.post("/v1/runs/{id}/cancel", responses=ERRORS)
async def cancel_run(request: Request, id: RunId) -> RunInfo:
    """Stops all subjects of a run that have not ended."""
    return await _ask(request, id, "cancel")


@router.post("/v1/runs/{id}/retry", responses=ERRORS)
async def retry_run(request: Request, id: RunId) -> RunInfo:
    """Queues the subjects of a run that have failed or were cancelled again."""
    return await _ask(request, id, "retry")


async def _ask(request: Request, id: str, verb: Verb) -> RunInfo:
    fleet, look = fleet_of(request), await look_at(request, "run", id)
    look = await asyncio.to_thread(fleet.board.ask, look, verb)
    return run_info(look, await asyncio.to_thread(fleet.board.standing))


async def _body(request: Request) -> tuple[RunBody, bytes | None]:
    """The body, whatever form it has, and the archive that came with it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form() as form:
            manifest, photos = form.get("manifest"), form.get("photos")
            text = manifest if isinstance(manifest, str) or manifest is None else _text(await manifest.read())
            if photos is not None and isinstance(photos, str):
                raise ApiError(400, "`photos` is an archive: a zip or tar.", param="photos")
            return _parsed({"manifest": text}), await photos.read() if photos is not None else None
    data = await request.body()
    if kind in _YAML:
        return _parsed({"manifest": _text(data)}), None
    try:
        return _parsed(json.loads(data)), None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from None


def _parsed(raw: object) -> RunBody:
    try:
        return RunBody.model_validate(raw)
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ApiError(400, "The manifest is no UTF-8 text.", param="manifest") from None


def _with_photos(body: RunBody, file: str, folders: set[str]) -> RunBody:
    """The manifest with each subject's `images` in the archive that came along: the folder of that name, or its id."""
    raw = values_of(body.manifest)
    subjects = raw.get("subjects") if isinstance(raw, dict) else None
    for subject in subjects if isinstance(subjects, list) else []:
        if isinstance(subject, dict):
            asked = str(subject.get("images", "")).strip("./").replace("/", "-")
            names = [asked, asked.rpartition("-")[2], str(subject.get("id", ""))]
            folder = next((name for name in names if name in folders), None)
            if folder is not None:
                subject["images"] = f"{file}/{folder}"
            elif folders == {""}:
                subject["images"] = file
    return body.model_copy(update={"manifest": raw})
