"""The pictures that were drawn while a subject trained (`train.sample_every`), of a job or of a run."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from fleet.board import Submitted
from fleet.http.context import look_at
from fleet.http.params import JobId, RunId, SubjectId
from fleet.http.wire import SamplePage
from fleet.showing import sample, samples_of
from serving.http.images import ERRORS
from training.run.run import SubjectRecord

router = APIRouter(tags=["training"])
JOB, RUN = "/v1/fine_tuning/jobs/{id}/samples", "/v1/runs/{id}/subjects/{subject}/samples"
PICTURE = {200: {"content": {"image/png": {}}, "description": "the picture"}, **ERRORS}
SampleName = Annotated[str, Path(max_length=60)]


@router.get(JOB, responses=ERRORS)
async def list_samples(request: Request, id: JobId) -> SamplePage:
    """The pictures that were drawn while a job trained."""
    look = await look_at(request, "job", id)
    return await _listed(look, look.subjects[0], JOB.format(id=id))


@router.get(f"{JOB}/{{name}}", response_class=Response, responses=PICTURE)
async def show_sample(request: Request, id: JobId, name: SampleName) -> Response:
    """One of these pictures."""
    look = await look_at(request, "job", id)
    return await _picture(look, look.subjects[0], name)


@router.get(RUN, responses=ERRORS)
async def list_subject_samples(request: Request, id: RunId, subject: SubjectId) -> SamplePage:
    """The pictures that were drawn while a subject of a run trained."""
    look = await look_at(request, "run", id)
    return await _listed(look, look.subject(subject), RUN.format(id=id, subject=subject))


@router.get(f"{RUN}/{{name}}", response_class=Response, responses=PICTURE)
async def show_subject_sample(request: Request, id: RunId, subject: SubjectId, name: SampleName) -> Response:
    """One of these pictures."""
    look = await look_at(request, "run", id)
    return await _picture(look, look.subject(subject), name)


async def _listed(look: Submitted, subject: SubjectRecord, path: str) -> SamplePage:
    return SamplePage(data=await asyncio.to_thread(samples_of, look, subject, path))


async def _picture(look: Submitted, subject: SubjectRecord, name: str) -> Response:
    data = await asyncio.to_thread(sample, look, subject, name)
    return Response(data, media_type="image/png", headers={"X-Content-Type-Options": "nosniff"})
