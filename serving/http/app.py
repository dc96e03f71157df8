"""The HTTP app: the same over a local engine, over Ray's engines and in tests.

Assembles the routes and what is common to all: errors in OpenAI's envelope, request ids, limits of bodies, metrics. Who
may call is checked in `guard.py`, before a body is read.
Knows nothing about tensors, slots or Ray.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.security.http import HTTPBase
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import ServeSpec
from serving.errors import GenerationFailed
from serving.http import (
    adapters as api_adapters,
    consents as api_consents,
    detect as api_detect,
    edits as api_edits,
    exports as api_exports,
    images as api_images,
)
from serving.http.access.guard import UPLOAD, Guard
from serving.http.access.tenants import Keys, Meter, Quota
from serving.http.access.timeouts import BodyTimeout
from serving.http.history import routes as api_history
from serving.http.history.keeping import PictureKeeper
from serving.http.intake import Intake
from serving.http.library import Library
from serving.http.networks import routes as api_networks
from serving.http.pages import add_studio
from serving.http.problems import REQUEST_ID, ApiError, Problem, describe
from serving.http.replies import KeyReused, Replies
from serving.http.sdapi import controlnet, info, reading, routes
from serving.http.service import Engines, Generate, Service, request_id, service_of
from serving.http.wire import ErrorAnswer, Health
from serving.http.withheld import WithheldNames
from serving.marking.marks import Marks
from training.errors import UserError

# `guard.py` checks keys; this declares them in the OpenAPI document, so that /docs can send one
SECURITY = [
    Security(HTTPBase(scheme="bearer", scheme_name="key", description="an API key", auto_error=False)),
    Security(
        HTTPBase(scheme="basic", scheme_name="password", description="any user, the key as password", auto_error=False)
    ),
]
DESCRIPTION = """One base and any number of adapters; each request chooses its own mix.

`POST /v1/images/generations` is OpenAI's images call: name an adapter in `model` (`<base>:<tenant>/<id>`), or mix
several in `adapters`. `/sdapi/v1` is what AUTOMATIC1111's clients call.
"""


@dataclass(frozen=True)
class Extension:
    """Further calls of the app: their routes, what they work with (`app.state.<name>`), how many bytes may be sent to a
    path, where that is more than a body may have, and what `/metrics` shows of them, in Prometheus' text format."""

    routers: Sequence[APIRouter] = ()
    state: Mapping[str, object] = field(default_factory=dict)
    uploads: Mapping[str, int] = field(default_factory=dict)
    metrics: Callable[[], bytes] = bytes


def create_app(
    generate: Generate,
    engines: Engines,
    library: Library,
    spec: ServeSpec,
    keys: Keys | None = None,
    marks: Marks | None = None,
    extension: Extension | None = None,
) -> FastAPI:
    """The app. `generate` makes the events of a request; without `keys`, only this machine may call, as one tenant.

    `marks` puts signed metadata on picture files and keeps records of them; without it they leave as engines made them.
    """
    extension = extension or Extension()
    app = FastAPIOffline(  # a /docs that loads nothing from elsewhere
        redoc_url=None,
        static_url="/docs/static",
        swagger_ui_parameters={"validatorUrl": None},
        title="dreamfleet",
        version="1",
        description=DESCRIPTION,
        responses={
            status: {"model": ErrorAnswer, "description": text}
            for status, text in {
                400: "a field is wrong; `param` names it",
                401: "a server without keys replies to this machine's names only",
                405: "the path allows other methods; see `Allow`",
            }.items()
        },
    )
    app.state.service = Service(
        generate=generate,
        engines=engines,
        intake=Intake(spec, library),
        keys=keys,
        quota=Quota(spec.limits),
        withheld=WithheldNames(library),
        keeper=PictureKeeper(library.registry.storage, spec, library.base, library.base_hash),
        marks=marks,
        looks=Meter("pictures to look at", 4, spec.marks.detect_per_minute),
    )
    app.state.replies = Replies[Response]()
    app.state.under = {}
    app.state.further_metrics = extension.metrics
    app.state.watch = None
    for kind in (ApiError, UserError, GenerationFailed, KeyReused, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _told)
    for name, value in extension.state.items():
        setattr(app.state, name, value)
    own = (api_images.router, api_edits.router, api_history.router, api_exports.router, api_adapters.router)
    beside = (api_networks.router, controlnet.router)
    marked = (api_detect.router, api_consents.router, routes.router, info.router, reading.router)
    for router in (*own, *beside, *marked, *extension.routers):
        app.include_router(router, dependencies=SECURITY)
    app.get("/healthz", tags=["operation"], responses={503: {"model": Health}})(_health)
    app.get("/metrics", tags=["operation"], response_class=Response)(_metrics)
    add_studio(app)
    _add_middleware(app, spec, extension)
    return app


