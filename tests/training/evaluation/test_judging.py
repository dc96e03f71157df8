"""Judging for real on the tiny base: company changes nothing, the chosen step is what is published, the gate holds."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from tests.tiny import tiny_images
from tests.training.subjects import latents, spec
from training.adapters.adapter import Adapter, LowRank, load_adapter
from training.adapters.layout import find_sites
from training.base.base import Base
from training.base.files.outline import outline
from training.base.stream import stream
from training.evaluation import evaluate
from training.evaluation.choose import choose
from training.evaluation.evaluate import Evaluation, evaluate_subjects
from training.evaluation.exam import Exam, bare_prompt, candidate_steps, prompts_of
from training.evaluation.judges.box import Judges
from training.evaluation.judges.features import BaseFeatures
from training.evaluation.record import load_record
from training.evaluation.reference import limit_above
from training.manifest.defaults import filled
from training.manifest.manifest import parse_manifest
from training.manifest.plan import plan_run
from training.manifest.subject import SubjectSpec
from training.photos.files import list_photo_files
from training.photos.intake import current_fingerprint, hold_out
from training.photos.photos import Photos, photos
from training.run.run import RunStore
from training.run.source import Beat, Orders, Outcome, Phase, Task
from training.sampling.render import Look, Shot, adapter_bank, render
from training.storage.card import Card
from training.storage.registry import Registry
from training.storage.storage import open_storage
from training.trainer.pack import Pack, training_bank
from training.trainer.worker.early_stop import EVERY, Watch
from training.trainer.worker.finishing import gate_failure
from training.trainer.worker.worker import work

FAST = {"steps": 2, "candidates": 2, "likeness_model": "base", "fidelity_model": "base"}


def adapter(base: Base, seed: int, size: float = 0.5, end: str = "to_q") -> Adapter:
    modules = {}
    for site in find_sites("unet", base.denoiser, (end,)):
        generator = stream(seed, site.key)
        down = torch.randn(2, *site.down, generator=generator)
        up = torch.randn(site.out, 2, generator=generator) * size
        modules[site.key] = LowRank(down, up)
    return Adapter(modules=modules)


def images(folder: Path, count: int = 3, seed: int = 0) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(tiny_images(folder, count, seed=seed).iterdir())]


def exam(base: Base, folder: Path, id: str, seed: int, **settings: Any) -> Exam:
    held = images(folder / id, 4, seed)
    made = spec(id, evaluate={**FAST, **settings.pop("evaluate", {})}, **settings)
    return Exam(made, held[:3], held[3:], {10: adapter(base, seed), 20: adapter(base, seed + 1)})


def judged_by(base: Base) -> Judges:
    model = BaseFeatures(base)
    return Judges(model, model, model)


def values(evaluation: Evaluation) -> dict[tuple[str, int | None], float]:
    return {(score.name, score.step): score.value for score in evaluation.scores}


# -- pictures --


def test_a_picture_does_not_depend_on_its_neighbours(tiny: Base) -> None:
    look = Look(2, 3.0, None)
    worn = [adapter(tiny, 0), adapter(tiny, 1, end="to_out.0")]
    shots = [Shot(slot, 1.0, "a photo of a dog", 3, look) for slot in (-1, 0, 1)]
    bank = adapter_bank(tiny, worn)
    bank.inject()
    try:
        together = render(tiny, bank, shots)
        alone = {shot: render(tiny, bank, [shot])[shot] for shot in shots}
    finally:
        bank.eject()
    for shot in shots:
        difference = np.asarray(together[shot], int) - np.asarray(alone[shot], int)
        assert np.abs(difference).max() <= 1
    assert len({picture.tobytes() for picture in together.values()}) == 3, "each wears its own"


def test_rendering_goes_on_with_fewer_rows_when_memory_is_out(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.sampling import render as module

    sizes: list[int] = []
    draw = module._draw

    def small(base: Base, bank: Any, batch: Sequence[Shot], look: Look) -> list[Image.Image]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return draw(base, bank, batch, look)

    monkeypatch.setattr(module, "_draw", small)
    bank = adapter_bank(tiny, [])
    shots = [Shot(-1, 1.0, "a dog", seed, Look(1, 1.0, None)) for seed in range(5)]
    assert len(render(tiny, bank, shots, rows=5)) == 5
    assert sizes == [5, 2, 2, 1]


def test_large_pictures_are_drawn_few_at_a_time(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are asked for, drawing holds no more memory than was planned."""
    from training.sampling import render as module

    sizes: list[int] = []
    draw = module._draw

    def counted(base: Base, bank: Any, batch: Sequence[Shot], look: Look) -> list[Image.Image]:
        sizes.append(len(batch))
        return draw(base, bank, batch, look)

    monkeypatch.setattr(module, "_draw", counted)
    monkeypatch.setattr("training.base.footprint.PICTURE_CELLS", 2 * tiny.cells())
    shots = [Shot(-1, 1.0, "a dog", seed, Look(1, 1.0, None)) for seed in range(5)]
    assert len(render(tiny, adapter_bank(tiny, []), shots)) == 5
    assert sizes == [2, 2, 1]


