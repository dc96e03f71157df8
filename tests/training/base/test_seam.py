"""The seam holds: a base of another family trains, samples and is served by the same code, under the same laws."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from serving.engine.engine import Engine
from tests.flow import SCHEDULER, flow_base
from tests.serving.company import Shelf, ask, ref, run as serve, small
from tests.training.subjects import subject
from tests.training.trainer.test_pack import distance
from training.adapters.adapter import Adapter, LowRank, load_adapter, save_adapter
from training.adapters.bank import Bank
from training.adapters.layout import find_sites
from training.base.base import Base
from training.base.noise.process import Density
from training.base.stream import stream
from training.errors import UserError
from training.sampling.sampler import sample
from training.trainer.loop import train
from training.trainer.member import Subject
from training.trainer.pack import Pack, training_bank

PROMPTS = ("a photo of a dog", "a cat on the beach in the snow")


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return flow_base(tmp_path_factory.mktemp("flow"))


def random_adapter(base: Base, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for site in find_sites("transformer", base.denoiser, base.facts.layers):
        down = torch.randn(2, *site.down, generator=generator) / site.size(1) ** 0.5
        modules[site.key] = LowRank(down, torch.randn(site.out, 2, generator=generator) * 0.3)
    return Adapter(modules)


def learn(base: Base, subjects: Sequence[Subject], slots: int) -> dict[str, Adapter]:
    """What subjects learn in a pack of so many slots."""
    pack = Pack(base, training_bank(base, slots=slots, rank=8, targets={"transformer": base.facts.targets}))
    todo, learned = list(subjects), dict[str, Adapter]()

    def feed(count: int) -> list[Subject]:
        taken = todo[:count]
        del todo[:count]
        return taken

    for progress in train(pack, feed):
        learned |= {ended.id: pack.adapter(ended.id) for ended in progress.ended if ended.reason is None}
    pack.close()
    return learned


def test_a_subject_in_a_pack_equals_the_same_subject_alone(tmp_path: Path) -> None:
    base = flow_base(tmp_path, torch.float64)
    lora = {"text_encoder": False}
    todo = [
        subject("a", 1, lora=lora),
        subject("b", 2, lora=lora, instance_prompt="a photo of sks dog on the beach"),
        subject("c", 3, lora=lora, prior={"source": "prediction"}, train={"batch_size": 2}),
    ]
    together = learn(base, todo, slots=3)
    for one in todo:
        alone = learn(base, [one], slots=1)[one.spec.id]
        assert any(low.up.abs().max() > 1e-4 for low in alone.modules.values())
        assert distance(together[one.spec.id], alone) <= 1e-5


def test_the_loss_is_that_of_rectified_flow(flow: Base) -> None:
    """x = (1 - s) clean + s noise, towards noise - clean (Liu et al. 2022)."""
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = flow.process.levels([0.1, 0.5, 0.9], flow.device, torch.float32)
    s = torch.tensor([0.1, 0.5, 0.9]).view(-1, 1, 1, 1)
    assert torch.allclose(levels.noisy(clean, noise), (1 - s) * clean + s * noise)
    assert torch.allclose(levels.target(clean, noise), noise - clean)
    assert levels.times_N.tolist() == pytest.approx([100, 500, 900])
    with pytest.raises(ValueError, match="flow matching"):
        flow.process.snr_weights(levels.snr_N, torch.ones(3))


def test_noise_levels_are_drawn_by_the_density_asked_for(flow: Base) -> None:
    sizes = [(8, 8)] * 4000

    def drawn(density: Density) -> Tensor:
        return torch.tensor(flow.process.draw(stream(0, "x"), sizes, density))

    uniform, normal = drawn(Density()), drawn(Density("logit_normal", mean=0.0, std=1.0))
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.std() - 12**-0.5) < 0.02
    assert abs(normal.median() - 0.5) < 0.02 and normal.std() < 0.25
    assert abs(drawn(Density(shift=3.0)).median() - 0.75) < 0.02
    assert abs(drawn(Density(shift="resolution")).median() - 1.73 / 2.73) < 0.02


def plain(base: Base, prompt: str, seed: int, steps: int, guidance: float) -> Tensor:
    """diffusers' own scheduler over the transformer, a prompt at a time, as its pipeline does it."""
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    conds = [base.encode([text])[0]["states"][None] for text in (prompt, "")]
    for time in scheduler.timesteps:
        said, empty = (-base.denoiser(latents, states, (time / 1000).expand(1)).sample for states in conds)
        latents = scheduler.step(empty + guidance * (said - empty), time, latents).prev_sample
    return latents


@torch.no_grad()
def test_samples_are_those_of_diffusers_scheduler(flow: Base) -> None:
    noise = torch.randn((4, 8, 8), generator=stream(7, "sample"))
    found = sample(flow, ["a photo of a dog"], seeds=[7], steps=4, guidance_scale=1.0)
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(4)
    latents, states = noise[None], flow.encode(["a photo of a dog"])[0]["states"][None]
    for time in scheduler.timesteps:
        velocity = -flow.denoiser(latents, states, (time / 1000).expand(1)).sample
        latents = scheduler.step(velocity, time, latents).prev_sample
    assert (found - latents).abs().max() <= 1e-5


def test_requests_of_every_kind_share_an_engine_and_equal_themselves_alone(flow: Base) -> None:
    shelf = Shelf({ref(name): random_adapter(flow, seed) for seed, name in enumerate(("a", "b"))})
    asked = [
        ask("a", prompt=PROMPTS[0], scheduler="euler"),
        ask(("a", 0.5), ("b", -0.7), prompt=PROMPTS[1], scheduler="euler", negative_prompt="red"),
        ask(prompt=PROMPTS[0], scheduler="euler_a", steps=4),
        ask("b", prompt=PROMPTS[1], scheduler="dpm++_2m", steps=5, guidance_scale=1.0),
    ]

    def drawn(indices: Sequence[int]) -> list[Tensor]:
        engine = Engine(flow, small(), shelf)
        jobs = [engine.submit(asked[index]) for index in indices]
        ends = serve(engine, jobs)
        engine.close()
        return [end for job in jobs if isinstance(end := ends[job], Tensor)]

    together = drawn(range(len(asked)))
    assert len(together) == len(asked)
    for index, image in enumerate(together):
        (alone,) = drawn([index])
        assert (image.int() - alone.int()).abs().max() <= 1


@torch.no_grad()
def test_a_picture_is_that_of_a_plain_loop(flow: Base) -> None:
    engine = Engine(flow, small(), Shelf({}))
    job = engine.submit(ask(prompt="a photo of a dog", scheduler="euler", seed=5, steps=4))
    image = serve(engine, [job])[job]
    engine.close()
    assert isinstance(image, Tensor)
    pixels = flow.to_pixels(plain(flow, "a photo of a dog", 5, 4, 3.0))
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert (image.float() - expected).abs().max() <= 1


def test_a_sampler_of_another_process_is_refused_in_words(flow: Base) -> None:
    with pytest.raises(UserError, match="'ddim' is not for this base.*euler"):
        flow.process.schedule("ddim", 4)


def test_its_adapters_have_the_keys_that_diffusers_reads(flow: Base) -> None:
    adapter = random_adapter(flow, 3)
    back = load_adapter(save_adapter(adapter))
    assert distance(adapter, back) < 1e-2 and all(key.startswith("transformer.") for key in back.modules)
    bank = Bank({"transformer": find_sites("transformer", flow.denoiser, flow.facts.layers)}, slots=1, rank=2)
    bank.put(0, bank.pack(back))
    assert distance(bank.unpack(bank.take(0)), back) == 0
