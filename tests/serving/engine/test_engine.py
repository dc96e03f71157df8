"""Law 4: a row served beside any neighbours equals the row served alone, whatever happens to the neighbours.

Every comparison has a positive control: the adapters do change the picture.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor

from serving.engine.engine import Engine
from serving.engine.job import Done, Guess, Sample
from serving.engine.request import GenerateRequest
from serving.errors import AdapterUnavailable, DeadlineExceeded, GenerationFailed, QueueFull, Refused
from tests.serving.company import (
    ATTENTION,
    WIDE,
    Shelf,
    ask,
    finished,
    picture,
    random_adapter,
    ref,
    run,
    small,
)
from tests.tiny import clip, clip_tokenizer, states
from training.adapters.adapter import Adapter, load_adapter, save_adapter
from training.base.base import Base
from training.base.words import tokenise

CLOSE = 1e-5  # law 4, fp32
VISIBLE = 1e-2  # the least by which another adapter, weight, prompt or seed changes latents here

MIXES: dict[str, GenerateRequest] = {
    "base": ask(),
    "cat": ask("cat"),
    "prefix": ask("cat2"),
    "prefix-of-prefix": ask("ca"),
    "wide": ask("wide"),
    "weak": ask(("cat", 0.25)),
    "negative": ask(("cat", -1.0)),
    "two": ask(("cat", 0.7), ("dog", 0.6)),
    "three": ask("cat", ("wide", 0.5), ("cat2", -0.5)),
    "no-text": ask("no-text"),
    "unguided": ask("dog", guidance_scale=1.0),
    "long": ask("dog", steps=7, scheduler="euler"),
    "ancestral": ask("cat", steps=5, scheduler="euler_a", count=2),
    "multistep": ask("cat2", steps=6, scheduler="dpm++_2m", negative_prompt="red grass"),
    "wordy": ask(
        "cat", prompt="a photo of a dog on the grass in the snow on the beach of the red water in the blue toy"
    ),
    "wordier": ask(("cat", 0.7), ("dog", 0.6), prompt="a dog on the grass " * 9, negative_prompt="red water " * 20),
    "refused wordily": ask(negative_prompt="red grass in the snow on the water of the blue beach of the toy cat dog"),
    "larger": ask("cat", width=32, height=16),
}


@pytest.fixture(scope="module")
def shelf(tiny: Base) -> Shelf:
    adapters = {ref(name): random_adapter(tiny, seed) for seed, name in enumerate(("cat", "cat2", "ca", "dog"))}
    adapters[ref("wide")] = random_adapter(tiny, 10, rank=8, targets=WIDE)
    adapters[ref("no-text")] = random_adapter(tiny, 11, rank=2, text=False)
    return Shelf(adapters)


@pytest.fixture
def engine(tiny: Base, shelf: Shelf) -> Iterator[Engine]:
    engine = Engine(tiny, small(), shelf)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone(tiny: Base, shelf: Shelf) -> dict[str, Tensor]:
    """Every mix served alone, each by an engine of its own."""
    found = {}
    for name, request in MIXES.items():
        engine = Engine(tiny, small(), shelf)
        (found[name],) = finished(engine, [request])
        engine.close()
    return found


def near(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= CLOSE * max(1.0, float(expected.abs().max()))


# -- positive control --


def test_every_mix_gives_another_picture(alone: dict[str, Tensor]) -> None:
    names = [name for name in alone if name not in ("larger",)]
    for i, one in enumerate(names):
        for other in names[:i]:
            assert float((alone[one][0] - alone[other][0]).abs().max()) > VISIBLE, (one, other)


# -- company --


def test_a_row_beside_any_neighbours_equals_the_row_alone(engine: Engine, alone: dict[str, Tensor]) -> None:
    names = list(MIXES)
    for order in (names, names[::-1], names[5:] + names[:5]):
        for name, latents in zip(order, finished(engine, [MIXES[name] for name in order]), strict=True):
            assert near(latents, alone[name]), name
    assert engine.stats.rows > 4 * engine.stats.steps  # they did share forwards


def test_rows_that_join_and_leave_at_every_step(engine: Engine, alone: dict[str, Tensor]) -> None:
    jobs = {}

    def join(step: int) -> None:
        if step < 2 * len(MIXES) and step % 2 == 0:
            name = list(MIXES)[step // 2]
            job = engine.submit(MIXES[name])
            jobs[name] = job, list(job.samples)

    run(engine, [engine.submit(ask(steps=40))], between=join)
    run(engine, [job for job, _ in jobs.values() if job in engine.jobs] or [engine.submit(ask(steps=1))])
    assert len(jobs) == len(MIXES)
    for name, (_, samples) in jobs.items():
        latents = torch.stack([sample.latents for sample in samples if sample.latents is not None])
        assert near(latents, alone[name]), name


def test_a_short_request_does_not_wait_for_a_long_one(engine: Engine) -> None:
    long = engine.submit(ask("cat", steps=50))
    run_until(engine, lambda: engine.scheduler.running)  # its adapter is loaded
    short = engine.submit(ask("dog", steps=3))
    run(engine, [short])
    assert not long.over and 3 <= long.samples[0].step <= 20


def test_one_tenants_flood_leaves_anothers_request_alone(tiny: Base, shelf: Shelf) -> None:
    engine = Engine(tiny, small(max_rows=4, slots=2), shelf)
    for _ in range(20):
        engine.submit(ask("cat", steps=20, tenant="flood"))
    for _ in range(5):
        engine.step()
    before = engine.stats.steps
    run(engine, [engine.submit(ask("dog", steps=3, tenant="other"))])
    assert engine.stats.steps - before <= 12
    engine.close()


def test_large_images_step_and_are_decoded_in_small_batches(
    tiny: Base, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part of a step takes more cells than a full one at the base's own size, 8 x 8: others wait for it."""
    engine = Engine(tiny, small(max_rows=16, decode_rows=4), shelf)
    decoded: list[torch.Size] = []
    stepped: list[int] = []
    decode, denoise = Base.to_pixels, engine.stepper.step

    def seen(base: Base, latents_NCHW: Tensor) -> Tensor:
        decoded.append(latents_NCHW.shape)
        return decode(base, latents_NCHW)

    def counted(batch: Sequence[Sample]) -> None:
        stepped.append(len(batch))
        denoise(batch)

    monkeypatch.setattr(Base, "to_pixels", seen)
    monkeypatch.setattr(engine.stepper, "step", counted)
    run(engine, [engine.submit(ask(count=6, width=32, height=32, steps=2))])
    assert stepped == [2] * 6  # an image is 2 rows of 4 times the cells; a step is at most 16 rows
    run(engine, [engine.submit(ask(count=6, steps=2))])
    assert stepped[6:] == [6] * 2
    assert {shape[0] for shape in decoded if shape[2:] == (16, 16)} == {1}
    assert 4 in {shape[0] for shape in decoded if shape[2:] == (8, 8)}
    engine.close()


