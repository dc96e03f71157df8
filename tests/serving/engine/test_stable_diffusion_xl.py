"""Law 4 over Stable Diffusion XL: adapters of UNet, of both text encoders and of words, mixed in one engine."""

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from serving.engine.engine import Engine
from serving.engine.job import Guess, Sample
from serving.engine.request import GenerateRequest
from tests.families import write_family
from tests.serving.company import WIDE, Shelf, ask, finished, random_adapter, ref, small
from tests.serving.engine.test_engine import VISIBLE, near
from training.adapters.adapter import Adapter
from training.base.base import Base, load_base

MIXES: dict[str, GenerateRequest] = {
    "base": ask(),
    "cat": ask("cat"),
    "weak": ask(("cat", 0.25)),
    "two": ask(("cat", 0.7), ("dog", 0.6)),
    "wide": ask("wide", scheduler="euler", steps=5),
    "no-text": ask("no-text", negative_prompt="red water"),
    "second": ask("second"),
    "word": ask("word", prompt="a photo of <s1> dog"),
    "unguided": ask("dog", guidance_scale=1.0, scheduler="dpm++_2m", steps=4),
    "ancestral": ask("cat", steps=5, scheduler="euler_a", count=2),
    "long": ask(
        "cat", prompt="a photo of a dog on the grass in the snow on the beach of the red water in the blue toy"
    ),
    "wide picture": ask("dog", width=32, height=16),
}


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(write_family("sdxl", tmp_path_factory.mktemp("xl"))), device="cpu")


@pytest.fixture(scope="module")
def shelf(xl: Base) -> Shelf:
    adapters = {ref(name): random_adapter(xl, seed) for seed, name in enumerate(("cat", "dog"))}
    adapters[ref("wide")] = random_adapter(xl, 10, rank=8, targets=WIDE)
    adapters[ref("no-text")] = random_adapter(xl, 11, rank=2, text=False)
    both = random_adapter(xl, 12).modules
    adapters[ref("second")] = Adapter({key: low for key, low in both.items() if key.startswith("text_encoder_2.")})
    word = torch.randn(2, xl.facts.word_width, generator=torch.Generator().manual_seed(3))
    adapters[ref("word")] = Adapter({}, {"<s1>": word})
    return Shelf(adapters)


def test_a_row_beside_any_neighbours_equals_the_row_alone(xl: Base, shelf: Shelf) -> None:
    alone = {}
    for name, request in MIXES.items():
        engine = Engine(xl, small(), shelf)
        (alone[name],) = finished(engine, [request])
        engine.close()
    for index, name in enumerate(MIXES):
        for other in list(MIXES)[:index]:
            if alone[name].shape == alone[other].shape:
                assert float((alone[name] - alone[other]).abs().max()) > VISIBLE, (name, other)
    engine = Engine(xl, small(), shelf)
    for order in (list(MIXES), list(MIXES)[::-1]):
        for name, latents in zip(order, finished(engine, [MIXES[name] for name in order]), strict=True):
            assert near(latents, alone[name]), name
    assert engine.stats.rows > 4 * engine.stats.steps  # they did share forwards
    engine.close()


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_image_to_image_is_the_pipelines(xl: Base, shelf: Shelf, strength: float) -> None:
    image = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    engine = Engine(xl, small(), shelf)
    job = engine.submit(ask(steps=8, scheduler="euler", strength=strength, previews=1), image)
    others = [engine.submit(ask("cat")), engine.submit(ask("word", prompt="a <s1>"))]
    samples: list[Sample] = list(job.samples)
    guesses: list[Guess] = []
    while not all(one.over for one in (job, *others)):
        guesses += [outcome for outcome in engine.step() if isinstance(outcome, Guess)]
    engine.close()
    text = StableDiffusionXLPipeline.from_pretrained(xl.folder, local_files_only=True)
    reference = StableDiffusionXLImg2ImgPipeline(**text.components, add_watermarker=False)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        "a photo of a dog",
        image=image[None] / 255,
        strength=strength,
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    assert samples[0].latents is not None and samples[0].step == int(8 * strength)
    assert float((samples[0].latents - expected[0]).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert [guess.pixels.shape for guess in guesses] == [(8, 8, 3)]
