"""Requests over replicas that die, are silent or refuse; a stand-in for Serve's handle plays them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from ray_app.serve import engines
from ray_app.serve.engines import RayEngines
from serving.engine.request import Event, FinishedPicture, GenerateRequest, Preview
from serving.errors import DeadlineExceeded, NotReady, QueueFull
from tests.serving.company import ask

PICTURES = [FinishedPicture(index=index, seed=index, data=b"image") for index in range(3)]
PREVIEW = Preview(index=0, number=0, step=1, steps=3, data=b"guess")


class Stream:
    """What one attempt gives: events, and at the end nothing, an error or silence."""

    def __init__(self, events: list[Event], end: BaseException | None = None, silent: bool = False) -> None:
        self.events = list(events)
        self.end = end
        self.silent = silent
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    async def __anext__(self) -> dict[str, Any]:
        if self.events:
            return self.events.pop(0).model_dump()
        if self.silent:
            await asyncio.sleep(60)
        raise self.end or StopAsyncIteration


class Handle:
    """Serve's handle: every call is the next attempt."""

    def __init__(self, *streams: Stream) -> None:
        self.streams = list(streams)
        self.sent: list[dict[str, Any]] = []

    @property
    def stream(self) -> "Handle":
        return self

    def options(self, *, stream: bool) -> "Handle":
        assert stream
        return self

    def remote(self, request: dict[str, Any]) -> Stream:
        self.sent.append(request)
        return self.streams[len(self.sent) - 1]


def failed(cause: Exception) -> Exception:
    error: Exception = RayTaskError("stream", "traceback", cause).as_instanceof_cause()
    return error


def collect(handle: Handle, request: GenerateRequest) -> list[Event]:
    async def all_events() -> list[Event]:
        return [event async for event in RayEngines(handle, 1).generate(request)]

    return asyncio.run(all_events())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PAUSE_S", 0.01)
    monkeypatch.setattr(engines, "GRACE_S", 0.05)


@pytest.mark.parametrize(
    "end",
    [RayActorError(), failed(NotReady("draining")), DeploymentUnavailableError(DeploymentID("engine"))],
    ids=["died", "draining", "none yet"],
)
def test_a_request_goes_on_elsewhere_and_nothing_is_told_twice(end: BaseException) -> None:
    handle = Handle(Stream([PREVIEW, PICTURES[0]], end), Stream([PREVIEW, *PICTURES]))
    assert collect(handle, ask(count=3)) == [PREVIEW, *PICTURES]
    first, second = handle.sent
    assert {**first, "deadline_s": 0} == {**second, "deadline_s": 0} and second["deadline_s"] < first["deadline_s"]


def test_the_engines_own_errors_come_as_they_are() -> None:
    with pytest.raises(QueueFull, match="full") as caught:
        collect(Handle(Stream([], failed(QueueFull("full", 7)))), ask())
    assert caught.value.retry_after_s == 7 and type(caught.value) is QueueFull


def test_replicas_that_go_on_dying_end_at_the_deadline() -> None:
    handle = Handle(*(Stream([], RayActorError()) for _ in range(200)))
    with pytest.raises(DeadlineExceeded):
        collect(handle, ask(deadline_s=0.2))
    assert len(handle.sent) > 3


def test_a_silent_replica_is_left_at_the_deadline_and_told_to_stop() -> None:
    handle = Handle(Stream([PREVIEW], silent=True))
    with pytest.raises(DeadlineExceeded):
        collect(handle, ask(deadline_s=0.1))
    assert handle.streams[0].cancelled


def test_leaving_early_cancels() -> None:
    async def leave() -> None:
        events = RayEngines(handle, 1).generate(ask(deadline_s=5))
        assert isinstance(events, AsyncIterator)
        async for _ in events:
            break
        await events.aclose()  # type: ignore[attr-defined]

    handle = Handle(Stream([PREVIEW], silent=True))
    asyncio.run(leave())
    assert handle.streams[0].cancelled


class Broadcasting:
    """A handle whose broadcasts end with these answers."""

    def __init__(self, answers: Callable[[], list[Any]]) -> None:
        self.answers = answers

    def broadcast(self, method: str, *args: Any) -> "Broadcasting":
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s and return_exceptions
        return self.answers()


def test_ready_asks_the_replicas() -> None:
    def late() -> list[Any]:
        raise TimeoutError

    def none_yet() -> list[Any]:
        raise RayServeException("failed to deploy")

    for least, answers, expected in (
        (1, lambda: [True, False], True),
        (1, lambda: [False, RayActorError()], False),
        (1, list, False),
        (1, late, False),
        (0, list, True),
        (0, none_yet, True),
        (1, none_yet, False),
    ):
        assert asyncio.run(RayEngines(Broadcasting(answers), least).ready()) is expected