@pytest.mark.parametrize("scheduler", ["euler", "euler_a", "dpm++_2m"])
def test_an_image_of_more_than_a_forward_steps_in_two_and_lets_others_between(
    tiny: Base, shelf: Shelf, scheduler: str
) -> None:
    """Its two rows of guidance are forwards of their own, to the same picture; others need not wait for both."""
    large = ask("cat", width=48, height=32, steps=3, scheduler=scheduler, negative_prompt="red grass", count=2)
    wide = Engine(tiny, small(max_rows=16), shelf)
    (expected,) = finished(wide, [large])
    wide.close()
    engine = Engine(tiny, small(max_rows=4), shelf)
    (halved,) = finished(engine, [large])
    assert near(halved, expected)
    assert (engine.stats.steps, engine.stats.rows) == (12, 12)

    finished(engine, [ask("dog")])  # its adapter is in a slot
    job = engine.submit(large)
    while not (sample := job.samples[0]).said:
        engine.step()
    began = sample.step
    other = engine.submit(ask("dog", steps=2, tenant="other"))
    while not other.over:
        engine.step()
    assert sample.step == began and sample.said
    run(engine, [job])
    assert near(finished(engine, [large])[0], expected)
    engine.close()


def test_images_of_a_request_have_following_seeds(engine: Engine) -> None:
    several = finished(engine, [ask("cat", count=3, seed=7)])[0]
    for index in range(3):
        assert near(finished(engine, [ask("cat", seed=7 + index)])[0][0], several[index])
    assert float((several[0] - several[1]).abs().max()) > VISIBLE


