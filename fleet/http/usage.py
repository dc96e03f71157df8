"""`/v1/usage`, `/v1/fleet` and `/v1/me`: what the caller has used, how the fleet stands and what it asks for, who
calls."""

import asyncio
from datetime import UTC, date, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query, Request

from fleet.http.account import CallerInfo, ConsentRules, FleetInfo, LaneInfo, UsageInfo, UsageLine
from fleet.http.context import FleetContext, fleet_of, key_of
from serving.http.access.tenants import SCOPES
from serving.http.images import ERRORS
from serving.http.problems import ApiError
from serving.http.service import service_of
from training.manifest.consent import PERSONS, require_consent
from training.run.accepted import read_order
from training.run.standing import Standing
from training.run.usage import read_usage

router = APIRouter(tags=["operation"])
MOST_DAYS = 400
Day = Annotated[date | None, Query(description="a day, UTC: 2026-11-24")]
KINDS = ("images", "pixel_steps", "training_steps", "device_seconds")


@router.get("/v1/usage", responses=ERRORS)
async def show_usage(request: Request, since: Day = None, until: Day = None) -> UsageInfo:
    """What the caller's tenant has used by day and adapter, of the last 30 days by default."""
    fleet, tenant = fleet_of(request), service_of(request).tenant(request)
    until = until or datetime.now(UTC).date()
    since = since or until - timedelta(days=29)
    if since > until or (until - since).days > MOST_DAYS:
        raise ApiError(400, f"{since} to {until}: give up to {MOST_DAYS} days, the earlier first.", param="since")
    return await asyncio.to_thread(_usage, fleet, tenant, str(since), str(until))


@router.get("/v1/fleet", responses=ERRORS)
async def show_fleet(request: Request) -> FleetInfo:
    """The lanes and the queue, as the caller may see them: its own subjects by name, others as a number."""
    fleet, tenant = fleet_of(request), service_of(request).tenant(request)
    standing = await asyncio.to_thread(fleet.board.standing)
    return await asyncio.to_thread(_standing, fleet, tenant, standing)


@router.get("/v1/fleet/consent", responses=ERRORS)
async def show_consent_rules(request: Request) -> ConsentRules:
    """Which subjects this fleet trains with a consent only."""
    service_of(request).tenant(request)
    return ConsentRules(policy=require_consent(), persons=sorted(PERSONS))


@router.get("/v1/me", responses=ERRORS)
async def show_caller(request: Request) -> CallerInfo:
    """The caller's tenant, and what its key is good for."""
    tenant, key = service_of(request).tenant(request), key_of(request)
    scopes = list(SCOPES if key is None else key.scopes)
    return CallerInfo(tenant=tenant, scopes=[*scopes], key=key.name if key else None, keys=key is not None)


def _usage(fleet: FleetContext, tenant: str, since: str, until: str) -> UsageInfo:
    fleet.usage.flush()
    found = read_usage(fleet.board.storage, tenant, since, until)
    lines = [
        UsageLine(day=day, adapter=adapter, **{kind: round(counts.get(kind, 0.0), 3) for kind in KINDS})
        for day, adapters in sorted(found.items())
        for adapter, counts in sorted(adapters.items())
    ]
    total = {kind: round(sum(getattr(line, kind) for line in lines), 3) for kind in KINDS}
    stored = {"adapters": fleet.registry.usage(tenant).bytes, "files": fleet.desk.files.bytes(tenant)}
    return UsageInfo(tenant=tenant, since=since, until=until, data=lines, total=total, stored_bytes=stored)


def _standing(fleet: FleetContext, tenant: str, standing: Standing) -> FleetInfo:
    keys = {key for lane in standing.lanes for key in lane.subjects} | set(standing.waiting)
    runs = {key.partition("/")[0] for key in keys}
    mine = {run for run in runs if (order := read_order(fleet.board.storage, run)) and order.tenant == tenant}
    fresh = fleet.board.is_fresh(standing)
    lanes = [
        LaneInfo(
            lane=lane.lane,
            images_per_second=lane.images_per_second,
            subjects=[
                {"run": key.partition("/")[0], "id": key.partition("/")[2], "doing": doing}
                for key, doing in lane.subjects.items()
                if key.partition("/")[0] in mine
            ],
            others=sum(key.partition("/")[0] not in mine for key in lane.subjects),
        )
        for lane in standing.lanes
        if fresh
    ]
    waiting = standing.waiting if fresh else ()
    return FleetInfo(
        base=fleet.desk.name,
        driven=fresh,
        lanes=lanes,
        waiting=len(waiting),
        waiting_mine=sum(key.partition("/")[0] in mine for key in waiting),
    )
