"""The laws of the flow-matching families, each over a tiny base of the real classes."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import Tensor

from serving.engine.engine import Engine
from serving.engine.request import GenerateRequest
from tests.flow_families import as_noise, call, script_velocity, takes_negative, tiny_flow_base
from tests.serving.company import Shelf, finished, ref, small
from tests.training.subjects import spec
from training.adapters.adapter import Adapter, LowRank, load_adapter, save_adapter
from training.adapters.bank import find_sites
from training.adapters.formats.formats import export_adapter, import_adapter, label_of
from training.adapters.tensor_file import read_tensors
from training.base.base import Base, load_base
from training.base.family import Cond, RowFacts
from training.base.files.outline import outline
from training.base.names import canonical
from training.base.stream import shuffled, stream
from training.evaluation.judges.features import BaseFeatures
from training.manifest.plan import adapter_parameters
from training.sampling.render import adapter_bank
from training.sampling.sampler import sample
from training.trainer.checkpoint import SubjectState, dump_state, load_state
from training.trainer.latents import LatentSet, posteriors
from training.trainer.loop import train
from training.trainer.member import Subject
from training.trainer.pack import Pack, training_bank

TIGHT = 1e-5
PROMPTS = ("a photo of a dog", "a cat on the snow and the beach", "water")


@pytest.fixture(scope="module", params=["z-image", "klein", "flux"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flow_base(request.param, tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder), device="cpu")


@pytest.fixture(scope="module")
def base64(folder: Path) -> Base:
    return load_base(str(folder), device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    found = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


def routable(base: Base) -> tuple[str, ...]:
    return tuple(site.key for site in find_sites(base.facts.denoiser, base.denoiser, base.facts.layers))


def random_adapter(base: Base, seed: int, ends: Sequence[str], rank: int = 2, size: float = 0.3) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for site in find_sites(base.facts.denoiser, base.denoiser, ends):
        down = torch.randn(rank, *site.down, generator=generator) / site.size(1) ** 0.5
        modules[site.key] = LowRank(down, torch.randn(site.out, rank, generator=generator) * size)
    return Adapter(modules)


def inputs(base: Base, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Cond]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, base.facts.channels, *base.latent_size(32, 32), generator=generator)
    return x.to(dtype), torch.linspace(100, 900, rows), base.encode(PROMPTS[:rows])


# -- rows --


def test_rows_together_are_rows_alone_with_other_adapters_at_every_layer(base: Base) -> None:
    adapters = [random_adapter(base, seed, base.facts.layers) for seed in range(3)]
    bank = adapter_bank(base, adapters)
    assert {site.key for site in bank.sites["transformer"]} == set(routable(base))
    x, times, conds = inputs(base, 3)
    rows = [RowFacts(guidance=1.0 + row) for row in range(3)]
    bank.inject()
    try:
        with torch.no_grad(), bank.using(bank.route("transformer", torch.tensor([[0], [1], [2]]))):
            together = base.predict(x, times, conds, rows)
        plain = base.predict(x, times, conds, rows)
        for row in range(3):
            with torch.no_grad(), bank.using(bank.route("transformer", torch.tensor([[row]]))):
                alone = base.predict(x[row : row + 1], times[row : row + 1], conds[row : row + 1], rows[row : row + 1])
            assert (together[row] - alone[0]).abs().max() < 1e-4
            assert (together[row] - plain[row]).abs().max() > 1e-3
    finally:
        bank.eject()


def test_every_layer_that_is_left_out_mixes_rows_or_changes_nothing(base: Base) -> None:
    """What the family does not list would be wrong in a mixed batch: only layers where rows are one sequence."""
    listed = set(routable(base))
    others = [site for site in find_sites("transformer", base.denoiser, _names(base)) if site.key not in listed]
    x, times, conds = inputs(base, 3)
    for site in others:
        seen: list[Tensor] = []
        hook = site.layer.register_forward_hook(lambda _module, given, _output, seen=seen: seen.append(given[0]))
        base.predict(x, times, conds)
        hook.remove()
        assert all(len(given) != 3 for given in seen), site.key


def _names(base: Base) -> list[str]:
    return [name for name, _ in base.denoiser.named_modules() if name]


# -- pictures --


def request(prompt: str, seed: int, negative: str, **changes: Any) -> GenerateRequest:
    fields: dict[str, Any] = {
        "prompt": prompt, "negative_prompt": negative, "seed": seed, "steps": 4, "guidance_scale": 3.0,
        "width": 32, "height": 32, "scheduler": "euler",
    }  # fmt: skip
    return GenerateRequest.model_validate({**fields, **changes})


def test_served_rows_equal_the_pipeline(base: Base, pipeline: Any) -> None:
    """Requests of other prompts, seeds, guidance and steps in the same forwards."""
    negative = "a cat" if takes_negative(pipeline) else ""
    asked = [(PROMPTS[0], 1, negative, 4, 3.0), (PROMPTS[1], 2, "", 6, 1.7), (PROMPTS[2], 3, "", 4, 5.0)]
    engine = Engine(base, small(), Shelf({}))
    try:
        found = finished(
            engine,
            [
                request(text, seed, bad, steps=steps, guidance_scale=guidance)
                for text, seed, bad, steps, guidance in asked
            ],
        )
    finally:
        engine.close()
    for latents, (text, seed, bad, steps, guidance) in zip(found, asked, strict=True):
        generator = torch.Generator().manual_seed(seed)
        expected = call(pipeline, text, bad, guidance, num_inference_steps=steps, generator=generator)
        assert (latents - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("sister", ["klein-distilled", "flux-schnell"])
def test_a_few_step_sister_draws_without_guidance(sister: str, tmp_path: Path) -> None:
    """A request's guidance and negative prompt take no part."""
    found = load_base(str(tiny_flow_base(sister, tmp_path)), device="cpu")
    assert (found.facts.guidance, found.facts.negative, found.facts.steps) == ("none", False, 4)
    engine = Engine(found, small(), Shelf({}))
    try:
        (latents,) = finished(engine, [request(PROMPTS[0], 1, "red")])
    finally:
        engine.close()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / sister, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    expected = call(pipeline, PROMPTS[0], generator=torch.Generator().manual_seed(1))
    assert (latents - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_pictures_that_training_draws_equal_the_pipeline(base: Base, pipeline: Any) -> None:
    negative = "red" if takes_negative(pipeline) else ""
    noise = torch.randn(base.facts.channels, *base.latent_size(32, 32), generator=stream(7, "sample"))[None]
    drawn = sample(base, [PROMPTS[0]], seeds=[7], steps=4, guidance_scale=3.0, negative_prompt=negative, resolution=32)
    expected = call(pipeline, PROMPTS[0], negative, latents=as_noise(pipeline, noise))
    assert (drawn - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_latents_there_and_back(base: Base, pipeline: Any) -> None:
    """Pixels of latents are the pipeline's; latents of pixels are their inverse map."""
    latents, pictures = (
        call(pipeline, PROMPTS[0], output_type=kind, generator=torch.Generator().manual_seed(1))
        for kind in ("latent", "pt")
    )
    assert (base.to_pixels(latents) / 2 + 0.5 - pictures).abs().max() < 1e-5
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = base.to_latents(pixels)
    assert mean.shape == std.shape == (2, base.facts.channels, *base.latent_size(32, 32))
    with torch.no_grad():
        mode = pipeline.vae.encode(pixels).latent_dist.mode()
        expected = pipeline.vae.decode(mode).sample.clamp(-1, 1)
    assert torch.allclose(base.to_pixels(mean), expected, atol=1e-5)


def test_the_base_judges_pictures_by_its_own_features(base: Base) -> None:
    """Of a picture alone the same as beside another."""
    model = BaseFeatures(base)
    images = [Image.effect_noise((20, 20), 60 + 30 * index).convert("RGB") for index in range(2)]
    maps = model.maps(images)
    side = base.facts.resolution // base.facts.multiple_px
    assert maps.shape[0] == 2 and maps.shape[2:] == (side, side)
    torch.testing.assert_close(model.maps(images[1:]), maps[1:], atol=1e-4, rtol=1e-4)
    assert torch.isfinite(model.agree(images, ["a red dog", ""])).all()


# -- training --


def subject(base: Base, id: str, seed: int, **settings: Any) -> Subject:
    """Of random latents; the prior's are shared."""
    lora = {"rank": 4, "targets": list(base.facts.targets), "text_encoder": False}
    settings["train"] = {"seed": seed, "learning_rate": 1e-2, "max_steps": 3, **settings.get("train", {})}
    made = spec(id, lora=lora, **settings)
    shape = (base.facts.channels, *base.latent_size(32, 32))

    def latents(prompt: str, count: int, seed: int) -> LatentSet:
        mean = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
        return LatentSet(posteriors(mean, torch.full_like(mean, 0.1)), (prompt,) * count)

    return Subject(made, latents(made.filled_instance_prompt, 5, seed), latents(made.filled_class_prompt, 7, 1000))


def trained(
    base: Base, subjects: Sequence[Subject], slots: int = 1, stop: int | None = None, recompute: bool = False
) -> dict[str, SubjectState]:
    """The states of subjects at their ends, or after `stop` fused steps."""
    bank = training_bank(base, slots=slots, rank=4, targets={"transformer": base.facts.targets})
    pack = Pack(base, bank, gradient_checkpointing=recompute)
    todo, states = list(subjects), dict[str, SubjectState]()

    def feed(count: int) -> list[Subject]:
        taken = todo[:count]
        del todo[:count]
        return taken

    for turn, progress in enumerate(train(pack, feed), start=1):
        assert all(end.reason is None for end in progress.ended)
        for id in pack.ids if turn == stop else [end.id for end in progress.ended if end.id in pack.ids]:
            states[id] = pack.state(id)
        if turn == stop:
            break
    pack.close()
    return states


def distance(one: Adapter, other: Adapter) -> float:
    assert one.modules.keys() == other.modules.keys()
    pairs = [pair for key, low in one.modules.items() for pair in zip(low, other.modules[key], strict=True)]
    return max((part - twin).abs().max().item() for part, twin in pairs)


VARIED: dict[str, dict[str, Any]] = {
    "plain": {"prior": {"enabled": False}},
    "prior": {"train": {"max_steps": 4}},
    "prediction": {"prior": {"source": "prediction"}, "instance_prompt": "a photo of sks dog on the grass"},
    "batch": {"train": {"batch_size": 2, "gradient_accumulation_steps": 2}},
    "density": {"train": {"timesteps": {"density": "logit_normal", "mean": 0.5, "std": 0.8, "shift": 2.0}}},
}


def test_a_subject_in_a_pack_equals_the_same_subject_alone(base64: Base) -> None:
    subjects = [subject(base64, id, seed, **copy.deepcopy(VARIED[id])) for seed, id in enumerate(VARIED)]
    packed = trained(base64, subjects, slots=3)
    for one in subjects:
        id = one.spec.id
        alone = trained(base64, [one])[id].adapter
        assert distance(packed[id].adapter, alone) <= TIGHT, id
        assert min(low.up.abs().max().item() for low in alone.modules.values()) > 0, id


def test_recomputing_activations_changes_nothing(base64: Base) -> None:
    one = subject(base64, "a", 4)
    kept, recomputed = (trained(base64, [one], recompute=on)["a"].adapter for on in (False, True))
    assert distance(kept, recomputed) <= TIGHT
    assert not base64.denoiser.gradient_checkpointing


def test_resume_in_the_same_company_is_bit_exact(base: Base) -> None:
    subjects = [subject(base, "a", 1), subject(base, "b", 2, train={"max_steps": 5})]
    through = trained(base, subjects, slots=2)
    stopped = trained(base, subjects, slots=2, stop=2)
    resumed = [Subject(s.spec, s.instance, s.prior, load_state(dump_state(stopped[s.spec.id]))) for s in subjects]
    again = trained(base, resumed, slots=2)
    assert all(dump_state(state) == dump_state(again[id]) for id, state in through.items())


def by_script(family: str, base: Base, one: Subject) -> Adapter:
    """The usual script's loop, on the draws that the subject's seed stands for."""
    loop = one.spec.train
    transformer = copy.deepcopy(base.denoiser)
    names = [
        site.key.removeprefix("transformer.") for site in find_sites("transformer", transformer, base.facts.targets)
    ]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=names), transformer)
    layers = {name: p for name, p in transformer.named_parameters() if "lora" in name}
    for name, parameter in layers.items():
        if "lora_A" in name:
            key = canonical("transformer", name.split(".lora_")[0])
            parameter.data.copy_(torch.randn(parameter.shape, generator=stream(loop.seed, "init", key)) / 4)
    optimizer = torch.optim.AdamW(layers.values(), lr=loop.learning_rate, weight_decay=loop.adam_weight_decay)
    conds = base.encode([one.spec.filled_instance_prompt] * loop.batch_size)
    for step in range(loop.max_steps):
        generator = stream(loop.seed, "instance", step, 0)
        picked = shuffled(loop.seed, "instance", 5, step * loop.batch_size, loop.batch_size)
        clean = torch.stack(one.instance.draw(picked, generator))
        noise = torch.stack([torch.randn(image.shape, generator=generator) for image in clean]).double()
        sigmas = torch.rand(loop.batch_size, generator=generator).double()
        s = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - s) * clean.double() + s * noise
        prediction = script_velocity(family, transformer, noisy, sigmas, conds)
        torch.nn.functional.mse_loss(prediction, noise - clean.double()).backward()
        torch.nn.utils.clip_grad_norm_(layers.values(), loop.max_grad_norm or 1.0)
        optimizer.step()
        optimizer.zero_grad()
    downs = {name: p.detach() for name, p in layers.items() if "lora_A" in name}
    return Adapter(
        {
            canonical("transformer", name.split(".lora_")[0]): LowRank(
                down, layers[name.replace("lora_A", "lora_B")].detach()
            )
            for name, down in downs.items()
        }
    )