def test_fixed_rows_give_the_same_bits_in_any_company(tiny: Base, shelf: Shelf) -> None:
    engine = Engine(tiny, small(fixed_rows=True, max_rows=8), shelf)
    (expected,) = finished(engine, [ask("cat")])
    for company in ([ask("dog")], [ask(), ask(seed=4, steps=5)], [ask("cat", seed=3), ask("cat2")]):
        assert torch.equal(finished(engine, [ask("cat"), *company])[0], expected)
    engine.close()


# -- the reference: diffusers --


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_latents(pipeline: StableDiffusionPipeline, request: GenerateRequest) -> Tensor:
    latents: Tensor = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    ).images
    return latents


def test_a_base_row_equals_the_untouched_pipeline(
    engine: Engine, pipeline: StableDiffusionPipeline, alone: dict[str, Tensor]
) -> None:
    expected = diffusers_latents(pipeline, MIXES["base"])
    assert near(alone["base"], expected)
    assert near(finished(engine, [MIXES["two"], MIXES["base"], MIXES["wide"]])[1], expected)


def chunked(pipeline: StableDiffusionPipeline, prompt: str, chunks: int) -> Tensor:
    """A prompt's embeddings [1, chunks x L, C] as AUTOMATIC1111 makes them: each chunk of ids encoded by itself."""
    tokenizer = pipeline.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    room = tokenizer.model_max_length - 2
    parts = []
    for start in range(0, chunks * room, room):
        row = [tokenizer.bos_token_id, *ids[start : start + room]]
        row += [tokenizer.eos_token_id] * (room + 2 - len(row))
        with torch.no_grad():
            parts.append(pipeline.text_encoder(torch.tensor([row]))[0])
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(("name", "chunks"), [("wordy", 2), ("wordier", 4), ("refused wordily", 2)])
def test_a_long_prompt_is_encoded_in_chunks(
    engine: Engine, pipeline: StableDiffusionPipeline, name: str, chunks: int
) -> None:
    """Nothing of it is cut: the picture is diffusers' with A1111's embeddings, prompt and negative of one length."""
    request = MIXES[name].model_copy(update={"adapters": ()})
    expected = pipeline(
        prompt_embeds=chunked(pipeline, request.prompt, chunks),
        negative_prompt_embeds=chunked(pipeline, request.negative_prompt, chunks),
        height=16,
        width=16,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    ).images
    assert near(finished(engine, [request, MIXES["cat"], ask()])[0], expected)


def test_a_prompt_beyond_what_is_served_is_refused_alone(tiny: Base, shelf: Shelf, alone: dict[str, Tensor]) -> None:
    engine = Engine(tiny, small(prompt_tokens=28), shelf)
    long, fits = engine.submit(ask(prompt="dog " * 29)), engine.submit(ask("cat"))
    ends = run(engine, [long, fits, engine.submit(ask(prompt="dog " * 28))])
    assert "takes 3 chunks of 14 tokens; at most 2 are served" in str(ends.pop(long))
    assert all(isinstance(end, Tensor) for end in ends.values())
    engine.close()


def test_the_engine_leaves_the_base_bit_exact(tiny: Base, shelf: Shelf) -> None:
    before = states(tiny, ["a dog"])
    weights = {name: value.clone() for name, value in tiny.denoiser.state_dict().items()}
    engine = Engine(tiny, small(), shelf)
    finished(engine, [MIXES["three"]])
    engine.close()
    assert torch.equal(states(tiny, ["a dog"]), before)
    assert all(torch.equal(value, weights[name]) for name, value in tiny.denoiser.state_dict().items())


