"""The laws that every family keeps, each stated once and tested on a tiny base of each (`tests/families.py`)."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor

from serving.engine.engine import Engine
from serving.engine.request import GenerateRequest
from tests.families import FAMILIES, SISTERS, write_family
from tests.pipelines import as_noise, call, script_loss, takes_negative
from tests.serving.company import Shelf, ask, finished, ref, small
from tests.training.subjects import subject
from tests.training.trainer.test_pack import distance as apart, run
from training.adapters.adapter import Adapter, LowRank, load_adapter, save_adapter
from training.adapters.bank import Bank
from training.adapters.formats.formats import Format, export_adapter, import_adapter, label_of
from training.adapters.fuse import fuse_base
from training.adapters.layout import Site, find_sites
from training.base.base import Base, load_base
from training.base.family import RowFacts
from training.base.files.outline import outline
from training.base.noise.ddpm import Ddpm
from training.base.stream import stream
from training.errors import UserError
from training.evaluation.judges.features import BaseFeatures
from training.manifest.plan import adapter_parameters
from training.sampling.sampler import sample
from training.trainer.batch import Turn, make_batch
from training.trainer.checkpoint import dump_state, load_state
from training.trainer.member import Subject

CLOSE = 1e-4
VISIBLE = 1e-3  # the least that an adapter of these tests changes
PROMPTS = ("a photo of sks dog", "a cat on the beach", "red toy")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(request.param, tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder), device="cpu")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    """The family's diffusers pipeline, as everybody loads it. Unload what you load."""
    return open_pipeline(folder)


def open_pipeline(folder: Path) -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sites_of(base: Base) -> dict[str, tuple[Site, ...]]:
    """Every layer that an adapter of the family may change."""
    ends = dict.fromkeys(base.facts.text_encoders, base.facts.text_layers) | {base.facts.denoiser: base.facts.layers}
    return {component: find_sites(component, model, ends[component]) for component, model in base.models.items()}


def default_sites(base: Base) -> list[Site]:
    """The layers that are trained by default."""
    ends = dict.fromkeys(base.facts.text_encoders, base.facts.text_targets) | {base.facts.denoiser: base.facts.targets}
    return [site for name, model in base.models.items() for site in find_sites(name, model, ends[name])]


def adapter_over(sites: Iterable[Site], seed: int, size: float = 0.1) -> Adapter:
    """Noise in each of these layers, such as float16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for site in sites:
        down = torch.randn(2, *site.down, generator=generator) / site.size(1) ** 0.5
        up = torch.randn(site.out, 2, *(1,) * (len(site.down) - 1), generator=generator) * size
        modules[site.key] = LowRank(down.half().float(), up.half().float())
    return Adapter(modules)


def distance(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one.float() - other.float()).abs().max())


# -- 1 and 2: rows alone and together, with different adapters


def drawn(base: Base, bank: Bank, worn: Sequence[int]) -> Tensor:
    """What rows say that wear `worn`, from prompt to prediction; prompt, time, noise and sizes depend on the slot."""
    slots = torch.tensor(worn)[:, None]
    with bank.using(*(bank.route(component, slots) for component in bank.sites)):
        conds = base.encode([PROMPTS[slot] for slot in worn])
        times = torch.tensor([100.0 + 300 * slot for slot in worn])
        rows = [RowFacts((20 + slot, 30), (slot, 2), 1.0 + slot) for slot in worn]
        shape = (base.facts.channels, 8, 8)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(slot)) for slot in worn]
        return base.predict(torch.stack(noise), times, conds, rows)


@torch.no_grad()
def test_rows_with_different_adapters_at_every_layer_do_not_see_each_other(base: Base) -> None:
    sites = sites_of(base)
    bank = Bank(sites, slots=3, rank=2)
    plain = drawn(base, bank, [0, 1, 2])
    for slot in range(3):
        every = [site for found in sites.values() for site in found]
        bank.put(slot, bank.pack(adapter_over(every, slot)))
    bank.inject()
    together = drawn(base, bank, [0, 1, 2])
    alone = [drawn(base, bank, [slot]) for slot in range(3)]
    bank.eject()
    for slot in range(3):
        assert distance(together[slot], alone[slot][0]) < CLOSE
        assert distance(together[slot], plain[slot]) > VISIBLE
    assert torch.equal(drawn(base, bank, [0, 1, 2]), plain)


@torch.no_grad()
def test_every_layer_of_the_denoiser_moves_its_own_row_alone(base: Base) -> None:
    name, x = base.facts.denoiser, torch.randn(2, base.facts.channels, 8, 8)
    conds, times = base.encode(PROMPTS[:2]), torch.tensor([500.0, 500.0])
    plain = base.predict(x, times, conds)
    for site in sites_of(base)[name]:
        bank = Bank({name: [site]}, slots=1, rank=2)
        bank.put(0, bank.pack(adapter_over([site], 0, size=1.0)))
        bank.inject()
        with bank.using(bank.route(name, torch.tensor([[0], [-1]]))):
            changed = base.predict(x, times, conds)
        bank.eject()
        assert distance(changed[0], plain[0]) > 1e-5, site.key
        assert distance(changed[1], plain[1]) < 1e-5, site.key


def test_every_layer_that_is_left_out_would_mix_rows_or_changes_no_row(base: Base) -> None:
    """What a transformer's family does not list would be wrong in a mixed batch: there rows are one sequence."""
    if base.facts.denoiser == "unet":
        pytest.skip("a UNet has no such layer")
    listed = {site.key for site in sites_of(base)["transformer"]}
    every = find_sites("transformer", base.denoiser, [name for name, _ in base.denoiser.named_modules() if name])
    x, conds = torch.randn(3, base.facts.channels, 8, 8), base.encode(PROMPTS)
    for site in (site for site in every if site.key not in listed):
        seen: list[Tensor] = []
        hook = site.layer.register_forward_hook(lambda _module, given, _output, seen=seen: seen.append(given[0]))
        with torch.no_grad():
            base.predict(x, torch.tensor([100.0, 400.0, 700.0]), conds)
        hook.remove()
        assert all(len(given) != 3 for given in seen), site.key


