"""The subject loop end to end, without Ray: photos in, published adapters out, whatever goes wrong on the way."""

import pydoc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny import tiny_images
from training.adapters.adapter import load_adapter
from training.adapters.bank import Bank
from training.base.base import Base
from training.base.files.outline import outline
from training.errors import UserError
from training.manifest.defaults import filled
from training.manifest.manifest import Manifest, parse_manifest
from training.manifest.plan import plan_run
from training.manifest.subject import SubjectSpec
from training.photos.intake import current_fingerprint, fingerprint
from training.run.run import RunStore
from training.run.source import Beat, Orders, Outcome, Task
from training.sampling import render
from training.storage.registry import Registry
from training.storage.storage import open_storage
from training.trainer import prior
from training.trainer.worker.worker import work

FAST: dict[str, Any] = {
    "class": "dog",
    "prior": {"images": 4, "steps": 2},
    "train": {"max_steps": 4, "checkpoint_every": 2, "learning_rate": 1e-2},
    "samples": {"steps": 2},
    "evaluate": {"enabled": False},  # tests/training/evaluation/test_judging.py has that
}


class Fleet:
    """A manifest, its folder and storage, and a source that hands out its subjects and keeps what it hears."""

    def __init__(self, folder: Path, base: Base, subjects: Sequence[dict[str, Any]], **defaults: Any) -> None:
        text = {
            "version": 1,
            "name": "test",
            "base": str(base.folder),
            "defaults": FAST | defaults,
            "subjects": subjects,
        }
        self.base = base
        self.manifest: Manifest = filled(parse_manifest(yaml.safe_dump(text), root=str(folder)), base.facts)
        self.storage = open_storage(str(folder / "storage"))
        self._todo: Sequence[SubjectSpec] = ()
        self.run = RunStore(self.storage, "test-1")
        self.outcomes: dict[str, Outcome] = {}
        self.steps: dict[str, list[int]] = {}
        self.orders: Callable[[Beat], Orders] = lambda beat: Orders()
        self.may_spread = False

    def lease(self, count: int) -> Sequence[Task]:
        taken, self._todo = self._todo[:count], self._todo[count:]
        return [Task(spec, self.fingerprint(spec.id), self.may_spread) for spec in taken]

    def beat(self, beat: Beat) -> Orders:
        for id, step in beat.steps.items():
            self.steps.setdefault(id, []).append(step)
        return self.orders(beat)

    def ended(self, outcome: Outcome) -> None:
        self.outcomes[outcome.id] = outcome

    def fingerprint(self, id: str) -> str:
        spec = next(spec for spec in self.manifest.subjects if spec.id == id)
        try:
            return current_fingerprint(spec, self.base.hash, self.storage, self.manifest.root)
        except Exception:
            return "0" * 64

    def work(self) -> dict[str, Outcome]:
        self._todo = list(self.manifest.subjects)
        for pack in plan_run(self.manifest, outline(self.manifest.base)).packs:
            work(self.base, pack, self, self.run, tenant="default", root=self.manifest.root)
        return self.outcomes


@pytest.fixture(autouse=True)
def _every_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.trainer.worker.worker.BEAT_SECONDS", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a", "b", "c")):
        tiny_images(tmp_path / name, side=40, seed=seed)
    return tmp_path


def entries(*ids: str) -> list[dict[str, Any]]:
    return [{"id": id, "images": id} for id in ids]


def test_subjects_are_published_with_everything_a_person_looks_for(folder: Path, tiny: Base) -> None:
    fleet = Fleet(folder, tiny, entries("a", "b"))
    outcomes = fleet.work()
    registry = Registry(fleet.storage)
    for id in ("a", "b"):
        assert outcomes[id].kind == "done"
        resolved = registry.resolve(f"default/{id}")
        assert resolved.version == outcomes[id].version
        assert (resolved.card.steps, resolved.card.run, resolved.card.trigger) == (4, "test-1", "sks dog")
        assert len(resolved.card.image_hashes) == 5
        files = registry.files(resolved)
        assert {"adapter.safetensors", "card.json", "loss.png", "samples/0.png", "samples/3.png"} <= set(files)
        card = registry.read(resolved, "card.json").decode()
        assert str(folder) not in card and str(tiny.folder) not in card


