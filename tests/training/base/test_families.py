"""The laws that every family keeps, each stated once and tested on a tiny base of each (`tests/families.py`)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from serving.engine.engine import Engine
from tests.families import FAMILIES, write_family
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
from training.trainer.batch import Batch, Turn, make_batch
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
        rows = [RowFacts((20 + slot, 30), (slot, 2)) for slot in worn]
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


# -- 3: sampling is the pipeline's


def drawn_by(pipeline: Any, base: Base, **settings: Any) -> Tensor:
    """A picture [1, 3, H, W] of the pipeline, in [0, 1]."""
    made: Tensor = pipeline(
        PROMPTS[0], num_inference_steps=5, guidance_scale=3.0, output_type="pt",
        height=base.facts.resolution, generator=torch.Generator().manual_seed(1), **settings,
    ).images  # fmt: skip
    return made


def served(base: Base, adapters: dict[str, Adapter], *worn: str, **settings: Any) -> Tensor:
    """The same of the serving engine, beside two other requests."""
    side = base.facts.resolution
    asked = {
        "prompt": PROMPTS[0],
        "steps": 5,
        "scheduler": base.facts.sampler,
        "width": side,
        "height": side,
        **settings,
    }
    engine = Engine(base, small(), Shelf({ref(name): adapter for name, adapter in adapters.items()}))
    others = [ask(prompt=PROMPTS[1], steps=3), ask(seed=7, steps=4, scheduler="dpm++_2m")]
    latents, *_ = finished(engine, [ask(*worn, **(asked | settings)), *others])
    engine.close()
    return (base.to_pixels(latents) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("negative", ["", "red water"])
def test_a_picture_is_the_pipelines(base: Base, pipeline: Any, negative: str) -> None:
    expected = drawn_by(pipeline, base, width=base.facts.resolution, negative_prompt=negative or None)
    assert distance(served(base, {}, negative_prompt=negative), expected) < CLOSE


def test_a_picture_that_is_not_square_is_the_pipelines(base: Base, pipeline: Any) -> None:
    wide = base.facts.resolution + 2 * base.facts.multiple_px
    assert distance(served(base, {}, width=wide), drawn_by(pipeline, base, width=wide)) < CLOSE


# -- 4: latents there and back


@torch.no_grad()
def test_latents_are_decoded_as_the_pipeline_decodes_them(base: Base, pipeline: Any) -> None:
    latents = torch.randn(1, base.facts.channels, 8, 8)

    def end(_pipeline: Any, _step: int, _time: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"latents": latents}

    expected = pipeline("a", num_inference_steps=1, height=16, width=16, output_type="pt", callback_on_step_end=end)
    assert distance((base.to_pixels(latents) / 2 + 0.5).clamp(0, 1), expected.images) < CLOSE


@torch.no_grad()
def test_latents_go_there_and_back(base: Base) -> None:
    """What the encoder says is what the decoder is given, whatever space noise is added in."""
    vae: Any = base.parts.models["vae"]
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = base.to_latents(pixels)
    posterior = vae.encode(pixels).latent_dist
    assert distance(base.to_pixels(mean), vae.decode(posterior.mean).sample.clamp(-1, 1)) < CLOSE
    more = base.to_pixels(mean + std)
    assert distance(more, vae.decode(posterior.mean + posterior.std).sample.clamp(-1, 1)) < CLOSE


# -- 5: the loss is the usual script's


def script_loss(pipeline: Any, batch: Batch, row: int) -> float:
    """The loss of one row by diffusers' train_dreambooth_lora.py and train_dreambooth_lora_sdxl.py."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    clean, noise, prompt = batch.latents[row][None], batch.noise[row][None], batch.prompts[row]
    time = torch.tensor([int(batch.places[row])])
    found = pipeline.encode_prompt(
        prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    given: dict[str, Any] = {"encoder_hidden_states": found[0]}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        original, crop = batch.rows[row].original_px, batch.rows[row].crop_px
        assert original is not None and crop is not None
        target = [side * pipeline.vae_scale_factor for side in clean.shape[2:]]
        given["added_cond_kwargs"] = {"text_embeds": found[2], "time_ids": torch.tensor([[*original, *crop, *target]])}
    said = pipeline.unet(scheduler.add_noise(clean, noise, time), time, **given).sample
    learns_noise = scheduler.config.prediction_type == "epsilon"
    goal = noise if learns_noise else scheduler.get_velocity(clean, noise, time)
    return float(torch.nn.functional.mse_loss(said.float(), goal.float()))


@torch.no_grad()
def test_the_first_loss_is_the_scripts(base: Base, pipeline: Any) -> None:
    one = subject("one", seed=3, train={"crop": "bucket", "batch_size": 4}, lora={"text_encoder": False})
    batch = make_batch([Turn(one.spec, one.instance, one.prior, 0, 0)], base.process)
    losses = [script_loss(pipeline, batch, row) for row in range(8)]
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
}


