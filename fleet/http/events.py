"""What has happened to a job or run: page by page, or as server-sent events while it happens."""

import asyncio
import json
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from fleet.board import Submitted
from fleet.http.context import fleet_of, look_at
from fleet.http.params import After, JobId, Limit, RunId
from fleet.http.wire import EventInfo, EventPage
from fleet.showing import events_of
from serving.http.images import ERRORS, STREAM
from serving.http.paging import following
from training.run.accepted import RunKind

router = APIRouter(tags=["training"])
POLL_S = 0.5
KEEP_ALIVE_S = 10.0
STREAMED = {200: {"content": STREAM, "description": "a page, or the events as they come with `stream`"}, **ERRORS}


@router.get("/v1/fine_tuning/jobs/{id}/events", responses=STREAMED, response_model=EventPage)
async def list_events(
    request: Request, id: JobId, after: After = None, limit: Limit = 20, stream: bool = False
) -> EventPage | StreamingResponse:
    """What has happened to a job, the latest first; with `stream` from the beginning, and on as it happens."""
    return await _events(request, "job", id, after, limit, stream)


@router.get("/v1/runs/{id}/events", responses=STREAMED, response_model=EventPage)
async def list_run_events(
    request: Request, id: RunId, after: After = None, limit: Limit = 20, stream: bool = False
) -> EventPage | StreamingResponse:
    """What has happened to a run, the latest first; as server-sent events with `stream` or `Accept`."""
    return await _events(request, "run", id, after, limit, stream)


async def _events(
    request: Request, kind: RunKind, id: str, after: str | None, limit: int, stream: bool
) -> EventPage | StreamingResponse:
    look = await look_at(request, kind, id)
    if stream or "text/event-stream" in request.headers.get("accept", ""):  # as a browser's EventSource asks
        return _stream(request, look)
    return await asyncio.to_thread(_page, look, after, limit)


def _page(look: Submitted, after: str | None, limit: int) -> EventPage:
    """A page of events, the latest first. Raises ApiError 404 for an `after` that is no event of it."""
    events = following(events_of(look)[::-1], after, lambda event: event.id, "event")
    return EventPage.of(events[:limit], len(events) > limit, lambda event: event.id)


def _stream(request: Request, look: Submitted) -> StreamingResponse:
    """Server-sent events: what has happened, then what happens, until the run has ended. `Last-Event-ID` goes on."""
    board, order, last = fleet_of(request).board, look.order, request.headers.get("last-event-id")

    async def events() -> AsyncIterator[bytes]:
        seen, silent = last, 0.0
        while True:
            now = await asyncio.to_thread(board.look, order.tenant, order.run, order.kind)
            found = await asyncio.to_thread(events_of, now)
            ids = [event.id for event in found]
            fresh = found[ids.index(seen) + 1 :] if seen in ids else found
            for event in fresh:
                yield _sse(event)
                seen = event.id
            if now.ended and not fresh:
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
