"""What the routes of the fleet share: its desk and board."""

import asyncio
from dataclasses import dataclass

from fastapi import Request

from fleet.board import Board, Submitted
from fleet.captions import CaptionDesk
from fleet.config import FleetSpec
from fleet.submitting import SubmissionDesk
from serving.http.access.tenants import Key
from serving.http.service import service_of
from training.run.accepted import RunKind
from training.run.usage import UsageBook
from training.storage.registry import Registry


@dataclass(frozen=True)
class FleetContext:
    """Everything a route of the fleet works with. `usage` counts what this process draws."""

    desk: SubmissionDesk
    board: Board
    registry: Registry
    usage: UsageBook
    spec: FleetSpec
    captions: CaptionDesk


def fleet_of(request: Request) -> FleetContext:
    """The fleet of the app that handles `request`."""
    fleet: FleetContext = request.app.state.fleet
    return fleet


def key_of(request: Request) -> Key | None:
    """The caller's key; None on a server without keys."""
    return service_of(request).key(request)


def check_admin(request: Request) -> None:
    """Raises ApiError 403 unless the caller may do an admin's work; on a server without keys everybody may."""
    service_of(request).tenant(request, "admin")


async def look_at(request: Request, kind: RunKind, id: str) -> Submitted:
    """A job or run of the caller. Raises ApiError 404."""
    fleet, tenant = fleet_of(request), service_of(request).tenant(request)
    return await asyncio.to_thread(fleet.board.look, tenant, id, kind)
