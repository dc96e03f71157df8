"""The noise mark in the engine: off it changes nothing, on it comes back out of what was made, in every family."""

import pytest
import torch
from torch import Tensor

from serving.engine.engine import Engine
from serving.engine.job import Recovered
from serving.engine.reading import backwards, read_noise, reading_request
from serving.engine.request import GenerateRequest
from serving.errors import Refused
from serving.marking.noise import FOUND, NoiseMark
from tests.families import write_family
from tests.serving.company import Shelf, ask, finished, run, small
from training.base.base import Base, load_base

MARK = NoiseMark(b"m" * 32)


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(write_family("z-image", tmp_path_factory.mktemp("flow"))), device="cpu")


def made(base: Base, mark: NoiseMark | None, request: GenerateRequest) -> Tensor:
    """The final latents of a request by an engine with this mark."""
    engine = Engine(base, small(), Shelf({}), mark)
    (latents,) = finished(engine, [request])
    engine.close()
    return latents[0]


def test_marked_pictures_depend_on_the_request_alone(tiny: Base) -> None:
    request = ask(seed=7)
    plain, marked = made(tiny, None, request), made(tiny, MARK, request)
    assert not torch.allclose(plain, marked, atol=1e-2)
    assert torch.equal(marked, made(tiny, MARK, request))
    other = made(tiny, MARK, request.model_copy(update={"tenant": "somebody"}))
    assert not torch.allclose(marked, other, atol=1e-2)


@pytest.mark.parametrize("family", ["ddpm", "flow"])
def test_the_run_backwards_finds_the_message_of_its_run(family: str, tiny: Base, flow: Base) -> None:
    base, sampler = (tiny, "ddim") if family == "ddpm" else (flow, "euler")
    side = 16 * base.facts.cell_px
    request = ask(prompt="", seed=3, steps=25, guidance_scale=1.0, scheduler=sampler, width=side, height=side)
    found = walked_back(base, made(base, MARK, request), steps=25)
    reading = MARK.read(found.detach().numpy())
    assert reading.log10 < FOUND
    assert reading.serial == MARK.serial(request.tenant, 3) & 0xFFFF
    assert MARK.read(walked_back(base, made(base, None, request), steps=25).numpy()).log10 > FOUND


def walked_back(base: Base, latents: Tensor, steps: int) -> Tensor:
    """The noise that latents [C, h, w] began as, by the table that the engine's readings use."""
    from serving.engine.samplers import ScheduleLines

    (cond,) = base.encode([""])
    schedule = backwards(base.process, steps, (latents.shape[1], latents.shape[2]))
    x_NCHW = latents[None]
    for step in range(schedule.steps):
        lines = ScheduleLines.gather([schedule], [step], base.device)
        output = base.predict(lines.model_input(x_NCHW), lines.timesteps_N, [cond])
        x_NCHW, _ = lines.step(x_NCHW, output, torch.zeros_like(x_NCHW), None)
    return x_NCHW[0]


def test_a_reading_shares_the_engine_with_other_requests(tiny: Base) -> None:
    engine = Engine(tiny, small(), Shelf({}), MARK)
    pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)
    reading = engine.submit(reading_request(b"", 16, 16, deadline_s=60), pixels)
    picture = engine.submit(ask(seed=1))
    seen: list[object] = []
    while engine.jobs:
        seen += engine.step()
    recovered = [one for one in seen if isinstance(one, Recovered)]
    assert len(recovered) == 1 and recovered[0].job is reading and picture.over
    assert recovered[0].noise.shape == (4, 8, 8)
    assert engine.stats.rows > engine.stats.steps  # they did share forwards
    assert -6 < read_noise(MARK, engine.reader, recovered[0]).log10 <= 0
    engine.close()


def test_a_reading_without_a_mark_is_refused(tiny: Base) -> None:
    engine = Engine(tiny, small(), Shelf({}))
    with pytest.raises(Refused, match="watermark: none"):
        engine.submit(reading_request(b"", 16, 16, deadline_s=60), torch.zeros(3, 16, 16, dtype=torch.uint8))
    assert not run(engine, [])
    engine.close()


def test_a_part_of_a_picture_is_read_at_its_place_with_the_words_of_the_whole(tiny: Base) -> None:
    whole = MARK.put(torch.randn(4, 48, 48, generator=torch.Generator().manual_seed(0)), MARK.serial("", 0))
    part = whole[:, 2:42, 3:43].contiguous()  # 6400 values: alone they would carry one word
    engine = Engine(tiny, small(), Shelf({}), MARK)
    request = reading_request(b"", 80, 80, deadline_s=60, cut_cells=3)
    job = engine.submit(request, torch.zeros(3, 80, 80, dtype=torch.uint8))
    reading = read_noise(MARK, engine.reader, Recovered(job, 0, part, part))
    assert (reading.words, reading.serial) == (3, MARK.serial("", 0)) and reading.log10 < FOUND
    engine.close()