def _add_middleware(app: FastAPI, spec: ServeSpec, extension: Extension) -> None:
    """What every request passes, the last one first."""
    uploads = {UPLOAD: spec.limits.upload_bytes, **extension.uploads}
    app.add_middleware(BodyLimit, usual=spec.limits.body_bytes, uploads=uploads)
    app.add_middleware(BodyTimeout)
    app.add_middleware(Guard, cors=spec.cors)
    if spec.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=spec.cors,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(Observed)


async def _health(request: Request, response: Response) -> Health:
    """Whether a request sent now would be served."""
    service = service_of(request)
    ready = await service.engines.ready()
    response.status_code = 200 if ready else 503
    return Health(status="ok" if ready else "failing", base=service.intake.library.base)


async def _metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service = service_of(request)
    service.metrics.damaged.set(service.intake.library.known.damaged)
    shown = service.metrics.render(await service.engines.stats())
    shown += await asyncio.to_thread(request.app.state.further_metrics)
    return Response(shown, media_type="text/plain; version=0.0.4")


async def _told(request: Request, error: Exception) -> Response:
    problem = describe(error)
    asked = f"{request.method} {request.url.path[:200]}"
    if isinstance(error, HTTPException) and problem.status == 404:
        problem = replace(problem, message=f"Invalid URL ({asked}). See /docs.", code="unknown_url")
    elif isinstance(error, HTTPException) and problem.status == 405:
        allowed = ", ".join(_methods(request))
        message = f"Not allowed: {asked}. Use {allowed}."
        problem = Problem(405, message, code="method_not_supported", headers={"Allow": allowed})
    return JSONResponse(problem.body(), problem.status, headers=problem.headers)


def _methods(request: Request) -> list[str]:
    """The methods that the request's path allows; several routes may have the same path."""

    def known(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return [method for method in ("DELETE", "GET", "PATCH", "POST", "PUT") if known(method)]


def _watch(request: Request) -> None:
    """Keeps reading what may not be served; begun by the first request on an event loop: before, nothing is served."""
    service, loop = service_of(request), asyncio.get_running_loop()
    before: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = request.app.state.watch
    if before is None or before[0] is not loop or before[1].done():
        task = loop.create_task(service.watch())
        request.app.state.watch = loop, task


class Observed:
    """Counts and times requests by route, gives each its id, and replies to errors that no handler expected."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        _watch(request)
        metrics = service_of(request).metrics
        name = request_id(request).encode()
        REQUEST_ID.set(name.decode())
        began, status = time.perf_counter(), 0

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name)]}
            await send(message)

        metrics.open.inc()
        try:
            await self._app(scope, receive, marked)
        except Exception as error:
            problem = describe(error)
            if status:  # part of the reply has been sent: the connection can only be broken off
                raise
            await JSONResponse(problem.body(), problem.status, headers=problem.headers)(scope, receive, marked)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            metrics.open.dec()
            # 499: the client went away before there was a reply
            metrics.requests.labels(route, scope["method"], str(status or 499)).inc()
            metrics.seconds.labels(route).observe(time.perf_counter() - began)


class _TooLarge(HTTPException):
    """Raised while a body is read; the frameworks between pass HTTPExceptions on."""


class BodyLimit:
    """Refuses bodies that are too large, before or while they are read."""

    def __init__(self, app: ASGIApp, usual: int, uploads: Mapping[str, int]) -> None:
        self._app = app
        self._usual = usual
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        upload = self._uploads.get(scope["path"])
        limit = self._usual if upload is None else upload + 2**16  # what a form adds
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > limit:
            problem = Problem(413, f"The body may have at most {limit} bytes.", code="body_too_large")
            await JSONResponse(problem.body(), 413)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise _TooLarge(413, f"The body may have at most {limit} bytes.")
            return message

        await self._app(scope, counted, send)


def open_keys(path: str | None) -> Keys | None:
    """The keys of a server, if it has any configured."""
    return None if path is None else Keys(Path(path).expanduser())