@pytest.mark.parametrize("targets", [ATTENTION, WIDE], ids=["attention", "wide"])
def test_a_row_equals_diffusers_with_the_same_file(tiny: Base, tiny_folder: Path, targets: tuple[str, ...]) -> None:
    data = save_adapter(random_adapter(tiny, 5, targets=targets))
    engine = Engine(tiny, small(), Shelf({ref("cat"): load_adapter(data)}))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    plain = diffusers_latents(pipeline, ask())
    pipeline.load_lora_weights(_as_file(data, tiny_folder))
    expected = diffusers_latents(pipeline, ask())
    assert float((expected - plain).abs().max()) > VISIBLE
    assert float((finished(engine, [ask("cat"), ask()])[0] - expected).abs().max()) <= 1e-4
    engine.close()


def _as_file(data: bytes, folder: Path) -> str:
    path = folder.parent / "adapter.safetensors"
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_equals_the_diffusers_pipeline(
    engine: Engine, pipeline: StableDiffusionPipeline, strength: float
) -> None:
    image = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    request = ask(steps=8, strength=strength)
    job = engine.submit(request, image)
    samples = list(job.samples)
    run(engine, [job])
    parts = {**pipeline.components, "scheduler": DDIMScheduler.from_config(pipeline.scheduler.config)}
    reference = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        request.prompt,
        image=image[None] / 255,
        strength=strength,
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    assert samples[0].latents is not None and samples[0].step == int(8 * strength)
    assert float((samples[0].latents - expected[0]).abs().max()) <= 1e-4


# -- cancels --


@pytest.mark.parametrize("when", ["waiting", "first step", "running", "last step", "decoding"])
def test_a_cancelled_neighbour(tiny: Base, shelf: Shelf, alone: dict[str, Tensor], when: str) -> None:
    engine = Engine(tiny, small(max_rows=4 if when == "waiting" else 16, decode_rows=1), shelf)
    finished(engine, [ask("cat", "cat2", "dog")])  # all in slots: nothing waits for a load
    long = engine.submit(ask("cat", steps=4))
    stay = engine.submit(MIXES["long"])
    victim = engine.submit(ask("cat2", steps=4))
    samples = list(stay.samples)

    def cancel(step: int) -> None:
        due = {"waiting": 1, "first step": 1, "running": 2, "last step": 3, "decoding": 4}[when]
        if step == due:
            started = victim.samples and victim.samples[0].slots is not None
            assert bool(started) == (when != "waiting")
            engine.cancel(victim)
            engine.cancel(victim)  # a second time changes nothing

    ends = run(engine, [long, stay], between=cancel)
    assert len(ends) == 2 and victim.over and engine.stats.cancelled == 1
    assert near(torch.stack([s.latents for s in samples if s.latents is not None]), alone["long"])
    assert engine.adapters.slots.pinned == 0 and engine.scheduler.idle
    engine.close()


def test_cancelling_frees_the_rows_at_the_next_step(engine: Engine) -> None:
    job = engine.submit(ask("cat", steps=50, count=4))
    run_until(engine, lambda: engine.scheduler.running_rows == 8)
    engine.cancel(job)
    assert engine.scheduler.running_rows == 0
    assert engine.step() == [] and engine.idle


def run_until(engine: Engine, condition: "object") -> None:
    assert callable(condition)
    for _ in range(200):
        if condition():
            return
        if engine.idle:
            engine.woken.wait(0.02)
        engine.step()
    raise AssertionError("never came true")


# -- failures --


