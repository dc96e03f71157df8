"""The loop: runs the engine on its one compute thread, and connects it to asyncio.

Everything that touches the engine runs on that thread; callers send it commands and get the results on their own event
loop. Encoding and decoding of pictures happens on neither. Knows nothing about HTTP.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from serving.engine.engine import Engine
from serving.engine.job import Done, EngineStats, Guess, Job, JobEvent, JobFailed, Recovered
from serving.engine.pictures.codec import encode, enlarge
from serving.engine.pictures.decoding import Decoding, Given
from serving.engine.pictures.hints import Hints, decode_hints
from serving.engine.reading import read_noise
from serving.engine.request import AdapterRef, Event, FinishedPicture, GenerateRequest, NoiseReading, Preview
from serving.errors import Cancelled, GenerationFailed, NotReady
from serving.marking.pixels import PixelMark

logger = logging.getLogger(__name__)
T = TypeVar("T")
IDLE_S = 0.5  # how often deadlines are looked at while nothing runs


@dataclass(eq=False, slots=True)
class _Listener:
    """Where the outcomes of one job go."""

    loop: asyncio.AbstractEventLoop
    outcomes: "asyncio.Queue[JobEvent]" = field(default_factory=asyncio.Queue)

    def hear(self, outcome: JobEvent) -> None:
        with contextlib.suppress(RuntimeError):  # its event loop is closed: nobody listens
            self.loop.call_soon_threadsafe(self.outcomes.put_nowait, outcome)


class Device(Protocol):
    """What the engine computes on, where it shares that with something else in the process."""

    def turn(self) -> AbstractContextManager[None]:
        """The device for one step."""

    def rest(self) -> None:
        """It is not wanted until the next turn."""


class OwnDevice:
    """A device that the engine has to itself."""

    def turn(self) -> AbstractContextManager[None]:
        """At once."""
        return contextlib.nullcontext()

    def rest(self) -> None:
        """Nobody waits for it."""


class EngineLoop:
    """Starts the thread at once. `close()` ends it."""

    def __init__(self, engine: Engine, device: Device | None = None) -> None:
        self.engine = engine
        self._device = device or OwnDevice()
        self._decoding = Decoding()
        self._commands: deque[Callable[[], None]] = deque()
        self._listeners: dict[Job, _Listener] = {}
        self._closing = False
        self._gate = threading.Lock()  # no command is added after the last ones have run
        self._ended = False
        self._broken: BaseException | None = None
        self._report = engine.snapshot()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether requests can be served; once False it stays so."""
        return self._thread.is_alive() and self._broken is None and not self._closing

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Previews and pictures as they come; ends with the last picture. Leaving it early cancels the request.

        Raises Refused or its kinds for what is not served, GenerationFailed for a fault of ours."""
        async with aclosing(self._outcomes(request)) as outcomes:
            async for outcome in outcomes:
                yield await asyncio.to_thread(_encoded, request, outcome, self.engine.pixel_mark)

    async def read(self, request: GenerateRequest) -> NoiseReading:
        """What the noise says that a request's picture began as. Raises as `stream` does."""
        async with aclosing(self._outcomes(request)) as outcomes:
            async for outcome in outcomes:
                if isinstance(outcome, Recovered) and self.engine.mark is not None:
                    return await asyncio.to_thread(read_noise, self.engine.mark, self.engine.reader, outcome)
        raise Cancelled

    async def _outcomes(self, request: GenerateRequest) -> AsyncGenerator[JobEvent, None]:
        """What happens to a request, up to its last image; leaving it early cancels it."""
        given = await self._decoding.given(request, self.engine.base.facts.multiple_px)
        hints = await decode_hints(self._decoding, request)
        listener = _Listener(asyncio.get_running_loop())
        submitting = self._on_thread(lambda: self._submit(request, given, hints, listener))
        try:
            job = await asyncio.shield(asyncio.wrap_future(submitting))
        except asyncio.CancelledError:
            submitting.add_done_callback(self._cancel_submitted)
            raise
        left = request.count
        try:
            while left:
                outcome = await listener.outcomes.get()
                if isinstance(outcome, JobFailed):
                    if isinstance(outcome.error, GenerationFailed):
                        logger.error("request %s failed", request.request_id, exc_info=outcome.error)
                    raise outcome.error
                left -= isinstance(outcome, Done | Recovered)
                yield outcome
        finally:
            if left:
                self._cancel(job)

    async def generate(self, request: GenerateRequest) -> list[FinishedPicture]:
        """All pictures of a request, in order."""
        pictures = [event async for event in self.stream(request) if isinstance(event, FinishedPicture)]
        return sorted(pictures, key=lambda picture: picture.index)

    def forget(self, ref: AdapterRef) -> None:
        """Drops a version that is deleted or replaced, once no request uses it."""
        self._on_thread(lambda: self.engine.forget(ref))

    def withhold(self, names: frozenset[str]) -> None:
        """Ends what wears the adapters `tenant/id`, and starts nothing more that does."""
        self._on_thread(lambda: self.engine.withhold(names))

    def preload(self, ref: AdapterRef) -> None:
        """Brings an adapter into host memory."""
        self._on_thread(lambda: self.engine.adapters.preload(ref))

    def stats(self) -> EngineStats:
        """The engine's counters as they were after its last step: a copy, from any thread, without waiting."""
        return self._report

    def close(self, drain_s: float = 0.0) -> None:
        """Refuses new requests, waits up to `drain_s` for the running ones, then fails the others with NotReady."""
        deadline = time.monotonic() + drain_s
        while self.engine.jobs and self.healthy and time.monotonic() < deadline:
            time.sleep(0.02)
        self._closing = True
        self.engine.woken.set()
        self._decoding.close()
        self._thread.join(60)
        self.engine.close()

    # -- on the compute thread --

    def _run(self) -> None:
        if self.engine.spec.threads is not None:
            torch.set_num_threads(self.engine.spec.threads)
        try:
            while not self._closing:
                self._obey()
                if self.engine.idle:
                    self._device.rest()
                    if not self.engine.woken.wait(IDLE_S) and not self.engine.jobs:
                        continue
                self.engine.woken.clear()
                self._obey()
                with self._device.turn():
                    outcomes = self.engine.step()
                self._tell(outcomes)
        except BaseException as error:
            logger.exception("the engine is broken and has stopped")
            self._broken = error
        self._closing = True
        self._device.rest()
        with self._gate:
            self._ended = True
        self._obey()
        for job in list(self._listeners):
            reason = NotReady("The server is shutting down; try again.")
            self._tell(
                [JobFailed(job, reason if self._broken is None else GenerationFailed("The engine has stopped."))]
            )

    def _obey(self) -> None:
        while self._commands:
            self._commands.popleft()()
        self._report = self.engine.snapshot()

    def _submit(self, request: GenerateRequest, given: Given, hints: Hints, listener: _Listener) -> Job:
        if self._closing:
            raise NotReady("The server is shutting down; try again.")
        job = self.engine.submit(request, given.pixels_CHW, edit=given.edit, references=given.references, hints=hints)
        self._listeners[job] = listener
        return job

    def _tell(self, outcomes: Sequence[JobEvent]) -> None:
        for outcome in outcomes:
            listener = self._listeners.get(outcome.job)
            if listener is not None:
                listener.hear(outcome)
        for outcome in outcomes:  # only now: one step may end several images of a job
            if outcome.job.over:
                self._listeners.pop(outcome.job, None)

    # -- from any thread --

    def _cancel(self, job: Job) -> None:
        def cancel() -> None:
            self._listeners.pop(job, None)
            self.engine.cancel(job)

        self._on_thread(cancel)

    def _cancel_submitted(self, submitting: "Future[Job]") -> None:
        if submitting.exception() is None:
            self._cancel(submitting.result())

    def _on_thread(self, work: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._gate:
            if not self._ended:
                self._commands.append(command)
                self.engine.woken.set()
                return future
        command()
        return future


def _encoded(request: GenerateRequest, outcome: JobEvent, mark: PixelMark | None) -> Event:
    """Runs on a worker thread."""
    form, quality = request.output_format, request.output_quality
    if isinstance(outcome, Done):
        edit = outcome.job.edit
        made = outcome.pixels if edit is None else edit.compose(outcome.pixels)
        if mark is not None:
            made = torch.from_numpy(mark.put(made.contiguous().numpy()))
        return FinishedPicture(index=outcome.index, seed=outcome.seed, data=encode(made, form, quality))
    if not isinstance(outcome, Guess):
        raise Cancelled
    pixels = enlarge(outcome.pixels, request.width, request.height)
    return Preview(
        index=outcome.index,
        number=outcome.number,
        step=outcome.step,
        steps=outcome.job.steps,
        data=encode(pixels, form, quality),
    )