# -- evaluation --


def test_what_a_subject_scores_does_not_depend_on_its_company(tiny: Base, tmp_path: Path) -> None:
    exams = [exam(tiny, tmp_path, "a", 0), exam(tiny, tmp_path, "b", 5, lora={"rank": 2, "alpha": 1})]
    together = evaluate_subjects(tiny, exams, lambda _: judged_by(tiny), rows=7)
    for one, inside in zip(exams, together, strict=True):
        (alone,) = evaluate_subjects(tiny, [one], lambda _: judged_by(tiny), rows=32)
        assert values(alone) == pytest.approx(values(inside), abs=2e-3)
        assert alone.choice.step == inside.choice.step


def test_every_score_names_its_model_and_every_step_has_all(tiny: Base, tmp_path: Path) -> None:
    (found,) = evaluate_subjects(tiny, [exam(tiny, tmp_path, "a", 0)], lambda _: judged_by(tiny))
    assert {score.model for score in found.scores} <= {"base", "base map", "base, base", "laplacian", "hsv"}
    for step in (10, 20):
        names = {score.name for score in found.of_step(step)}
        assert names >= {"likeness", "likeness_training", "fidelity", "diversity", "pres", "class_drift", "copying"}
        assert names >= {"language_drift", "sharpness", "saturation", "balance"}
        assert "identity" not in names, "nobody looked for faces"
    assert set(found.pictures) == {10, 20} and len(found.bare) == len(found.prompts) == 3


def test_an_empty_adapter_is_the_base(tiny: Base, tmp_path: Path) -> None:
    one = replace(exam(tiny, tmp_path, "a", 0), checkpoints={1: adapter(tiny, 0, size=0.0)})
    (found,) = evaluate_subjects(tiny, [one], lambda _: judged_by(tiny))
    seen = values(found)
    assert seen["class_drift", 1] == 0 and seen["language_drift", 1] == pytest.approx(0, abs=1e-4)
    assert seen["pres", 1] == pytest.approx(seen["pres_of_the_base", None], abs=1e-3)