def test_a_failed_load_fails_only_its_request_and_evicts_nobody(tiny: Base, shelf: Shelf) -> None:
    engine = Engine(tiny, small(slots=1), shelf)
    (expected,) = finished(engine, [ask("cat")])
    loaded = engine.adapters.slots.loaded()
    ghost, beside, two = engine.submit(ask("ghost")), engine.submit(ask("cat")), engine.submit(ask("ghost", steps=9))
    samples = list(beside.samples)
    ends = run(engine, [ghost, beside, two])
    for job in (ghost, two):
        assert isinstance(ends[job], AdapterUnavailable) and "default/ghost@1" in str(ends[job])
    assert samples[0].latents is not None and near(samples[0].latents, expected[0])
    assert engine.adapters.slots.loaded() == loaded and engine.adapters.slots.evictions == 0
    engine.close()


def test_adapters_that_do_not_fit_the_base_say_why(tiny: Base) -> None:
    good = random_adapter(tiny, 1)
    key, low = next(iter(good.modules.items()))
    bad = {
        "high": random_adapter(tiny, 1, rank=9),
        "other": Adapter({"unet.no.such.layer": low}),
        "shape": Adapter({key: low._replace(down=low.down[:, :3])}),
        "nan": Adapter({key: low._replace(up=low.up * float("nan"))}),
        "empty": Adapter({}),
    }
    engine = Engine(tiny, small(), Shelf({ref(name): adapter for name, adapter in bad.items()}))
    jobs = {name: engine.submit(ask(name)) for name in bad}
    ends = run(engine, jobs.values())
    for name, part in {
        "high": "--rank 9", "other": "unet.no.such.layer", "shape": key, "nan": "cannot hold", "empty": "no layer",
    }.items():  # fmt: skip
        assert isinstance(ends[jobs[name]], AdapterUnavailable) and part in str(ends[jobs[name]]), name
    assert len(engine.adapters.host) == 0 and len(engine.adapters.slots) == 0
    engine.close()


