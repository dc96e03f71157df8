"""`/v1/fine_tuning/jobs`: OpenAI's fine-tuning calls, one job a subject."""

import asyncio

from fastapi import APIRouter, Request

from fleet.board import Submitted
from fleet.http.bodies import JobBody
from fleet.http.context import FleetContext, check_admin, fleet_of, look_at
from fleet.http.params import After, JobId, Limit
from fleet.http.wire import JobInfo, JobPage
from fleet.showing import job_info
from serving.http.images import ERRORS
from serving.http.once import Once
from serving.http.problems import ApiError
from serving.http.service import service_of
from training.run.accepted import Order, Verb

router = APIRouter(tags=["training"])


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
    return JobPage.of(data, more, lambda one: one.id)


@router.get("/v1/fine_tuning/jobs/{id}", responses=ERRORS)
async def show_job(request: Request, id: JobId) -> JobInfo:
    """One job of the caller."""
    return await _shown(fleet_of(request), await look_at(request, "job", id))


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


async def _ask(request: Request, id: str, verb: Verb) -> JobInfo:
    fleet, look = fleet_of(request), await look_at(request, "job", id)
    if verb != "retry" and look.ended:
        raise ApiError(
            409, f"Job '{id}' has ended: it {look.subjects[0].state}. There is nothing to {verb}.", code="job_ended"
        )
    return await _shown(fleet, await asyncio.to_thread(fleet.board.ask, look, verb))


async def _shown(fleet: FleetContext, look: Submitted) -> JobInfo:
    return job_info(look, await asyncio.to_thread(fleet.board.standing))