class _Palette:
    """A judge whose answers are known: the mean colour."""

    name = "palette"

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.nn.functional.normalize(self.maps(images).mean((2, 3)))

    def maps(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack(
            [torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1) / 255 for image in images]
        )

    def agree(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return torch.full((len(images),), torch.nan)


def test_scores_equal_the_formulas_on_the_pictures(tiny: Base, tmp_path: Path) -> None:
    one = exam(tiny, tmp_path, "a", 0)
    model = _Palette()
    (found,) = evaluate_subjects(tiny, [one], lambda _: Judges(model, model, model))
    bank = adapter_bank(tiny, [one.checkpoints[10]])
    bank.inject()
    try:
        look = Look(2, 3.0, None)
        prompts = prompts_of(one.spec)
        shots = [Shot(0, 1.0, prompts[0], 1, look)] + [Shot(0, 1.0, prompt, 0, look) for prompt in prompts]
        drawn = list(render(tiny, bank, shots).values())
    finally:
        bank.eject()
    expected = (model.embed(drawn) @ model.embed(one.held_out).T).mean()
    assert values(found)["likeness", 10] == pytest.approx(float(expected), abs=1e-3)
    assert ("fidelity", 10) not in values(found), "what nobody can judge has no score"


def test_prompts_and_candidates() -> None:
    made = spec("a", instance_prompt="a photo of sks {class}", evaluate={"prompts": ["sks {class} in the snow"]})
    assert prompts_of(made) == ("sks dog in the snow",)
    assert bare_prompt(made, "a photo of sks dog in the snow") == "a photo of dog in the snow"
    assert prompts_of(spec("a"))[1] == "a photo of sks dog in the snow"
    assert candidate_steps(1000, 5) == (200, 400, 600, 800, 1000)
    assert candidate_steps(2, 5) == (1, 2), "no step twice, none before the first"


def test_the_limit_of_copying_is_above_every_real_pair() -> None:
    rows = torch.nn.functional.normalize(torch.rand(4, 8, generator=torch.Generator().manual_seed(0)))
    pairs = rows @ rows.T - 2 * torch.eye(4)
    limit = limit_above(0.1, rows, rows.flip(1))
    assert 1 > limit > pairs.max()
    assert limit_above(0.999, rows, rows) == 0.999


# -- photos kept out --


def found_photos(folder: Path, count: int) -> Photos:
    return photos(list_photo_files(tiny_images(folder, count, side=32)), resolution=16, min_photos=1)


def test_held_out_photos_are_not_trained_on_and_the_same_each_time(tmp_path: Path) -> None:
    found = found_photos(tmp_path / "p", 7)
    made = spec("a", evaluate={"hold_out": 2})
    kept, held = hold_out(made, found)
    assert len(kept.good) == 5 and len(held) == 2
    assert {photo.name for photo in kept.good}.isdisjoint(photo.name for photo in held)
    again, same = hold_out(made, replace(found, good=found.good[::-1]))
    assert {photo.name for photo in same} == {photo.name for photo in held}
    assert [photo.name for photo in again.good] == [photo.name for photo in kept.good][::-1]


@pytest.mark.parametrize(
    ("count", "settings", "expected"),
    [(5, {}, 0), (6, {}, 1), (6, {"hold_out": 3}, 1), (9, {"enabled": False}, 0), (9, {"hold_out": 0}, 0)],
)
def test_min_images_stay(tmp_path: Path, count: int, settings: dict[str, Any], expected: int) -> None:
    kept, held = hold_out(spec("a", evaluate=settings), found_photos(tmp_path / "p", count))
    assert len(held) == expected and len(kept.good) == count - expected


# -- the worker --


class Source:
    """A manifest with one storage; hands out its subjects and keeps what it hears."""

    def __init__(self, folder: Path, base: Base, count: int = 6, **defaults: Any) -> None:
        tiny_images(folder / "x", count, side=32)
        entry = {"id": "a", "images": "x", "class": "dog", "prior": {"enabled": False}, **defaults}
        entry["train"] = {"max_steps": 6, "checkpoint_every": 100, "learning_rate": 1e-2, **defaults.get("train", {})}
        entry["evaluate"] = {**FAST, "candidates": 3, **defaults.get("evaluate", {})}
        text = {"version": 1, "name": "t", "base": str(base.folder), "subjects": [entry]}
        self.manifest = filled(parse_manifest(yaml.safe_dump(text), root=str(folder)), base.facts)
        self.storage = open_storage(str(folder / "storage"))
        self.run = RunStore(self.storage, "t-1")
        self.phases: set[Phase] = set()
        self.notes: list[str] = []
        self.outcome: Outcome | None = None
        self._todo: list[SubjectSpec] = list(self.manifest.subjects)
        self.base = base

    def lease(self, count: int) -> Sequence[Task]:
        taken, self._todo = self._todo, []
        root = self.manifest.root
        return [Task(s, current_fingerprint(s, self.base.hash, self.storage, root)) for s in taken]

    def beat(self, beat: Beat) -> Orders:
        self.phases |= {doing.phase for doing in beat.phase.values()}
        self.notes += beat.notes
        return Orders()

    def ended(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def work(self) -> Outcome:
        (pack,) = plan_run(self.manifest, outline(self.manifest.base)).packs
        work(self.base, pack, self, self.run, tenant="default", root=self.manifest.root)
        assert self.outcome is not None
        return self.outcome

    @property
    def card(self) -> Card:
        return Registry(self.storage).resolve("default/a").card


def _prefer(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes one step the best, whatever random pictures score."""

    def rigged(candidates: Sequence[Any], *, keep_last: bool) -> Any:
        return choose([replace(c, likeness=float(c.step == step), fidelity=1.0) for c in candidates])

    monkeypatch.setattr(evaluate, "choose", rigged)


def test_the_chosen_step_is_what_is_published(tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _prefer(4, monkeypatch)
    monkeypatch.setattr("training.trainer.worker.worker.BEAT_SECONDS", 0.0)
    source = Source(tmp_path, tiny)
    outcome = source.work()
    assert outcome.kind == "done", outcome.reason
    card = source.card
    assert card.chosen is not None and card.chosen.step == card.steps == 4
    assert "best balance" in card.chosen.reason
    assert {score.step for score in card.scores} == {2, 4, 6, None}
    assert len(card.image_hashes) == 5, "the photo kept out is not among those trained on"
    assert Phase.EVALUATING in source.phases
    (tmp_path / "short").mkdir()
    short = Source(tmp_path / "short", tiny, train={"max_steps": 4}, evaluate={"keep_last": True})
    assert short.work().kind == "done"
    resolved, other = Registry(source.storage).resolve("default/a"), Registry(short.storage).resolve("default/a")
    published = load_adapter(Registry(source.storage).weights(resolved))
    expected = load_adapter(Registry(short.storage).weights(other))
    for name, low_rank in expected.modules.items():
        assert torch.equal(published.modules[name].up, low_rank.up)


def test_the_record_is_kept_with_the_run(tiny: Base, tmp_path: Path) -> None:
    source = Source(tmp_path, tiny)
    source.work()
    record = load_record(source.run, "a")
    assert record is not None
    assert record.steps == (2, 4, 6) and record.chosen in record.steps
    assert len(record.photos) == 5 and len(record.held_out) == 1
    assert record.advice, "noise pictures deserve advice"
    sheet = source.storage.get(source.run.subject_key("a", "evaluation", "samples.webp"))
    assert sheet[8:12] == b"WEBP"
    text = json.dumps(record.model_dump(mode="json"))
    assert str(tmp_path) not in text, "no path of this machine"
    assert load_record(source.run, "b") is None


def test_what_fails_the_gate_is_not_published(tiny: Base, tmp_path: Path) -> None:
    source = Source(tmp_path, tiny, publish_if={"likeness": ">= 2"})
    outcome = source.work()
    assert outcome.kind == "bad subject" and outcome.version is None
    assert outcome.reason is not None and outcome.reason.startswith("below the gate: likeness is ")
    assert "(base), asked is >= 2; train longer" in outcome.reason
    assert source.run.checkpoints("a") == [2, 4, 6]


def test_a_gate_without_scores_is_refused_in_the_manifest(tiny: Base, tmp_path: Path) -> None:
    from training.errors import UserError

    with pytest.raises(UserError, match="`publish_if` needs scores"):
        Source(tmp_path, tiny, publish_if={"likeness": ">= 0"}, evaluate={"enabled": False})
    assert gate_failure(spec("a"), None) is None


def test_a_model_that_is_not_there_fails_before_training(tiny: Base, tmp_path: Path) -> None:
    outcome = Source(tmp_path, tiny, evaluate={"likeness_model": "dino"}).work()
    assert outcome.kind == "bad subject" and outcome.step == 0
    assert outcome.reason is not None and "DREAMFLEET_MODELS" in outcome.reason


def test_a_subject_that_has_settled_stops(tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.trainer.worker.early_stop.EVERY", 1)
    monkeypatch.setattr(
        "training.trainer.worker.early_stop.has_settled", lambda losses, window, share: len(losses) >= 3
    )
    source = Source(tmp_path, tiny, train={"max_steps": 50}, evaluate={"early_stop": True})
    outcome = source.work()
    assert outcome.kind == "done" and outcome.step == 3
    assert source.card.steps == 3


def test_looks_at_one_batch_depend_on_the_subject_alone(tiny: Base) -> None:
    made = [spec(id, evaluate={"early_stop": True}, train={"seed": seed}) for seed, id in enumerate("ab")]
    pack = Pack(tiny, training_bank(tiny, slots=2, rank=2, targets={"unet": ("to_q",)}))
    try:
        for slot, seed in ((0, 3), (1, 4)):
            pack.bank.put(slot, pack.bank.pack(adapter(tiny, seed)))
        watch = Watch(tiny)
        for one in made:
            watch.join(one.id, one, latents("a photo of sks dog", 5, seed=1))
        together = watch._look(pack.bank, {"a": (0, 1.0), "b": (1, 1.0)})
        assert watch._look(pack.bank, {"b": (1, 1.0)})["b"] == pytest.approx(together["b"], rel=1e-5)
        assert together["a"] != pytest.approx(together["b"], rel=1e-3)
        assert watch.is_due("a", EVERY) and not watch.is_due("a", EVERY + 1)
        watch.leave("a")
        assert not watch.is_due("a", EVERY)
    finally:
        pack.close()


def test_a_look_wears_the_words_that_have_been_trained(tiny: Base) -> None:
    """Under its word a subject's loss is another than under the characters that the word is written with."""
    one = spec("a", evaluate={"early_stop": True}, words={"tokens": ["<s1>"]}, instance_prompt="a photo of <s1> dog")
    pack = Pack(tiny, training_bank(tiny, slots=2, rank=2, targets={"unet": ("to_q",)}, words=1))
    try:
        for slot in (0, 1):
            word = {"<s1>": torch.randn(1, 32, generator=stream(slot, "word"))}
            pack.bank.put(slot, pack.bank.pack(replace(adapter(tiny, 3), embeddings=word)))
        watch = Watch(tiny)
        watch.join(one.id, one, latents(one.filled_instance_prompt, 5, seed=1))
        first, second = (watch._look(pack.bank, {"a": (slot, 1.0)})["a"] for slot in (0, 1))
        assert first != pytest.approx(second, rel=1e-6)
    finally:
        pack.close()
