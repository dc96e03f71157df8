"""What the routes of the HTTP app share: the engines behind it, and who calls.

`Generate` is what an app needs of an engine: it is a local engine loop, a Ray handle or a test's stand-in.
"""

import asyncio
import base64
import binascii
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from fastapi import Request

from serving.engine.job import EngineStats
from serving.engine.request import AdapterRef, Event, FinishedPicture, GenerateRequest, NoiseReading, Preview
from serving.http.access.tenants import Key, Keys, Meter, Quota, Scope
from serving.http.history.keeping import PictureKeeper
from serving.http.infotext import infotext, with_infotext
from serving.http.intake import Intake
from serving.http.metrics import Metrics
from serving.http.problems import ApiError
from serving.http.withheld import WithheldNames
from serving.marking.marks import Made, Marks
from serving.marking.serials import Issued, WornVersion
from training.storage.storage import Storage
from training.storage.version import DEFAULT_TENANT

Generate = Callable[[GenerateRequest], AsyncIterator[Event]]
T = TypeVar("T")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Engines(Protocol):
    """What the app needs of all engines at once."""

    async def forget(self, ref: AdapterRef) -> None:
        """Drops a version that is deleted or replaced, on every engine."""

    async def preload(self, ref: AdapterRef) -> None:
        """Brings a version that will be wanted soon into every engine's host memory."""

    async def withhold(self, names: frozenset[str]) -> None:
        """Ends what wears the adapters `tenant/id` on every engine, and starts nothing more that does."""

    async def stats(self) -> Mapping[str, EngineStats]:
        """The counters of each engine, by replica."""

    async def ready(self) -> bool:
        """Whether a request sent now would be served."""

    async def read(self, request: GenerateRequest) -> NoiseReading:
        """What the noise says that a picture began as, read by any engine."""


class Caller(NamedTuple):
    """Who calls: the tenant of the key, and whether it is an admin's."""

    tenant: str
    admin: bool