def test_training_is_the_usual_scripts(base64: Base, folder: Path) -> None:
    one = subject(base64, "a", 3, prior={"enabled": False}, train={"batch_size": 2})
    assert distance(trained(base64, [one])["a"].adapter, by_script(folder.name, base64, one)) <= TIGHT


# -- files --


def test_an_adapter_is_read_by_the_pipeline_and_draws_the_same_picture(
    base: Base, folder: Path, tmp_path: Path
) -> None:
    adapter = load_adapter(save_adapter(random_adapter(base, 1, base.facts.layers)))
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(save_adapter(adapter))
    theirs = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    engine = Engine(base, small(), Shelf({ref("a"): adapter}))
    worn = [{"ref": ref("a").model_dump(), "weight": 1.0}]
    try:
        with_it, without = finished(engine, [request(PROMPTS[0], 1, "", adapters=worn), request(PROMPTS[0], 1, "")])
    finally:
        engine.close()
    expected = call(theirs, PROMPTS[0], generator=torch.Generator().manual_seed(1))
    assert (with_it - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert (with_it - without).abs().max() > 1e-2
    back = import_adapter({"x.safetensors": save_adapter(adapter)}, routable(base))
    assert distance(back, adapter) == 0


def test_a_kohya_file_names_the_family_and_comes_back(base: Base, folder: Path) -> None:
    adapter = load_adapter(save_adapter(random_adapter(base, 1, base.facts.targets)))
    label = label_of("rusty", folder, 32)
    files = export_adapter(adapter, "kohya", label=label)
    assert label.architecture == base.facts.family
    assert read_tensors(files["rusty.safetensors"], "x", 2**30).metadata["ss_base_model_version"] == base.facts.family
    assert distance(import_adapter(files, routable(base)), adapter) == 0


# -- planning --


def test_the_outline_plans_what_training_makes(base: Base, folder: Path) -> None:
    found = outline(str(folder))
    one = subject(base, "a", 1)
    state = trained(base, [one])["a"]
    parameters = sum(part.numel() for low in state.adapter.modules.values() for part in low)
    assert adapter_parameters(one.spec, found) == parameters > 0
    assert found.facts == base.facts and not base.facts.min_snr
    assert base.facts.sampler in base.process.samplers
