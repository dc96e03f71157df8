"""`/v1/fine_tuning/jobs`: OpenAI's fine-tuning calls, one job a subject."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response, StreamingResponse

from fleet.board import Submitted
from fleet.http.bodies import JobBody
from fleet.http.context import FleetContext, check_admin, event_page, event_stream, fleet_of, wants_stream
from fleet.http.wire import CheckpointInfo, CheckpointPage, EventPage, JobInfo, JobPage, SamplePage
from fleet.showing import checkpoints_of, job_info, sample, samples_of
from serving.http.images import ERRORS, STREAM
from serving.http.once import Once
from serving.http.problems import ApiError
from serving.http.service import service_of
from training.run.accepted import Order, Verb
from training.run.home import Home

router = APIRouter(tags=["training"])
JobId = Annotated[str, Path(max_length=100)]
After = Annotated[str | None, Query(max_length=100, description="the last of the page before")]
Limit = Annotated[int, Query(ge=1, le=1000)]
STREAMED = {200: {"content": STREAM, "description": "a page, or the events as they come with `stream`"}, **ERRORS}


@router.post("/v1/fine_tuning/jobs", responses=ERRORS)
async def create_job(request: Request, body: JobBody, idempotency_key: Once = None) -> JobInfo:
    """Submits one subject; it is on the storage when this is answered."""
    fleet, tenant = fleet_of(request), service_of(request).tenant(request)
    if body.priority > 0:
        check_admin(request)
    look = await asyncio.to_thread(fleet.desk.submit_job, tenant, body, idempotency_key)
    return await _shown(fleet, look)


@router.get("/v1/fine_tuning/jobs", responses=ERRORS)
async def list_jobs(request: Request, after: After = None, limit: Limit = 20) -> JobPage:
    """The caller's jobs, the latest first. `metadata[key]=value` keeps those that have it."""
    fleet, tenant = fleet_of(request), service_of(request).tenant(request)
    wanted = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[")
    }

    def keep(order: Order) -> bool:
        has = order.about.get("metadata") or {}
        return all(has.get(name) == value for name, value in wanted.items())

    found, more = await asyncio.to_thread(fleet.board.page, tenant, "job", after, limit, keep)
    standing = await asyncio.to_thread(fleet.board.standing)
    data = [job_info(look, standing) for look in found]
    return JobPage(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=more,
    )


@router.get("/v1/fine_tuning/jobs/{id}", responses=ERRORS)
async def show_job(request: Request, id: JobId) -> JobInfo:
    """One job of the caller."""
    return await _shown(fleet_of(request), await _look(request, id))


@router.post("/v1/fine_tuning/jobs/{id}/cancel", responses=ERRORS)
async def cancel_job(request: Request, id: JobId) -> JobInfo:
    """Stops a job of the caller for good."""
    return await _ask(request, id, "cancel")


@router.post("/v1/fine_tuning/jobs/{id}/pause", responses=ERRORS)
async def pause_job(request: Request, id: JobId) -> JobInfo:
    """Stops a job of the caller with a checkpoint, until it is resumed."""
    return await _ask(request, id, "pause")


@router.post("/v1/fine_tuning/jobs/{id}/resume", responses=ERRORS)
async def resume_job(request: Request, id: JobId) -> JobInfo:
    """Lets a paused job go on where it stopped."""
    return await _ask(request, id, "resume")


@router.post("/v1/fine_tuning/jobs/{id}/retry", responses=ERRORS)
async def retry_job(request: Request, id: JobId) -> JobInfo:
    """Queues a job that has failed or was cancelled again."""
    return await _ask(request, id, "retry")


@router.get("/v1/fine_tuning/jobs/{id}/events", responses=STREAMED, response_model=EventPage)
async def list_events(
    request: Request, id: JobId, after: After = None, limit: Limit = 20, stream: bool = False
) -> EventPage | StreamingResponse:
    """What has happened to a job, the latest first; with `stream` from the beginning, and on as it happens."""
    look = await _look(request, id)
    if stream or wants_stream(request):
        board, tenant = fleet_of(request).board, look.order.tenant
        return event_stream(request, lambda: board.look(tenant, id, "job"))
    return await asyncio.to_thread(event_page, look, after, limit)


