"""What the routes of the fleet share: its desk and board."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import StreamingResponse

from fleet.board import Board, Submitted
from fleet.captions import CaptionDesk
from fleet.config import FleetSpec
from fleet.http.wire import EventInfo, EventPage
from fleet.showing import events_of
from fleet.submitting import SubmissionDesk
from serving.http.access.tenants import Key
from serving.http.problems import ApiError
from serving.http.service import service_of
from training.run.usage import UsageBook
from training.storage.registry import Registry

POLL_S = 0.5
KEEP_ALIVE_S = 10.0


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


def wants_stream(request: Request) -> bool:
    """Whether the caller asks for server-sent events, as a browser's EventSource does."""
    return "text/event-stream" in request.headers.get("accept", "")


def event_page(look: Submitted, after: str | None, limit: int, subject: str | None = None) -> EventPage:
    """A page of events, the latest first. Raises ApiError 404 for an `after` that is no event of it."""
    events = events_of(look, subject)[::-1]
    if after is not None:
        ids = [event.id for event in events]
        if after not in ids:
            raise ApiError(404, f"No event '{after}'.", param="after", code="event_not_found")
        events = events[ids.index(after) + 1 :]
    return EventPage(data=events[:limit], has_more=len(events) > limit)


def event_stream(request: Request, again: Callable[[], Submitted], subject: str | None = None) -> StreamingResponse:
    """Server-sent events: what has happened, then what happens, until the run has ended. `Last-Event-ID` goes on."""
    last = request.headers.get("last-event-id")

    async def events() -> AsyncIterator[bytes]:
        seen, silent = last, 0.0
        while True:
            look = await asyncio.to_thread(again)
            found = await asyncio.to_thread(events_of, look, subject)
            ids = [event.id for event in found]
            fresh = found[ids.index(seen) + 1 :] if seen in ids else found
            for event in fresh:
                yield _sse(event)
                seen = event.id
            if look.ended and not fresh:
                yield b"data: [DONE]\n\n"
                return
            silent = 0.0 if fresh else silent + POLL_S
            if silent >= KEEP_ALIVE_S:
                silent = 0.0
                yield b": still there\n\n"
            await asyncio.sleep(POLL_S)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _sse(event: EventInfo) -> bytes:
    return f"id: {event.id}\nevent: {event.object}\ndata: {json.dumps(event.model_dump())}\n\n".encode()
