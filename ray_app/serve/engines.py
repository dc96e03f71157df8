"""The engine replicas as the HTTP app sees them: one stream per request, and calls to all of them.

A request whose replica dies is sent to another: it carries its seed, so the same images come. Events that the client
has already are not sent twice. Nothing waits beyond the request's deadline.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError

from serving.engine.job import EngineStats
from serving.engine.request import AdapterRef, Event, GenerateRequest, NoiseReading
from serving.errors import DeadlineExceeded, NotReady

logger = logging.getLogger(__name__)
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)
_STATS = TypeAdapter(EngineStats)
GRACE_S = 5.0  # the replica ends a request at its deadline itself; this is for one that does not reply
PAUSE_S = 0.25
CONTROL_S = 10.0


class RayEngines:
    """`handle` is Serve's handle of the engine deployment; `least` is how many replicas it keeps at least."""

    def __init__(self, handle: Any, least: int) -> None:
        self._handle = handle
        self._least = least

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """The events of a request; a replica that dies is replaced by another.

        Raises DeadlineExceeded, and whatever error the replica raises."""
        deadline = time.monotonic() + request.deadline_s
        told: set[tuple[str, int, int]] = set()
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded(f"The images were not done within {request.deadline_s:g} s.")
            try:
                async for event in self._attempt(request.model_copy(update={"deadline_s": left_s}), deadline):
                    key = (event.kind, event.index, event.number if event.kind == "preview" else 0)
                    if key not in told:
                        told.add(key)
                        yield event
                return
            except (
                RayActorError,
                DeploymentUnavailableError,
                ReplicaUnavailableError,
            ) as error:  # the replica has died, or none has started yet
                logger.warning("request %s goes to another replica: %s", request.request_id, error)
            except RayTaskError as error:
                cause = error.cause
                if not isinstance(cause, NotReady):
                    raise cause from None
            await asyncio.sleep(PAUSE_S)

    async def _attempt(self, request: GenerateRequest, deadline: float) -> AsyncIterator[Event]:
        """The events of one replica; leaving early cancels the request there."""
        stream = self._handle.options(stream=True).stream.remote(request.model_dump())
        ended = False
        try:
            while True:
                try:
                    async with asyncio.timeout_at(asyncio.get_running_loop().time() + _left_s(deadline) + GRACE_S):
                        item = await anext(stream)
                except StopAsyncIteration:
                    ended = True
                    return
                except TimeoutError:
                    raise DeadlineExceeded("The engine did not reply before the request's deadline.") from None
                yield _EVENT.validate_python(item)
        except (RayError, RayServeException):
            ended = True
            raise
        finally:
            if not ended:
                stream.cancel()

    async def read(self, request: GenerateRequest) -> NoiseReading:
        """See `Engines`. Raises NotReady where no replica is there, and whatever error the replica raises."""
        try:
            found = await self._handle.read.remote(request.model_dump())
        except RayTaskError as error:
            raise error.cause from None
        except (RayError, RayServeException):
            raise NotReady("No engine can look at pictures at the moment; try again.") from None
        return NoiseReading.model_validate(found)

    async def forget(self, ref: AdapterRef) -> None:
        """See `Engines`; a replica that does not reply within CONTROL_S is left out, as in all calls to all."""
        await self._all("forget", ref.model_dump())

    async def preload(self, ref: AdapterRef) -> None:
        """See `Engines`."""
        await self._all("preload", ref.model_dump())

    async def withhold(self, names: frozenset[str]) -> None:
        """See `Engines`."""
        await self._all("withhold", sorted(names))

    async def stats(self) -> Mapping[str, EngineStats]:
        """See `Engines`."""
        found = await self._all("stats")
        return {name: _STATS.validate_python(stats) for name, stats in found}

    async def ready(self) -> bool:
        """Whether enough replicas say they work. With none required, the first request starts one."""
        healthy = [answer for answer in await self._all("healthy") if answer is True]
        return len(healthy) >= min(1, self._least)

    async def _all(self, method: str, *args: Any) -> list[Any]:
        """What every replica returns within CONTROL_S; those that die or are late are left out."""
        answers: list[Any] = []
        with suppress(RayError, RayServeException, TimeoutError, RuntimeError):
            response = self._handle.broadcast(method, *args)
            answers = await response.results_async(timeout_s=CONTROL_S, return_exceptions=True)
        return [answer for answer in answers if not isinstance(answer, BaseException)]


def _left_s(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