# -- 3: sampling is the pipeline's


def as_close(found: Tensor, expected: Tensor) -> None:
    assert distance(found, expected) <= CLOSE * max(1.0, float(expected.abs().max()))


def serve(base: Base, adapters: dict[str, Adapter], *requests: GenerateRequest) -> list[Tensor]:
    """The latents of requests that are served together."""
    engine = Engine(base, small(), Shelf({ref(name): adapter for name, adapter in adapters.items()}))
    try:
        return finished(engine, list(requests))
    finally:
        engine.close()


def request(base: Base, *worn: tuple[str, float] | str, **changes: Any) -> GenerateRequest:
    """As `call` asks a pipeline, by the base's own sampler."""
    return ask(*worn, **{"prompt": PROMPTS[0], "steps": 4, "scheduler": base.facts.sampler, **changes})


def of_pipeline(pipeline: Any, asked: GenerateRequest) -> Tensor:
    generator = torch.Generator().manual_seed(asked.seed)
    made: Tensor = call(
        pipeline, asked.prompt, asked.negative_prompt, asked.guidance_scale, num_inference_steps=asked.steps,
        width=asked.width, height=asked.height, generator=generator,
    )  # fmt: skip
    return made


def test_pictures_of_requests_served_together_are_the_pipelines(base: Base, pipeline: Any) -> None:
    """Of other prompts, seeds, guidance, steps, sizes and samplers."""
    negative, wide = "red water" if takes_negative(pipeline) else "", 16 + 2 * base.facts.multiple_px
    asked = [
        request(base, negative_prompt=negative),
        request(base, seed=2, guidance_scale=1.7),
        request(base, prompt=PROMPTS[1], seed=3, steps=6, width=wide),
    ]
    for latents, one in zip(serve(base, {}, *asked, request(base, scheduler="dpm++_2m")), asked, strict=False):
        as_close(latents, of_pipeline(pipeline, one))


@pytest.mark.parametrize("sister", SISTERS)
def test_a_few_step_sister_draws_without_guidance(sister: str, tmp_path: Path) -> None:
    """A request's guidance and negative prompt take no part."""
    base = load_base(str(write_family(sister, tmp_path)), device="cpu")
    assert (base.facts.guidance, base.facts.negative, base.facts.steps) == ("none", False, 4)
    (latents,) = serve(base, {}, request(base, negative_prompt="red"))
    as_close(latents, of_pipeline(open_pipeline(base.folder), request(base)))


def test_pictures_that_training_draws_are_the_pipelines(base: Base, pipeline: Any) -> None:
    negative = "red" if takes_negative(pipeline) else ""
    own = pipeline.scheduler
    if isinstance(base.process, Ddpm):  # training draws with DDIM
        pipeline.scheduler = DDIMScheduler.from_config(base.process.config)
    noise = torch.randn(base.facts.channels, *base.latent_size(16, 16), generator=stream(7, "sample"))[None]
    drawn = sample(base, [PROMPTS[0]], seeds=[7], steps=4, guidance_scale=3.0, negative_prompt=negative, resolution=16)
    as_close(drawn, call(pipeline, PROMPTS[0], negative, latents=as_noise(pipeline, noise)))
    pipeline.scheduler = own


