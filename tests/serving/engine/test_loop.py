"""The loop between asyncio and the compute thread: streams, cancels, deadlines, shutdown."""

import asyncio
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing

import pytest
import torch
from PIL import Image

from serving.engine.engine import Engine
from serving.engine.job import EngineStats, Sample
from serving.engine.loop import EngineLoop
from serving.engine.pictures.codec import decode, encode
from serving.engine.request import FinishedPicture, Preview
from serving.errors import AdapterUnavailable, GenerationFailed, NotReady, QueueFull, Refused
from tests.serving.company import Shelf, ask, picture, random_adapter, ref, small
from training.base.base import Base


@pytest.fixture
def shelf(tiny: Base) -> Shelf:
    return Shelf({ref(name): random_adapter(tiny, seed) for seed, name in enumerate(("cat", "dog"))})


@pytest.fixture
def loop(tiny: Base, shelf: Shelf) -> Iterator[EngineLoop]:
    loop = EngineLoop(Engine(tiny, small(queue=8, threads=1), shelf))
    yield loop
    loop.close()


def pixels(event: FinishedPicture) -> torch.Tensor:
    with Image.open(io.BytesIO(event.data)) as opened:
        return torch.tensor(list(opened.convert("RGB").tobytes()), dtype=torch.int)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("never came true")


def test_concurrent_requests_give_the_same_pictures_as_each_alone(tiny: Base, shelf: Shelf, loop: EngineLoop) -> None:
    async def together() -> list[list[FinishedPicture]]:
        return await asyncio.gather(*(loop.generate(request) for request in requests))

    requests = [ask("cat"), ask("dog", steps=5), ask(count=3), ask("cat", "dog", seed=9)]
    found = asyncio.run(together())
    alone = Engine(tiny, small(), shelf)
    for request, events in zip(requests, found, strict=True):
        for event, expected in zip(events, picture(alone, request), strict=True):
            assert (pixels(event) - expected.flatten().int()).abs().max() <= 1
            assert event.seed == request.seed + event.index
    alone.close()


def test_previews_come_before_their_picture(loop: EngineLoop) -> None:
    async def events() -> list[object]:
        return [event async for event in loop.stream(ask("cat", steps=6, previews=2, output_format="webp"))]

    first, second, last = asyncio.run(events())
    assert isinstance(first, Preview) and isinstance(second, Preview) and isinstance(last, FinishedPicture)
    assert (first.number, second.number, second.steps) == (0, 1, 6)
    with Image.open(io.BytesIO(first.data)) as opened:
        assert (opened.size, opened.format) == ((16, 16), "WEBP")


def test_a_client_that_goes_away_is_cancelled(loop: EngineLoop) -> None:
    async def leave() -> None:
        task = asyncio.create_task(loop.generate(ask("cat", steps=900)))
        await until(lambda: loop.engine.scheduler.running_rows > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not loop.engine.jobs)
        stream = loop.stream(ask("cat", steps=900, previews=3))
        async with aclosing(stream):
            async for event in stream:
                assert isinstance(event, Preview)
                break
        await until(lambda: not loop.engine.jobs)

    asyncio.run(leave())
    assert loop.engine.stats.cancelled == 2 and loop.engine.scheduler.idle


def test_errors_reach_their_caller_only(loop: EngineLoop) -> None:
    async def mixed() -> tuple[object, ...]:
        return await asyncio.gather(
            loop.generate(ask("ghost")), loop.generate(ask("cat")), loop.generate(ask(image=b"no image")),
            return_exceptions=True,
        )  # fmt: skip

    ghost, fine, broken = asyncio.run(mixed())
    assert isinstance(ghost, AdapterUnavailable) and isinstance(fine, list) and isinstance(broken, Refused)


def test_a_full_queue_is_said_at_once(loop: EngineLoop) -> None:
    async def flood() -> None:
        tasks = [asyncio.create_task(loop.generate(ask(steps=300, count=8))) for _ in range(1)]
        await until(lambda: loop.engine.scheduler.running_rows > 0 or loop.engine.scheduler.waiting > 0)
        tasks.append(asyncio.create_task(loop.generate(ask(steps=300, count=8))))
        await until(lambda: len(loop.engine.jobs) == 2)
        with pytest.raises(QueueFull):
            await loop.generate(ask(count=8))
        for task in tasks:
            task.cancel()

    asyncio.run(flood())