def test_files_and_subfolders_that_are_not_used_are_said(folder: Path, tiny: Base) -> None:
    (folder / "a/9.png").write_bytes(b"no picture")
    tiny_images(folder / "a/trip", count=2)
    fleet = Fleet(folder, tiny, entries("a"))
    notes: list[str] = []

    def listen(beat: Beat) -> Orders:
        notes.extend(beat.notes)
        return Orders()

    fleet.orders = listen
    outcome = fleet.work()["a"]
    assert outcome.kind == "done"
    for said in ("9.png is not used: not an image", "trip/ is not used: a subfolder"):
        assert any(note.startswith(f"a: {said}") for note in notes)
        assert any(warning.startswith(said) for warning in outcome.warnings)


def test_the_published_file_draws_in_diffusers_what_the_bank_draws(folder: Path, tiny: Base, tiny_folder: Path) -> None:
    fleet = Fleet(folder, tiny, entries("a"))
    version = fleet.work()["a"].version
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    before = draw(pipeline)
    pipeline.load_lora_weights(folder / "storage" / "adapters" / "default" / "a" / str(version) / "adapter.safetensors")
    assert (draw(pipeline) - before).abs().max() > 1e-4
    adapter = load_adapter(Registry(fleet.storage).weights(Registry(fleet.storage).resolve("a")))
    assert {key.split(".")[0] for key in adapter.modules} == {"unet", "text_encoder"}