@pytest.mark.parametrize("recompute", [False, True])
def test_a_subject_in_a_pack_is_the_subject_alone(folder: Path, recompute: bool) -> None:
    base = load_base(str(folder), device="cpu", dtype=torch.float64)
    subjects = [subject(id, seed=seed, **settings) for seed, (id, settings) in enumerate(SUBJECTS.items())]
    packed = run(base, subjects, slots=3, gradient_checkpointing=recompute).adapters
    for one in subjects:
        alone = run(base, [one]).adapters[one.spec.id]
        assert apart(packed[one.spec.id], alone) < 1e-5, one.spec.id
    moved = {key.partition(".")[0] for key, low in packed["plain"].modules.items() if low.up.any()}
    assert moved == set(base.facts.components)
    start = base.word_start("dog")
    for vectors in packed["words"].embeddings["<s1>"].sub(start).split(base.facts.word_widths, dim=-1):
        assert vectors.abs().max() > 1e-3


def test_stopped_and_resumed_is_never_stopped_bit_for_bit(base: Base) -> None:
    subjects = [subject(id, seed=seed, **settings) for seed, (id, settings) in enumerate(SUBJECTS.items())]
    through = run(base, subjects, slots=4)
    stopped = run(base, subjects, slots=4, stop=2).states
    resumed = [Subject(s.spec, s.instance, s.prior, load_state(dump_state(stopped[s.spec.id]))) for s in subjects]
    again = run(base, resumed, slots=4)
    for id, state in through.states.items():
        assert dump_state(state) == dump_state(again.states[id])


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
        return drawn_by(pipeline, base, width=base.facts.resolution)
    finally:
        pipeline.unload_lora_weights()


def test_a_written_adapter_is_loaded_by_the_pipeline_and_draws_the_same(
    base: Base, pipeline: Any, adapter: Adapter, tmp_path: Path
) -> None:
    label = label_of("rusty", base.folder, base.facts.resolution)
    modules = outline(str(base.folder)).shapes.keys()
    ours = served(base, {"a": adapter}, "a")
    assert distance(ours, served(base, {})) > VISIBLE
    formats: tuple[Format, ...] = ("diffusers", "kohya")
    for format in formats:
        files = export_adapter(adapter, format, modules, label)
        assert distance(drawn_with(pipeline, base, tmp_path / format, files), ours) < CLOSE, format


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_an_adapter_over_every_layer_comes_back_from_every_format(base: Base, format: Format) -> None:
    every = [site for found in sites_of(base).values() for site in found]
    words = {"<s1>": torch.ones(base.facts.word_width), "<s-1>": torch.ones(2, base.facts.word_width)}
    widths = base.facts.word_widths
    noted = {"word_widths": ",".join(map(str, widths))} if len(widths) > 1 else {}
    whole = Adapter(adapter_over(every, 6).modules, words, noted)
    label = label_of("rusty", base.folder, base.facts.resolution)
    modules = outline(str(base.folder)).shapes.keys()
    files = export_adapter(whole, format, modules, label)
    back = import_adapter(files, modules)
    assert back.modules.keys() == whole.modules.keys() and back.metadata == noted
    assert all(torch.equal(back.embeddings[word], vectors) for word, vectors in words.items())
    for key, low in whole.modules.items():
        assert distance(back.modules[key].delta(), low.delta()) < CLOSE, key
    assert load_adapter(save_adapter(whole)).modules.keys() == whole.modules.keys()


def test_an_adapter_fused_into_its_base_draws_the_same(base: Base, adapter: Adapter, tmp_path: Path) -> None:
    words = {"<s1>": base.word_start("dog")[None] + 0.1}
    fused = fuse_base(str(base.folder), [(Adapter(adapter.modules, words), 1.0)], tmp_path / "fused")
    assert fused.words == {"<s1>": ["<s1>"]}
    again = load_base(str(tmp_path / "fused"), device="cpu")
    assert distance(served(again, {}), served(base, {"a": adapter}, "a")) < 1e-2  # weights of float16
    worn = served(base, {"a": Adapter(adapter.modules, words)}, "a", prompt="a photo of <s1>")
    assert distance(served(again, {}, prompt="a photo of <s1>"), worn) < 1e-2
