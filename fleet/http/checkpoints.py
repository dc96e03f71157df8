"""The steps of a subject that are kept, of a job or of a run: listed with their scores, published, made current."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Request

from fleet.board import Submitted
from fleet.http.context import fleet_of, look_at
from fleet.http.params import After, JobId, Limit, RunId, SubjectId
from fleet.http.wire import CheckpointInfo, CheckpointPage
from fleet.showing import checkpoints_of
from serving.http.images import ERRORS
from serving.http.paging import following
from serving.http.problems import ApiError
from training.errors import UserError
from training.run.home import Home
from training.run.run import SubjectRecord
from training.storage.registry import Registry

router = APIRouter(tags=["training"])
JOB, RUN = "/v1/fine_tuning/jobs/{id}/checkpoints", "/v1/runs/{id}/subjects/{subject}/checkpoints"
CheckpointId = Annotated[str, Path(pattern=r"^ftckpt-[0-9]{8}$", max_length=20)]


@router.get(JOB, responses=ERRORS)
async def list_checkpoints(request: Request, id: JobId, after: After = None, limit: Limit = 10) -> CheckpointPage:
    """The steps of a job, each with its scores, the latest first; `kept` says whether the weights are there."""
    look = await look_at(request, "job", id)
    return await asyncio.to_thread(_page, look, look.subjects[0], fleet_of(request).registry, after, limit)


@router.post(f"{JOB}/{{checkpoint}}/publish", responses=ERRORS)
async def publish_job_checkpoint(request: Request, id: JobId, checkpoint: CheckpointId) -> CheckpointInfo:
    """Makes a checkpoint of a job that has succeeded a version, beside the one that is served: it can be drawn with."""
    look = await look_at(request, "job", id)
    return await asyncio.to_thread(_publish, look, look.subjects[0], fleet_of(request).registry, checkpoint, True)


@router.post(f"{JOB}/{{checkpoint}}/current", responses=ERRORS)
async def choose_checkpoint(request: Request, id: JobId, checkpoint: CheckpointId) -> CheckpointInfo:
    """Makes a checkpoint of a job that has succeeded the version that is served."""
    look = await look_at(request, "job", id)
    return await asyncio.to_thread(_publish, look, look.subjects[0], fleet_of(request).registry, checkpoint, False)


@router.get(RUN, responses=ERRORS)
async def list_subject_checkpoints(
    request: Request, id: RunId, subject: SubjectId, after: After = None, limit: Limit = 10
) -> CheckpointPage:
    """The steps of a run's subject, each with its scores, the latest first."""
    look = await look_at(request, "run", id)
    return await asyncio.to_thread(_page, look, look.subject(subject), fleet_of(request).registry, after, limit)


@router.post(f"{RUN}/{{checkpoint}}/publish", responses=ERRORS)
async def publish_subject_checkpoint(
    request: Request, id: RunId, subject: SubjectId, checkpoint: CheckpointId
) -> CheckpointInfo:
    """Makes a checkpoint of a run's subject a version, beside the one that is served."""
    look = await look_at(request, "run", id)
    registry = fleet_of(request).registry
    return await asyncio.to_thread(_publish, look, look.subject(subject), registry, checkpoint, True)


@router.post(f"{RUN}/{{checkpoint}}/current", responses=ERRORS)
async def choose_subject_checkpoint(
    request: Request, id: RunId, subject: SubjectId, checkpoint: CheckpointId
) -> CheckpointInfo:
    """Makes a checkpoint of a run's subject the version that is served."""
    look = await look_at(request, "run", id)
    registry = fleet_of(request).registry
    return await asyncio.to_thread(_publish, look, look.subject(subject), registry, checkpoint, False)


def _page(look: Submitted, subject: SubjectRecord, registry: Registry, after: str | None, limit: int) -> CheckpointPage:
    found = following(checkpoints_of(look, subject, registry), after, lambda one: one.id, "checkpoint")
    return CheckpointPage.of(found[:limit], len(found) > limit, lambda one: one.id)


def _publish(look: Submitted, subject: SubjectRecord, registry: Registry, id: str, aside: bool) -> CheckpointInfo:
    """The checkpoint, published; made current unless it is `aside`. Raises ApiError."""
    known = {one.id: one for one in checkpoints_of(look, subject, registry)}
    if id not in known:
        raise ApiError(404, f"No checkpoint '{id}'.", code="checkpoint_not_found")
    if subject.version is None:
        raise ApiError(409, f"'{subject.id}' has published nothing yet. Wait until it has.", code="job_not_done")
    from training.trainer.worker.publish import publish_checkpoint

    spec = next(one for one in look.record.manifest.subjects if one.id == subject.id)
    home = Home(look.store, look.order.tenant)
    try:
        publish_checkpoint(home, spec, subject.version, known[id].step_number, aside=aside)
    except UserError as error:
        raise ApiError(409, str(error), code="checkpoint_removed") from None
    return next(one for one in checkpoints_of(look, subject, registry) if one.id == id)