@router.get("/v1/fine_tuning/jobs/{id}/checkpoints", responses=ERRORS)
async def list_checkpoints(request: Request, id: JobId, after: After = None, limit: Limit = 10) -> CheckpointPage:
    """The steps of a job that are kept, each with its scores, the latest first."""
    fleet, look = fleet_of(request), await _look(request, id)
    found = await asyncio.to_thread(checkpoints_of, look, look.subjects[0], fleet.registry)
    if after is not None:
        ids = [one.id for one in found]
        if after not in ids:
            raise ApiError(404, f"No checkpoint '{after}'.", param="after", code="checkpoint_not_found")
        found = found[ids.index(after) + 1 :]
    data = found[:limit]
    return CheckpointPage(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(found) > limit,
    )


@router.post("/v1/fine_tuning/jobs/{id}/checkpoints/{checkpoint}/current", responses=ERRORS)
async def choose_checkpoint(
    request: Request, id: JobId, checkpoint: Annotated[str, Path(pattern=r"^ftckpt-[0-9]{8}$", max_length=20)]
) -> CheckpointInfo:
    """Makes a checkpoint of a job that has succeeded the version that is served."""
    fleet, look = fleet_of(request), await _look(request, id)
    return await asyncio.to_thread(_choose, fleet, look, checkpoint)


@router.get("/v1/fine_tuning/jobs/{id}/samples", responses=ERRORS)
async def list_samples(request: Request, id: JobId) -> SamplePage:
    """The pictures that were drawn while a job trained (`train.sample_every`)."""
    look = await _look(request, id)
    path = f"/v1/fine_tuning/jobs/{id}/samples"
    return SamplePage(data=await asyncio.to_thread(samples_of, look, look.subjects[0], path))


@router.get(
    "/v1/fine_tuning/jobs/{id}/samples/{name}",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}, "description": "the picture"}, **ERRORS},
)
async def show_sample(request: Request, id: JobId, name: Annotated[str, Path(max_length=60)]) -> Response:
    """One of these pictures."""
    look = await _look(request, id)
    data = await asyncio.to_thread(sample, look, look.subjects[0], name)
    return Response(data, media_type="image/png", headers={"X-Content-Type-Options": "nosniff"})


def _choose(fleet: FleetContext, look: Submitted, checkpoint: str) -> CheckpointInfo:
    subject, spec = look.subjects[0], look.record.manifest.subjects[0]
    known = {one.id for one in checkpoints_of(look, subject, fleet.registry)}
    if checkpoint not in known:
        raise ApiError(404, f"No checkpoint '{checkpoint}'.", code="checkpoint_not_found")
    if subject.version is None:
        raise ApiError(409, "The job has published nothing yet. Wait until it has succeeded.", code="job_not_done")
    from training.trainer.worker.publish import publish_checkpoint

    home = Home(look.store, look.order.tenant)
    publish_checkpoint(home, spec, subject.version, int(checkpoint.removeprefix("ftckpt-")))
    found = checkpoints_of(look, subject, fleet.registry)
    return next(one for one in found if one.id == checkpoint)


async def _look(request: Request, id: str) -> Submitted:
    fleet, tenant = fleet_of(request), service_of(request).tenant(request)
    return await asyncio.to_thread(fleet.board.look, tenant, id, "job")


async def _ask(request: Request, id: str, verb: Verb) -> JobInfo:
    fleet, look = fleet_of(request), await _look(request, id)
    if verb != "retry" and look.ended:
        raise ApiError(
            409, f"Job '{id}' has ended: it {look.subjects[0].state}. There is nothing to {verb}.", code="job_ended"
        )
    return await _shown(fleet, await asyncio.to_thread(fleet.board.ask, look, verb))


async def _shown(fleet: FleetContext, look: Submitted) -> JobInfo:
    return job_info(look, await asyncio.to_thread(fleet.board.standing))