def test_requests_of_every_kind_equal_themselves_alone(base: Base) -> None:
    adapters = {name: adapter_over(default_sites(base), seed, size=0.3) for seed, name in enumerate("ab")}
    negative = "red" if base.facts.negative else ""
    asked = [
        request(base, "a"),
        request(base, ("a", 0.5), ("b", -0.7), prompt=PROMPTS[1], negative_prompt=negative),
        request(base, prompt=PROMPTS[1], scheduler="euler_a"),
        request(base, "b", prompt=PROMPTS[2], scheduler="dpm++_2m", steps=5, guidance_scale=1.0),
    ]
    for one, latents in zip(asked, serve(base, adapters, *asked), strict=True):
        as_close(latents, serve(base, adapters, one)[0])


# -- 4: latents there and back


@torch.no_grad()
def test_latents_are_decoded_as_the_pipeline_decodes_them(base: Base, pipeline: Any) -> None:
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    latents, pictures = (
        call(pipeline, PROMPTS[0], output_type=kind, generator=generator)
        for kind, generator in zip(("latent", "pt"), generators, strict=True)
    )
    assert distance((base.to_pixels(latents) / 2 + 0.5).clamp(0, 1), pictures) < CLOSE


@torch.no_grad()
def test_latents_go_there_and_back(base: Base) -> None:
    """What the encoder says is what the decoder is given, whatever space noise is added in."""
    vae: Any = base.parts.models["vae"]
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = base.to_latents(pixels)
    assert mean.shape == std.shape == (2, base.facts.channels, *base.latent_size(16, 16))
    posterior = vae.encode(pixels).latent_dist
    assert distance(base.to_pixels(mean), vae.decode(posterior.mean).sample.clamp(-1, 1)) < CLOSE


def test_the_base_judges_pictures_by_its_own_features(base: Base) -> None:
    """Of a picture alone the same as beside another."""
    model = BaseFeatures(base)
    images = [Image.effect_noise((20, 20), 60 + 30 * index).convert("RGB") for index in range(2)]
    maps = model.maps(images)
    assert maps.shape[0] == 2
    torch.testing.assert_close(model.maps(images[1:]), maps[1:], atol=CLOSE, rtol=CLOSE)
    assert torch.isfinite(model.agree(images, ["a red dog", ""])).all()


# -- 5: the loss is the usual script's


@torch.no_grad()
def test_the_first_loss_is_the_scripts(base: Base, pipeline: Any) -> None:
    train = {"crop": "bucket", "batch_size": 4}
    one = subject("one", 3, base.facts, train=train, lora={"text_encoder": False})
    batch = make_batch([Turn(one.spec, one.instance, one.prior, 0, 0)], base.process)
    rows = zip(batch.latents, batch.noise, batch.places, batch.prompts, batch.rows, strict=True)
    losses = [script_loss(pipeline, *row) for row in rows]
    with torch.enable_grad():
        (report,) = run(base, [one], stop=1).reports["one"]
    assert len({latent.shape for latent in batch.latents}) > 1
    assert report.instance_loss == pytest.approx(sum(losses[:4]) / 4, rel=CLOSE)
    assert report.prior_loss == pytest.approx(sum(losses[4:]) / 4, rel=CLOSE)


# -- 7 and 8: a subject in a pack is the subject alone, and goes on where it stopped

SUBJECTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket": {"train": {"crop": "bucket", "batch_size": 2}, "prior": {"enabled": False}},
    "prediction": {"prior": {"source": "prediction"}, "lora": {"rank": 4, "text_encoder": False}},
    "words": {"words": {"tokens": ["<s1>"]}, "instance_prompt": "a photo of <s1> dog"},
    "density": {"train": {"timesteps": {"density": "logit_normal", "mean": 0.5, "std": 0.8, "shift": 2.0}}},
}


def subjects_of(base: Base) -> list[Subject]:
    """Those of `SUBJECTS` that have a meaning on the base."""
    without = {"words" if not base.facts.word_widths else "", "density" if base.facts.min_snr else ""}
    settings = {id: copy.deepcopy(SUBJECTS[id]) for id in SUBJECTS if id not in without}
    return [subject(id, seed, base.facts, **asked) for seed, (id, asked) in enumerate(settings.items())]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_subject_in_a_pack_is_the_subject_alone(folder: Path, recompute: bool) -> None:
    base = load_base(str(folder), device="cpu", dtype=torch.float64)
    subjects = subjects_of(base)
    packed = run(base, subjects, slots=3, gradient_checkpointing=recompute).adapters
    for one in subjects:
        alone = run(base, [one]).adapters[one.spec.id]
        assert apart(packed[one.spec.id], alone) < 1e-5, one.spec.id
    moved = {key.partition(".")[0] for key, low in packed["plain"].modules.items() if low.up.any()}
    assert moved == set(base.facts.components)
    for word, vectors_VD in packed.get("words", Adapter({})).embeddings.items():
        for part in vectors_VD.sub(base.word_start("dog")).split(base.facts.word_widths, dim=-1):
            assert part.abs().max() > 1e-3, word