@pytest.mark.parametrize("stage", ["text", "step", "decode"])
def test_a_fault_fails_only_the_request_that_causes_it(
    tiny: Base, engine: Engine, alone: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    jobs = {name: engine.submit(MIXES[name]) for name in ("base", "cat", "two", "long")}
    bad = engine.submit(ask("dog", steps=4, seed=99, prompt="a red toy"))
    samples = {name: list(job.samples) for name, job in jobs.items()}
    culprit = bad.samples[0]
    if stage == "text":
        whole = clip(tiny).forward
        tokens = tokenise(clip_tokenizer(tiny), ["a red toy"], [{}]).ids
        monkeypatch.setattr(
            clip(tiny),
            "forward",
            lambda ids, **rest: _fail_if((ids == tokens).all(1).any()) or whole(ids, **rest),
        )
    elif stage == "step":
        forward = engine.stepper.forward
        monkeypatch.setattr(
            engine.stepper, "forward", lambda batch: _fail_if(culprit in batch and culprit.step == 2) or forward(batch)
        )
    else:
        decode = engine._decode
        monkeypatch.setattr(engine, "_decode", lambda batch: _fail_if(culprit in batch) or decode(batch))
    ends = run(engine, [*jobs.values(), bad])
    assert isinstance(ends[bad], GenerationFailed) and "injected" in str(ends[bad])
    for name, group in samples.items():
        assert isinstance(ends[jobs[name]], Tensor)
        assert near(torch.stack([s.latents for s in group if s.latents is not None]), alone[name]), name
    assert engine.stats.failed == 1 and engine.adapters.slots.pinned == 0


def _fail_if(condition: object) -> bool:
    if condition:
        raise RuntimeError("injected")
    return False


def test_not_a_number_stays_in_its_row(tiny: Base, shelf: Shelf, alone: dict[str, Tensor]) -> None:
    """Finite weights that overflow in the forward: the picture is refused, the neighbours see nothing of it."""
    huge = random_adapter(tiny, 3, size=1e30)
    engine = Engine(tiny, small(slots=2), Shelf({**shelf.adapters, ref("huge"): huge}))
    bad, good, plain = (engine.submit(request) for request in (ask("huge"), MIXES["cat"], MIXES["base"]))
    samples = [list(good.samples)[0], list(plain.samples)[0]]
    ends = run(engine, [bad, good, plain])
    assert isinstance(ends[bad], GenerationFailed) and "not-a-number" in str(ends[bad])
    for sample, name in zip(samples, ("cat", "base"), strict=True):
        assert sample.latents is not None and near(sample.latents, alone[name][0])
    engine.close()


def test_a_deadline(engine: Engine) -> None:
    late, fine = engine.submit(ask("cat", steps=900, deadline_s=0.05)), engine.submit(ask("dog"))
    ends = run(engine, [late, fine])
    assert isinstance(ends[late], DeadlineExceeded) and isinstance(ends[fine], Tensor)


def test_a_full_queue(tiny: Base, shelf: Shelf) -> None:
    engine = Engine(tiny, small(queue=2), shelf)
    jobs = [engine.submit(ask(count=2))]
    with pytest.raises(QueueFull) as caught:
        engine.submit(ask())
    assert caught.value.retry_after_s >= 1
    run(engine, jobs)
    engine.submit(ask())
    engine.close()


def test_more_adapters_than_slots_in_one_request(tiny: Base, shelf: Shelf) -> None:
    engine = Engine(tiny, small(slots=2), shelf)
    with pytest.raises(Refused, match="up to 2 adapters here, not 3"):
        engine.submit(ask("cat", "dog", "ca"))
    engine.close()


# -- churn, replacement, deletion --


def test_churn_two_slots_fifty_adapters_eight_at_once(tiny: Base) -> None:
    adapters = {ref(f"a{index}"): random_adapter(tiny, index, rank=2) for index in range(50)}
    shelf = Shelf(adapters)
    wanted = [ask(f"a{(7 * index) % 50}", seed=index, steps=2) for index in range(60)]
    roomy = Engine(tiny, small(slots=60, max_rows=2), shelf)
    expected = [picture(roomy, request) for request in wanted]
    roomy.close()
    engine = Engine(tiny, small(slots=2, host_bytes=5 * 150_000), shelf)
    ends = {}
    queue = list(enumerate(wanted))
    flying: dict[int, object] = {}
    jobs = {}
    while queue or flying:
        while queue and len(flying) < 8:
            index, request = queue.pop(0)
            jobs[index] = engine.submit(request)
            flying[index] = jobs[index]
        if engine.idle:
            engine.woken.wait(0.02)
            engine.woken.clear()
        for outcome in engine.step():
            assert isinstance(outcome, Done), outcome
            index = next(index for index, job in jobs.items() if job is outcome.job)
            ends[index] = outcome.pixels
            del flying[index]
    assert engine.adapters.slots.evictions >= 40 and engine.adapters.host.evictions > 0
    assert set(engine.adapters._changes_text) == set(engine.adapters.slots.loaded())  # nothing is kept of the others
    for index, end in ends.items():
        assert int((end.int() - expected[index][0].int()).abs().max()) <= 1
    assert len({end.numpy().tobytes() for end in ends.values()}) == 60  # each its own picture
    engine.close()


def test_a_cold_adapter_is_loaded_once_for_all_that_wait_and_blocks_nobody(tiny: Base, shelf: Shelf) -> None:
    slow = Shelf(shelf.adapters)
    engine = Engine(tiny, small(), slow)
    run(engine, [engine.submit(ask("dog"))])
    slow.gate.clear()
    cold = [engine.submit(ask("cat", seed=seed)) for seed in range(5)]
    warm = engine.submit(ask("dog", steps=5))
    run(engine, [warm])
    assert not any(job.over for job in cold)
    slow.gate.set()
    run(engine, cold)
    assert slow.fetched.count(ref("cat")) == 1
    engine.close()


def test_replacing_and_deleting_in_flight(tiny: Base, shelf: Shelf, alone: dict[str, Tensor]) -> None:
    """A request finishes on the version it began with; the next one gets the new."""
    replaced = Shelf({**shelf.adapters, ref("cat", version="2"): shelf.adapters[ref("dog")]})
    engine = Engine(tiny, small(), replaced)
    old = engine.submit(MIXES["cat"])
    samples = list(old.samples)
    run_until(engine, lambda: samples[0].step == 1)
    del replaced.adapters[ref("cat")]
    engine.forget(ref("cat"))
    uses = ask("cat").adapters[0].model_copy(update={"ref": ref("cat", version="2")})
    new = engine.submit(ask(adapters=(uses,)))
    newer = list(new.samples)
    run(engine, [old, new])
    assert samples[0].latents is not None and near(samples[0].latents, alone["cat"][0])
    assert newer[0].latents is not None
    assert near(newer[0].latents, finished(engine, [ask("dog")])[0][0])
    engine.forget(ref("cat"))
    gone = engine.submit(ask("cat"))
    assert isinstance(run(engine, [gone])[gone], AdapterUnavailable)
    engine.close()


def test_words_of_an_adapter_are_its_requests_alone(tiny: Base, shelf: Shelf) -> None:
    """Textual inversion: `<s1>` means what the request's own adapter says, and nothing to a neighbour without it."""
    width = clip(tiny).get_input_embeddings().embedding_dim
    words = [{"<s1>": torch.randn(2, width, generator=torch.Generator().manual_seed(seed))} for seed in (1, 2)]
    low = random_adapter(tiny, 1, rank=1).modules
    adapters = {ref("one"): Adapter(low, words[0]), ref("two"): Adapter(low, words[1]), ref("none"): Adapter(low)}
    engine = Engine(tiny, small(), Shelf(adapters))
    requests = [ask(name, prompt="a photo of <s1>") for name in ("one", "two", "none")]
    alone = [finished(engine, [request])[0] for request in requests]
    for found, expected in zip(finished(engine, requests), alone, strict=True):
        assert near(found, expected)
    assert all(float((alone[i] - alone[i - 1]).abs().max()) > VISIBLE for i in range(3))
    engine.close()


def test_adapters_of_two_tenants_with_one_id_are_two_adapters(tiny: Base, shelf: Shelf) -> None:
    theirs = ref("cat", tenant="other")
    engine = Engine(tiny, small(), Shelf({**shelf.adapters, theirs: shelf.adapters[ref("dog")]}))
    use = ask("cat").adapters[0].model_copy(update={"ref": theirs})
    mine, other, dog = finished(engine, [ask("cat"), ask(adapters=(use,)), ask("dog")])
    assert near(other, dog) and float((mine - other).abs().max()) > VISIBLE
    engine.close()


# -- previews --


def test_previews_are_spread_over_the_run_and_change_nothing(engine: Engine, alone: dict[str, Tensor]) -> None:
    job = engine.submit(MIXES["long"].model_copy(update={"previews": 3}))
    samples = list(job.samples)
    guesses: list[Guess] = []
    while not job.over:
        if engine.idle:
            engine.woken.wait(0.02)
        guesses += [outcome for outcome in engine.step() if isinstance(outcome, Guess)]
    assert [(guess.number, guess.step) for guess in guesses] == [(0, 2), (1, 4), (2, 6)]
    assert all(guess.pixels.shape == (8, 8, 3) and guess.pixels.dtype == torch.uint8 for guess in guesses)
    assert samples[0].latents is not None and near(samples[0].latents, alone["long"][0])


def test_the_books_are_checked_at_every_step(engine: Engine) -> None:
    job = engine.submit(ask("cat", steps=9))
    run_until(engine, lambda: engine.scheduler.running_rows == 2)
    engine.adapters.slots.release([ref("cat")])
    with pytest.raises(AssertionError, match="1 adapters are worn, but 0 slots are pinned"):
        engine.step()
    assert not job.over


def test_loads_happen_on_other_threads(tiny: Base, shelf: Shelf) -> None:
    threads: set[str] = set()

    def fetch(key: object) -> Adapter:
        threads.add(threading.current_thread().name)
        return shelf.adapters[ref("cat")]

    engine = Engine(tiny, small(), fetch)
    finished(engine, [ask("cat")])
    assert threads and all(name.startswith("load-adapter") for name in threads)
    engine.close()