@dataclass(frozen=True, slots=True)
class Service:
    """Everything a route works with."""

    generate: Generate
    engines: Engines
    intake: Intake
    keys: Keys | None
    quota: Quota
    withheld: WithheldNames
    keeper: PictureKeeper
    marks: Marks | None = None
    looks: Meter = field(default_factory=lambda: Meter("pictures to look at", 4, 30))
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def storage(self) -> Storage:
        """Where adapters, consents and records are."""
        return self.intake.library.registry.storage

    async def events(self, wanted: GenerateRequest) -> AsyncGenerator[Event, None]:
        """The events of a request, counted for its tenant; leaving them early cancels it. Raises QueueFull.

        PNG files of finished pictures hold their settings, where the server is configured so.
        """
        self.withheld.check(wanted)
        with self.quota.request(wanted.tenant):
            events = self.generate(wanted)
            try:
                async for event in events:
                    if isinstance(event, Preview) and self.marks is not None and self.marks.spec.safety is not None:
                        continue  # what is not finished is not checked, and what is not checked is not sent
                    done = await self._marked(event, wanted)
                    yield await self.keeper.keep(done, wanted) if isinstance(done, FinishedPicture) else done
            finally:
                if isinstance(events, AsyncGenerator):
                    await events.aclose()

    async def watch(self) -> None:
        """Keeps reading what may not be served, and removing pictures that are too old; ends when it is cancelled."""
        await asyncio.gather(self.withheld.watch(self.engines.withhold), self.keeper.watch())

    @property
    def tells_parameters(self) -> bool:
        """Whether PNG files hold the settings that made them."""
        told = self.intake.spec.picture_parameters
        return self.keys is None if told is None else told

    async def _marked(self, event: Event, wanted: GenerateRequest) -> Event:
        """The event with everything on its file that the operator wants there; signing is done on a thread."""
        data = event.data
        if isinstance(event, FinishedPicture) and wanted.output_format == "png" and self.tells_parameters:
            library = self.intake.library
            data = with_infotext(data, infotext(wanted, event.seed, library.base, library.base_hash))
        if self.marks is not None:
            work = self.marks.sign if isinstance(event, Preview) else self.marks.finish
            data = await asyncio.to_thread(work, data, wanted.output_format, self._made(event, wanted))
        return event if data is event.data else event.model_copy(update={"data": data})

    def _made(self, event: Event, wanted: GenerateRequest) -> Made:
        library = self.intake.library
        uses = wanted.adapters
        return Made(
            tenant=wanted.tenant,
            request=wanted.request_id,
            index=event.index,
            seed=event.seed if isinstance(event, FinishedPicture) else 0,
            base=library.base,
            base_hash=library.base_hash,
            adapters=[(WornVersion(**use.ref.model_dump()), use.weight) for use in uses],
            edited=wanted.image is not None or bool(wanted.references),
            prompts=(wanted.prompt, wanted.negative_prompt),
        )

    def caller(self, request: Request) -> Caller | None:
        """Who calls where no key is needed; None without one. Raises ApiError 401 for a key that is not valid."""
        if self.keys is not None and not request.headers.get("authorization"):
            return None
        return Caller(self.tenant(request), self.keys is None or self._admin(request))

    def may_know(self, caller: Caller | None, record: Issued) -> bool:
        """Whether a record is the caller's: it made the picture, owns an adapter in it, or operates the server."""
        if caller is None:
            return False
        owners = {record.tenant, *(worn.tenant for worn in record.adapters)}
        return caller.tenant in owners or self.operates(caller)

    def operates(self, caller: Caller | None) -> bool:
        """Whether the caller is the operator: an admin of the operator's tenant; where there are no keys, anybody."""
        if caller is None or not caller.admin:
            return False
        return self.keys is None or caller.tenant == self.intake.spec.marks.operator_tenant

    def _admin(self, request: Request) -> bool:
        token = _token(request.headers.get("authorization", ""))
        key: Key | None = self.keys.find(token) if self.keys is not None and token else None
        return key is not None and not key.expired and key.may("admin")

    def key(self, request: Request) -> Key | None:
        """The key that a request was sent with, expired or not; None without one, and on a server without keys."""
        token = _token(request.headers.get("authorization", ""))
        return self.keys.find(token) if self.keys is not None and token else None

    def tenant(self, request: Request, scope: Scope | None = None) -> str:
        """The tenant of a request's key. Raises ApiError: 401 without a valid key, 403 if the key lacks `scope`."""
        if self.keys is None:
            return DEFAULT_TENANT
        token = _token(request.headers.get("authorization", ""))
        key = self.keys.find(token) if token else None
        if key is None or key.expired:
            missing = "No API key was sent" if not token else "The API key is not valid"
            if key is not None:
                missing = f"The API key {key.name} has expired on {key.expires}"
            error = ApiError(401, f"{missing}. Send 'Authorization: Bearer <key>'.", code="invalid_api_key")
            error.problem.headers["WWW-Authenticate"] = "Bearer"
            raise error
        if scope is not None and not key.may(scope):
            raise ApiError(
                403,
                f"The API key {key.name} has the scopes {', '.join(key.scopes)}; this call needs '{scope}'. Use a key "
                "that has it.",
                code="missing_scope",
            )
        return key.tenant


def service_of(request: Request) -> Service:
    """The service of the app that handles `request`."""
    service: Service = request.app.state.service
    return service


def request_id(request: Request) -> str:
    """The client's own id of the request if it is a plain one, else a new one; the same all through the request."""
    if not hasattr(request.state, "request_id"):
        given = request.headers.get("x-request-id", "")
        request.state.request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
    found: str = request.state.request_id
    return found


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects (then raises ApiError 499)."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "The client has gone.")
    finally:
        watch.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


def _token(header: str) -> str:
    """The key in an Authorization header: a bearer token, or the password of Basic (AUTOMATIC1111's clients)."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""