def test_stopped_and_resumed_is_never_stopped_bit_for_bit(base: Base) -> None:
    subjects = subjects_of(base)
    through = run(base, subjects, slots=4)
    stopped = run(base, subjects, slots=4, stop=2).states
    resumed = [Subject(s.spec, s.instance, s.prior, load_state(dump_state(stopped[s.spec.id]))) for s in subjects]
    again = run(base, resumed, slots=4)
    for id, state in through.states.items():
        assert dump_state(state) == dump_state(again.states[id])


def test_the_outline_plans_what_training_makes(base: Base, folder: Path) -> None:
    found, one = outline(str(folder)), subjects_of(base)[0]
    modules = run(base, [one], stop=1).adapters["plain"].modules
    assert adapter_parameters(one.spec, found) == sum(part.numel() for low in modules.values() for part in low) > 0
    assert found.facts == base.facts and base.facts.sampler in base.process.samplers


# -- 6: files that other programs read, and theirs


@pytest.fixture
def adapter(base: Base) -> Adapter:
    return adapter_over(default_sites(base), 5, size=0.3)


def drawn_with(pipeline: Any, base: Base, folder: Path, files: dict[str, bytes]) -> Tensor:
    """The pipeline's picture with an adapter that it loads from a folder of files."""
    (file,) = [name for name in files if not name.startswith("embeddings/")]
    folder.mkdir()
    (folder / file).write_bytes(files[file])
    try:
        pipeline.load_lora_weights(folder, weight_name=file)
        return of_pipeline(pipeline, request(base))
    finally:
        pipeline.unload_lora_weights()


def test_a_written_adapter_is_loaded_by_the_pipeline_and_draws_the_same(
    base: Base, pipeline: Any, adapter: Adapter, tmp_path: Path
) -> None:
    of = outline(str(base.folder))
    ours, without = serve(base, {"a": adapter}, request(base, "a"), request(base))
    assert distance(ours, without) > VISIBLE
    formats: tuple[Format, ...] = ("diffusers", "kohya")
    if base.facts.family == "flux-1":
        formats = ("diffusers",)  # diffusers reads the others at the real width alone: below
    elif base.facts.denoiser == "transformer":
        formats = (*formats, "ai_toolkit")
    for format in formats:
        files = export_adapter(adapter, format, of.shapes, label_of("rusty", base.facts), of.names)
        as_close(ours, drawn_with(pipeline, base, tmp_path / format, files))


@pytest.mark.parametrize("format", ["diffusers", "kohya", "ai_toolkit", "peft"])
def test_an_adapter_over_every_layer_comes_back_from_every_format(base: Base, format: Format) -> None:
    every = [site for found in sites_of(base).values() for site in found]
    widths, words = base.facts.word_widths, dict[str, Tensor]()
    if widths:
        words = {"<s1>": torch.ones(base.facts.word_width), "<s-1>": torch.ones(2, base.facts.word_width)}
    noted = {"word_widths": ",".join(map(str, widths))} if len(widths) > 1 else {}
    whole = Adapter(adapter_over(every, 6).modules, words, noted)
    of = outline(str(base.folder))
    if format == "ai_toolkit" and base.facts.denoiser == "unet":
        with pytest.raises(UserError, match="for bases whose denoiser is a transformer.*Export as kohya"):
            export_adapter(whole, format, of.shapes, None, of.names)
        return
    files = export_adapter(whole, format, of.shapes, label_of("rusty", base.facts), of.names)
    back = import_adapter(files, of.shapes, of.names)
    assert back.modules.keys() == whole.modules.keys() and back.metadata == noted
    assert all(torch.equal(back.embeddings[word], vectors) for word, vectors in words.items())
    for key, low in whole.modules.items():
        assert distance(back.modules[key].delta(), low.delta()) < CLOSE, key
    assert load_adapter(save_adapter(whole)).modules.keys() == whole.modules.keys()


def test_an_adapter_fused_into_its_base_draws_the_same(base: Base, adapter: Adapter, tmp_path: Path) -> None:
    words = {"<s1>": base.word_start("dog")[None] + 0.1} if base.facts.word_widths else {}
    fused = fuse_base(str(base.folder), [(Adapter(adapter.modules, words), 1.0)], tmp_path / "fused")
    assert fused.words == {word: [word] for word in words}
    again = load_base(str(tmp_path / "fused"), device="cpu")
    prompts = (PROMPTS[0], "a photo of <s1>")
    worn = serve(base, {"a": Adapter(adapter.modules, words)}, *(request(base, "a", prompt=text) for text in prompts))
    made = serve(again, {}, *(request(again, prompt=text) for text in prompts))
    for one, other in zip(worn, made, strict=True):
        assert distance(again.to_pixels(other), base.to_pixels(one)) < 2e-2  # weights of float16
