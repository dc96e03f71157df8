"""`/v1/files`: archives of photos, checked at once."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, File, Form, Path, Query, Request, UploadFile
from fastapi.responses import Response

from fleet.files import StoredFile
from fleet.http.context import fleet_of
from fleet.http.wire import FileDeleted, FileInfo, FilePage, FileProblem, FileSubject, FileWarning
from serving.http.images import ERRORS
from serving.http.once import Once
from serving.http.paging import following
from serving.http.problems import ApiError
from serving.http.service import service_of

router = APIRouter(tags=["training"])
FileId = Annotated[str, Path(max_length=100)]


@router.post("/v1/files", responses=ERRORS)
async def upload_file(
    request: Request,
    file: Annotated[UploadFile, File(description="a zip or tar of photos, with captions; a folder for each subject")],
    purpose: Annotated[Literal["fine-tune"], Form(description="what it is for")] = "fine-tune",
    idempotency_key: Once = None,
) -> FileInfo:
    """Keeps an archive of photos. Each photo is checked at once; `subjects` says what was found."""
    fleet, tenant = fleet_of(request), service_of(request).tenant(request)
    data = await file.read()
    name = (file.filename or "photos.zip")[:200]
    return _shown(await asyncio.to_thread(fleet.desk.files.add, tenant, name, data, idempotency_key))


@router.get("/v1/files", responses=ERRORS)
async def list_files(
    request: Request,
    after: Annotated[str | None, Query(max_length=100, description="the last of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    purpose: Annotated[str | None, Query(max_length=40)] = None,
    order: Annotated[Literal["desc", "asc"], Query()] = "desc",
) -> FilePage:
    """The caller's files, the latest first."""
    files, tenant = fleet_of(request).desk.files, service_of(request).tenant(request)
    ids = await asyncio.to_thread(files.list, tenant)
    ids = ids if order == "desc" else ids[::-1]
    if purpose not in (None, "fine-tune"):
        ids = []
    ids = list(following(ids, after, str, "file"))
    data: list[FileInfo] = []
    for id in ids[:limit]:
        try:
            data.append(_shown(await asyncio.to_thread(files.get, tenant, id)))
        except ApiError:  # it is being uploaded, or deleted
            continue
    return FilePage.of(data, len(ids) > limit, lambda one: one.id)


@router.get("/v1/files/{id}", responses=ERRORS)
async def show_file(request: Request, id: FileId) -> FileInfo:
    """One file of the caller, with what was found in it."""
    files, tenant = fleet_of(request).desk.files, service_of(request).tenant(request)
    return _shown(await asyncio.to_thread(files.get, tenant, id))


@router.get(
    "/v1/files/{id}/content",
    response_class=Response,
    responses={200: {"content": {"application/zip": {}}, "description": "a zip"}, **ERRORS},
)
async def download_content(request: Request, id: FileId) -> Response:
    """The photos and captions of a file of the caller, as a zip."""
    files, tenant = fleet_of(request).desk.files, service_of(request).tenant(request)
    data = await asyncio.to_thread(files.content, tenant, id)
    headers = {"Content-Disposition": f'attachment; filename="{id}.zip"', "X-Content-Type-Options": "nosniff"}
    return Response(data, media_type="application/zip", headers=headers)


@router.delete("/v1/files/{id}", responses=ERRORS)
async def delete_file(request: Request, id: FileId) -> FileDeleted:
    """Deletes a file of the caller, unless a subject that has not ended trains on it."""
    files, tenant = fleet_of(request).desk.files, service_of(request).tenant(request)
    await asyncio.to_thread(files.delete, tenant, id)
    return FileDeleted(id=id)


def _shown(file: StoredFile) -> FileInfo:
    subjects = [
        FileSubject(
            folder=one.folder,
            images=f"{file.id}/{one.folder}" if one.folder else file.id,
            photos=one.photos,
            captions=one.captions,
            problems=[FileProblem.model_validate(bad.model_dump()) for bad in one.problems],
            warnings=[FileWarning.model_validate(warned.model_dump()) for warned in one.warnings],
            error=one.error,
        )
        for one in file.subjects
    ]
    unusable = [f"{one.folder or file.filename}: {one.error}" for one in file.subjects if one.error]
    return FileInfo(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created),
        filename=file.filename,
        purpose=file.purpose,
        status="processed",
        status_details=" ".join(unusable) or None,
        subjects=subjects,
        unchecked=list(file.unchecked),
    )