def test_image_to_image_starts_from_the_picture(loop: EngineLoop) -> None:
    data = encode(torch.full((20, 20, 3), 200, dtype=torch.uint8), "png", 0)
    assert decode(data, 16, 16).shape == (3, 16, 16)
    (near,) = asyncio.run(loop.generate(ask(image=data, strength=0.1, steps=10)))
    (far,) = asyncio.run(loop.generate(ask(image=data, strength=1.0, steps=10)))
    assert near.data != far.data


def test_closing_fails_what_runs_and_refuses_what_comes(tiny: Base, shelf: Shelf) -> None:
    async def story() -> None:
        loop = EngineLoop(Engine(tiny, small(), shelf))
        task = asyncio.create_task(loop.generate(ask(steps=900)))
        await until(lambda: loop.engine.scheduler.running_rows > 0)
        await asyncio.to_thread(loop.close)
        for waiting in (task, asyncio.create_task(loop.generate(ask()))):
            with pytest.raises(NotReady):
                await waiting
        assert not loop.healthy

    asyncio.run(story())


def test_draining_lets_requests_finish(tiny: Base, shelf: Shelf) -> None:
    async def story() -> None:
        loop = EngineLoop(Engine(tiny, small(), shelf))
        task = asyncio.create_task(loop.generate(ask(steps=20)))
        await until(lambda: loop.engine.scheduler.running_rows > 0)
        await asyncio.to_thread(loop.close, 30)
        assert len(await task) == 1

    asyncio.run(story())


def test_a_broken_engine_says_so(tiny: Base, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        engine = Engine(tiny, small(), shelf)
        loop = EngineLoop(engine)
        monkeypatch.setattr(engine, "check_integrity", lambda: 1 / 0)
        with pytest.raises(GenerationFailed, match="has stopped"):
            await loop.generate(ask())
        await until(lambda: not loop.healthy)
        with pytest.raises(NotReady):
            await loop.generate(ask())
        await asyncio.to_thread(loop.close)

    asyncio.run(story())


def test_an_idle_loop_waits(tiny: Base, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing to do the compute thread is inside one long wait, which a request ends."""
    engine = Engine(tiny, small(), shelf)
    wait, asleep = engine.woken.wait, threading.Semaphore(0)

    def counted(timeout: float | None = None) -> bool:
        asleep.release()
        return wait(timeout)

    monkeypatch.setattr(engine.woken, "wait", counted)
    monkeypatch.setattr("serving.engine.loop.IDLE_S", 3600.0)
    loop = EngineLoop(engine)
    assert asleep.acquire(timeout=30)
    for seed in range(2):
        assert len(asyncio.run(loop.generate(ask(seed=seed, steps=20)))) == 1
        assert asleep.acquire(timeout=30)
    assert not asleep.acquire(timeout=0.2)
    loop.close()


def test_stats_are_the_compute_threads_own_and_never_change(
    tiny: Base, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks from another thread gets a finished report, also while a step goes on, and never the live books."""
    engine = Engine(tiny, small(), shelf)
    threads, snapshot = set[str](), engine.snapshot

    def seen() -> EngineStats:
        threads.add(threading.current_thread().name)
        return snapshot()

    loop = EngineLoop(engine)
    monkeypatch.setattr(engine, "snapshot", seen)
    before = loop.stats()
    asyncio.run(loop.generate(ask("cat", count=2)))
    asyncio.run(loop.generate(ask("dog")))
    after = loop.stats()
    assert threads == {"engine"}
    assert (before.images, before.steps, before.adapters["slot_loads"]) == (0, 0, 0)
    assert after.images >= 2 and after.adapters["slot_loads"] >= 1 and after.seconds is not engine.stats.seconds
    loop.close()


def test_stats_do_not_wait_for_a_step(tiny: Base, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        engine = Engine(tiny, small(), shelf)
        begun, go = threading.Event(), threading.Event()
        denoise = engine.stepper.step

        def held(batch: Sequence[Sample]) -> None:
            begun.set()
            assert go.wait(30)
            denoise(batch)

        monkeypatch.setattr(engine.stepper, "step", held)
        loop = EngineLoop(engine)
        task = asyncio.create_task(loop.generate(ask(steps=1)))
        assert await asyncio.to_thread(begun.wait, 30)
        assert loop.stats().requests == 1 and loop.stats().images == 0
        go.set()
        await task
        await until(lambda: loop.stats().images == 1)
        await asyncio.to_thread(loop.close)

    asyncio.run(story())
