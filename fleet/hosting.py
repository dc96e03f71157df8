"""The app of a fleet: serving's, with the calls about training."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from fleet.board import Board
from fleet.captions import CaptionDesk
from fleet.config import FleetSpec
from fleet.http import admin, captions, checkpoints, demo, events, files, jobs, runs, samples, usage
from fleet.http.context import FleetContext
from fleet.submitting import SubmissionDesk
from serving.engine.request import Event, FinishedPicture, GenerateRequest
from serving.http.app import Extension, create_app, open_keys
from serving.http.library import Library
from serving.http.service import Engines, Generate
from serving.marking.marks import Marks
from training.run.usage import UsageBook, What

ROOMS = (files, captions, jobs, runs, events, samples, checkpoints, demo, usage, admin)


def make_fleet_app(
    spec: FleetSpec,
    generate: Generate,
    engines: Engines,
    library: Library,
    *,
    wake: Callable[[], None] = lambda: None,
    book: UsageBook | None = None,
) -> FastAPI:
    """The app. `wake` lets a driver in this process look at once; `book` is where its usage is counted."""
    storage = library.registry.storage
    board = Board(storage, wake)
    desk = SubmissionDesk(storage, library.outline, library.base_hash, spec, board)
    fleet = FleetContext(desk, board, library.registry, book or UsageBook(storage), spec, CaptionDesk(spec.captions))
    extension = Extension(
        routers=tuple(room.router for room in ROOMS),
        state={"fleet": fleet},
        uploads={"/v1/files": spec.limits.file_bytes, "/v1/runs": spec.limits.file_bytes},
        metrics=lambda: _gauges(board),
    )
    counted = CountedPictures(generate, fleet.usage)
    marks = Marks(spec.server.marks, storage)
    return create_app(counted, engines, library, spec.server, open_keys(spec.server.keys), marks, extension)


def _gauges(board: Board) -> bytes:
    """How the fleet stands, in Prometheus' text format; nothing of it grows with tenants."""
    standing = board.standing()
    lanes = standing.lanes if board.is_fresh(standing) else ()
    registry = CollectorRegistry()
    values = {
        "lanes": ("lanes that are open", len(lanes)),
        "training": ("subjects in packs", sum(len(lane.subjects) for lane in lanes)),
        "waiting": ("subjects that wait for a lane", len(standing.waiting) if board.is_fresh(standing) else 0),
        "images_per_second": ("images that are trained on, all lanes", sum(lane.images_per_second for lane in lanes)),
    }
    for name, (about, value) in values.items():
        Gauge(f"dreamfleet_fleet_{name}", about, registry=registry).set(value)
    return generate_latest(registry)


class CountedPictures:
    """A `Generate` that counts the pictures of each tenant: for each adapter of a mix its part."""

    def __init__(self, generate: Generate, book: UsageBook) -> None:
        self._generate = generate
        self._book = book

    async def __call__(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """The events of a request."""
        names = [use.ref.id for use in request.adapters] or [""]
        events = self._generate(request)
        try:
            async for event in events:
                if isinstance(event, FinishedPicture):
                    steps = request.width * request.height * request.steps
                    part: dict[What, float] = {"images": 1 / len(names), "pixel_steps": steps / len(names)}
                    for name in names:
                        self._book.add(request.tenant, name, part)
                yield event
        finally:
            if isinstance(events, AsyncGenerator):
                await events.aclose()