def draw(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": generator}
    return pipeline("a photo of sks dog", **options).images


def test_a_corrupt_subject_costs_the_others_nothing(folder: Path, tiny: Base) -> None:
    (folder / "b" / "0.png").write_bytes(b"no picture at all")
    outcomes = Fleet(folder, tiny, [*entries("a", "b", "c"), {"id": "none", "images": "nowhere"}]).work()
    assert {id: outcome.kind for id, outcome in outcomes.items()} == {
        "a": "done",
        "c": "done",
        "b": "bad subject",
        "none": "bad subject",
    }
    assert "0.png" in str(outcomes["b"].reason)
    assert "nowhere" in str(outcomes["none"].reason)


def refuse(monkeypatch: pytest.MonkeyPatch, faults: dict[str, tuple[str, Callable[..., str]]]) -> None:
    """Makes each function fail, as no code expects, for the subject of its name; for others it does its work."""

    def broken(victim: str, of: Callable[..., str], real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if of(*given) == victim:
                raise ZeroDivisionError("planted")
            return real(*given, **named)

        return call

    for victim, (path, of) in faults.items():
        monkeypatch.setattr(path, broken(victim, of, pydoc.locate(path)))  # type: ignore[arg-type]


def test_any_error_of_one_subject_is_its_result_alone(
    folder: Path, tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 8: the others, in the same pack and at the same step, are published as if nothing had been."""
    faults: dict[str, tuple[str, Callable[..., str]]] = {
        "joining": ("training.trainer.pack.initial_adapter", lambda base, components, spec: spec.id),
        "judging": ("training.trainer.worker.finishing.Finishing._exam", lambda finishing, one: one.spec.id),
        "gate": ("training.trainer.worker.finishing.gate_failure", lambda spec, evaluation: spec.id),
        "publishing": (
            "training.trainer.worker.finishing.publish_subject",
            lambda run, tenant, base, publication: publication.finished.spec.id,
        ),
    }
    refuse(monkeypatch, faults)
    judged = {"steps": 1, "candidates": 1, "likeness_model": "base", "fidelity_model": "base", "hold_out": 0}
    subjects = [{"id": id, "images": "a"} for id in (*faults, "fine")]
    outcomes = Fleet(folder, tiny, subjects, evaluate=judged, samples={"images": 0}).work()
    kinds = {id: outcome.kind for id, outcome in outcomes.items()}
    assert kinds == dict.fromkeys(faults, "unknown") | {"fine": "done"}
    assert all("ZeroDivisionError: planted" in str(outcomes[id].reason) for id in faults)


def test_what_a_subject_can_do_without_costs_nobody_the_adapter(
    folder: Path, tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: dict[str, tuple[str, Callable[..., str]]] = {
        "sampling": ("training.sampling.samples._shots", lambda one, facts: one.spec.id),
        "checkpoint": ("training.run.run.RunStore.save_checkpoint", lambda run, id, *_: id),
        "look": ("training.trainer.worker.early_stop.Watch._has_settled", lambda watch, fixed: fixed.spec.id),
    }
    refuse(monkeypatch, faults)
    monkeypatch.setattr("training.trainer.worker.early_stop.EVERY", 2)
    notes: list[str] = []

    def listen(beat: Beat) -> Orders:
        notes.extend(beat.notes)
        return Orders()

    fleet = Fleet(
        folder,
        tiny,
        [{"id": id, "images": "a"} for id in (*faults, "fine")],
        train={**FAST["train"], "sample_every": 2},
        samples={"images": 1, "steps": 1},
        evaluate={"enabled": False, "early_stop": True},
    )
    fleet.orders = listen
    assert {outcome.kind for outcome in fleet.work().values()} == {"done"}
    assert {note.split(":")[0] for note in notes if "planted" in note} == set(faults)
    registry = Registry(fleet.storage)
    without = [id for id in fleet.outcomes if "samples/0.png" not in registry.files(registry.resolve(f"default/{id}"))]
    assert without == ["sampling"]


def test_on_the_way_out_one_that_cannot_be_kept_costs_no_other_its_checkpoint(
    folder: Path, tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, {"b": ("training.run.run.RunStore.save_checkpoint", lambda run, id, *_: id)})
    fleet = Fleet(folder, tiny, entries("b", "a"))
    fleet.orders = lambda beat: Orders(stop=beat.steps.get("a", 0) >= 1)
    with pytest.raises(ZeroDivisionError):  # not kept to itself either
        fleet.work()
    assert fleet.run.checkpoints("a") == [1]
    assert not any(module._forward_hooks for module in tiny.denoiser.modules())


def test_samples_are_as_many_as_asked_for_and_drawn_together(
    folder: Path, tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = render._draw

    def counted(base: Base, bank: Bank, batch: Sequence[render.Shot], look: render.Look) -> list[Image.Image]:
        drawn.append(len(batch))
        return draw(base, bank, batch, look)

    monkeypatch.setattr(render, "_draw", counted)
    prompts = [f"a photo of sks dog {place}" for place in ("on grass", "in snow", "in water", "on beach", "in red")]
    subjects: list[dict[str, Any]] = [
        {"id": "a", "images": "a", "samples": {"images": 2}},
        {"id": "b", "images": "b", "sample_prompts": prompts},
        {"id": "c", "images": "c", "samples": {"images": 0}},
    ]
    fleet = Fleet(folder, tiny, subjects)
    fleet.work()
    assert drawn == [2 + 5]
    registry = Registry(fleet.storage)
    found = {id: registry.files(registry.resolve(f"default/{id}")) for id in "abc"}
    assert {id: sum(name.startswith("samples/") for name in files) for id, files in found.items()} == {
        "a": 2,
        "b": 5,
        "c": 0,
    }


class Restless(Fleet):
    """Photos of `a` are replaced between the look at them, by which the result is known, and their reading."""

    def lease(self, count: int) -> Sequence[Task]:
        tasks = super().lease(count)
        if tasks:
            tiny_images(Path(self.manifest.root, "a"), side=40, seed=99)
        return tasks


def test_photos_that_changed_are_not_published_as_the_old_ones(folder: Path, tiny: Base) -> None:
    fleet = Restless(folder, tiny, entries("a", "b"))
    outcomes = fleet.work()
    assert (outcomes["a"].kind, outcomes["b"].kind) == ("bad subject", "done")
    assert "have changed since" in str(outcomes["a"].reason)
    assert Fleet(folder, tiny, entries("a")).work()["a"].kind == "done"


def test_other_class_images_are_another_training(folder: Path, tiny: Base) -> None:
    fleet = Fleet(folder, tiny, [{"id": "a", "images": "a", "prior": {"source": "folder", "folder": "b"}}])
    (one,) = fleet.manifest.subjects
    first = fleet.fingerprint("a")
    assert fleet.fingerprint("a") == first
    tiny_images(folder / "b", side=40, seed=99)
    assert fleet.fingerprint("a") != first
    with pytest.raises(UserError, match="prior.folder 'b' of subject 'a' is no folder"):
        fingerprint(one, tiny.hash, (), str(folder / "c"))


def test_what_this_device_cannot_hold_is_handed_on_if_somebody_takes_it(
    folder: Path, tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.trainer.memory.free_bytes", lambda device: 0)
    fleet = Fleet(folder, tiny, entries("a"))
    assert fleet.work()["a"].kind == "done"  # nobody does: it is tried
    fleet.may_spread = True
    outcome = fleet.work()["a"]
    assert outcome.kind == "too large" and "it takes 2 rows" in str(outcome.reason)


def test_a_stopped_worker_goes_on_from_its_checkpoint_bit_exact(folder: Path, tiny: Base, tmp_path: Path) -> None:
    """Law 3 through the storage: the same version as never stopped."""
    through = Fleet(folder, tiny, entries("a", "b"), train={**FAST["train"], "max_steps": 6}).work()
    fleet = Fleet(folder, tiny, entries("a", "b"), train={**FAST["train"], "max_steps": 6})
    fleet.storage = open_storage(str(tmp_path / "other"))
    fleet.run = RunStore(fleet.storage, "test-1")
    fleet.orders = lambda beat: Orders(stop=beat.steps.get("a", 0) >= 3)
    assert not fleet.work()
    assert fleet.run.checkpoints("a") == [2, 3]
    fleet.orders = lambda beat: Orders()
    again = fleet.work()
    assert min(fleet.steps["a"][-3:]) >= 4
    assert {id: o.version for id, o in again.items()} == {id: o.version for id, o in through.items()}


def test_a_torn_checkpoint_is_passed_over_for_an_earlier_one(folder: Path, tiny: Base) -> None:
    fleet = Fleet(folder, tiny, entries("a"))
    fleet.orders = lambda beat: Orders(stop=beat.steps.get("a", 0) >= 3)
    fleet.work()
    key = fleet.run.subject_key("a", "checkpoints", "00000003.safetensors")
    fleet.storage.put(key, fleet.storage.get(key)[:-100])
    notes: list[str] = []

    def listen(beat: Beat) -> Orders:
        notes.extend(beat.notes)
        return Orders()

    fleet.orders = listen
    assert fleet.work()["a"].kind == "done"
    assert any("step 3 is skipped" in note for note in notes)


def test_a_cancelled_subject_leaves_alone(folder: Path, tiny: Base) -> None:
    fleet = Fleet(folder, tiny, entries("a", "b"))
    fleet.orders = lambda beat: Orders(cancel=frozenset({"a"}) if beat.steps.get("a", 0) >= 2 else frozenset())
    outcomes = fleet.work()
    assert (outcomes["a"].kind, outcomes["b"].kind) == ("cancelled", "done")
    assert outcomes["a"].step == 2


def test_checkpoints_are_kept_n_and_events_are_there_while_it_trains(folder: Path, tiny: Base) -> None:
    train = {**FAST["train"], "max_steps": 8, "keep_checkpoints": 2, "sample_every": 4}
    fleet = Fleet(folder, tiny, entries("a"), train=train)
    fleet.work()
    assert fleet.run.checkpoints("a") == [6, 8]
    events = folder / "storage" / fleet.run.subject_key("a", "events")
    found = EventAccumulator(str(events)).Reload()
    assert len(found.Scalars("loss")) == 8
    assert {"images_per_second", "grad_norm", "learning_rate", "instance_loss", "prior_loss"} <= set(
        found.Tags()["scalars"]
    )
    assert [image.step for image in found.Images("sample/0")] == [4, 8]
    assert len(fleet.storage.list(fleet.run.subject_key("a", "samples"))) == 8


def test_captions_and_a_class_folder_are_used(folder: Path, tiny: Base) -> None:
    (folder / "a" / "0.txt").write_text("a photo of sks dog on the grass")
    tiny_images(folder / "class", count=6, side=40, seed=9)
    plain = Fleet(folder, tiny, entries("b")).work()["b"].version
    assert plain is not None
    with_folder = [{"id": "b2", "images": "b", "prior": {"source": "folder", "folder": "class"}}]
    assert Fleet(folder, tiny, with_folder).work()["b2"].version not in (None, plain)
    captioned = Fleet(folder, tiny, entries("a")).work()["a"].version
    (folder / "a" / "0.txt").unlink()
    assert Fleet(folder / "a", tiny, [{"id": "a", "images": str(folder / "a")}]).work()["a"].version != captioned


def test_words_that_no_caption_has_are_refused(folder: Path, tiny: Base) -> None:
    """Nothing would train them; a single photo that shows the word is enough."""
    for index in range(5):
        (folder / "a" / f"{index}.txt").write_text("a photo of sks dog on the grass")
    words = {"words": {"tokens": ["<s1>"]}, "instance_prompt": "a photo of <s1> dog"}
    outcome = Fleet(folder, tiny, [{"id": "a", "images": "a", **words}]).work()["a"]
    assert outcome.kind == "bad subject" and "'<s1>' of `words.tokens` is in none of the" in str(outcome.reason)
    (folder / "a" / "2.txt").write_text("a photo of <s1> dog on the grass")
    assert Fleet(folder, tiny, [{"id": "a", "images": "a", **words}]).work()["a"].kind == "done"


def test_a_prior_is_made_once_and_shared(folder: Path, tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[range] = []
    generate = prior._generate

    def counted(base: Base, subject: SubjectSpec, prompts: Sequence[str], indices: range) -> torch.Tensor:
        made.append(indices)
        return generate(base, subject, prompts, indices)

    monkeypatch.setattr(prior, "_generate", counted)
    Fleet(folder, tiny, entries("a", "b", "c")).work()
    assert made == [range(4)]


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 32},
        {"center_crop": False},
        {"crop": "bucket"},
        {"crop": "bucket", "batch_size": 2, "optimizer": "prodigy", "learning_rate": 1.0},
        {"flip": False},
        {"color_jitter": True},
        {"batch_size": 2},
        {"gradient_accumulation_steps": 2},
        {"learning_rate": 5e-3},
        {"text_encoder_learning_rate": 1e-3},
        {"lr_scheduler": "linear"},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 2},
        {"max_steps": 3},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.9},
        {"adam_weight_decay": 0.5},
        {"adam_epsilon": 1e-3},
        {"max_grad_norm": 1e-3, "adam_epsilon": 1e-3},
        {"min_snr_gamma": 1.0},
        {"noise_offset": 0.5},
        {"seed": 1},
    ],
    ids=lambda change: "-".join(f"{key}={value}" for key, value in change.items()),
)
def test_every_setting_has_an_effect(
    wide_photos: Path, unchanged: str, tiny: Base, tmp_path: Path, change: dict[str, Any]
) -> None:
    """A setting that changes nothing is a bug; so is one that cannot be trained with."""
    outcome = Fleet(tmp_path, tiny, [{"id": "a", "images": str(wide_photos)}], train=FAST["train"] | change).work()["a"]
    assert outcome.kind == "done", outcome.reason
    assert outcome.version != unchanged


@pytest.fixture(scope="module")
def wide_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that are not square, so that cropping matters."""
    folder = tiny_images(tmp_path_factory.mktemp("wide") / "a", side=60)
    for path in folder.glob("*.png"):
        Image.open(path).crop((0, 0, 60, 40)).save(path)
    return folder


@pytest.fixture(scope="module")
def unchanged(wide_photos: Path, tiny: Base, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The version that the settings as they are give."""
    folder = tmp_path_factory.mktemp("unchanged")
    return str(Fleet(folder, tiny, [{"id": "a", "images": str(wide_photos)}]).work()["a"].version)


def test_latents_from_the_cache_are_the_latents_that_were_made(folder: Path, tiny: Base, tmp_path: Path) -> None:
    """To the bit, in every step: their layout in memory decides how sums are rounded."""
    first = Fleet(folder, tiny, entries("a", "b"))
    made = first.work()
    again = Fleet(folder, tiny, entries("a", "b"))
    again.storage = open_storage(str(tmp_path / "other"))
    again.run = RunStore(again.storage, "test-1")
    for key in first.storage.list("cache"):
        again.storage.put(key, first.storage.get(key))
    assert {id: o.version for id, o in again.work().items()} == {id: o.version for id, o in made.items()}
