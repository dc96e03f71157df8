"""A search on the tiny base: variants share a pack, the worse leave it, and what wins is what a run trains."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tiny import tiny_images
from training import __main__ as program
from training.errors import UserError
from training.evaluation.choose import Candidate, Choice
from training.evaluation.evaluate import Evaluation
from training.evaluation.exam import Exam
from training.manifest.manifest import load_manifest
from training.run.run import RunStore, list_runs
from training.storage.storage import open_storage
from training.trainer.checkpoint import read_states
from training.trainer.member import StepReport
from training.trainer.pack import Pack
from training.tuning.report import write_found
from training.tuning.tune import Tuned, Tuning, tune


@dataclass(frozen=True)
class Bench:
    """A folder with a manifest of subjects and their photos."""

    folder: Path
    base: Path

    def manifest(self, *ids: str, **settings: Any) -> Path:
        for seed, id in enumerate(ids):
            tiny_images(self.folder / id, count=5, side=16, seed=seed)
        defaults = {
            "class": "dog",
            "min_images": 4,
            "prior": {"images": 2, "steps": 1},
            "samples": {"images": 0},
            "train": {"max_steps": 4, "checkpoint_every": 1, "learning_rate": 1e-2, "mixed_precision": "no"},
            "lora": {"rank": 2},
            "evaluate": {
                "steps": 1,
                "likeness_model": "base",
                "fidelity_model": "base",
                "keep_last": True,
                "candidates": 1,
            },
        }
        subjects = [{"id": id, "images": id} for id in ids]
        text = {"version": 1, "name": "pets", "base": str(self.base), "defaults": defaults, "subjects": subjects}
        for part, keys in settings.items():
            defaults[part] = {**defaults[part], **keys}  # type: ignore[dict-item]
        path = self.folder / "pets.yaml"
        path.write_text(yaml.safe_dump(text))
        return path

    def tune(self, *ids: str, asked: Tuning, **settings: Any) -> Tuned:
        return tune(self.manifest(*ids, **settings), open_storage(str(self.folder / "storage")), asked)


@pytest.fixture
def bench(tmp_path: Path, tiny_folder: Path) -> Bench:
    return Bench(tmp_path, tiny_folder)


@pytest.fixture
def by_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A judge to whom an adapter is the better the less it has changed."""

    def judged(_base: object, exams: Sequence[Exam], *_: object, **__: object) -> list[Evaluation]:
        found = []
        for exam in exams:
            ((step, adapter),) = exam.checkpoints.items()
            size = sum(low.delta().norm().item() for low in adapter.modules.values())
            candidate = Candidate(step, likeness=1 / (1 + size), fidelity=1.0)
            found.append(Evaluation(exam.spec.id, (), Choice(step, ""), (candidate,), ()))
        return found

    monkeypatch.setattr("training.tuning.search.evaluate_subjects", judged)
    yield


def test_the_winner_is_what_a_run_trains_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 2, with the judge and all settings that are searched, in fp64."""
    for where in ("training.trainer.fitting", "training.tuning.tune"):
        monkeypatch.setattr(f"{where}.precision", lambda *_: torch.float64)
    tuned = bench.tune("a", asked=Tuning(variants=3, at_once=2, seed=1), evaluate={"prompts": ["a photo of sks dog"]})
    assert {one.state for one in tuned.variants} == {"dropped", "finished"}
    assert len({one.settings["lora.rank"] for one in tuned.variants}) > 1
    best = tuned.best
    assert best is not None
    written = write_found(bench.folder / "pets.yaml", bench.folder / "out", tuned)
    assert written is not None
    assert (bench.folder / "out/scores.png").read_bytes().startswith(b"\x89PNG")
    (subject,) = load_manifest(written).subjects
    for name, value in best.settings.items():
        part, key = name.split(".")
        assert getattr(getattr(subject, part), key) == value

    assert program.train_manifest(str(written), str(bench.folder / "alone")) == 0
    storage = open_storage(str(bench.folder / "alone"))
    (run,) = list_runs(storage)
    state = next(state for step, state in read_states(RunStore(storage, run), "a") if step == 4)
    mine = tuned.learned[f"{best.number}/a"]
    assert mine.modules.keys() == state.learned.modules.keys()
    for key, low in mine.modules.items():
        assert (low.delta() - state.learned.modules[key].delta()).abs().max() < 1e-5, key
    assert max(low.delta().abs().max().item() for low in mine.modules.values()) > 1e-3


@pytest.mark.usefixtures("by_size")
def test_a_clearly_worse_setting_is_ranked_last_and_costs_a_quarter(bench: Bench) -> None:
    tuned = bench.tune("a", asked=Tuning(vary=("learning_rate",), variants=6), prior={"enabled": False})
    rates = [float(one.settings["train.learning_rate"]) for one in tuned.variants]
    assert rates[0] == min(rates) and rates[-1] == max(rates) > 2 * rates[0]
    assert tuned.variants[-1].state == "dropped"
    assert [rung.step for rung in tuned.variants[-1].rungs] == [1]
    assert tuned.steps == 6 * 1 + 3 * 1 + 2 * 2


@pytest.mark.usefixtures("by_size")
def test_several_subjects_are_tuned_together_and_further_variants_take_free_slots(bench: Bench) -> None:
    tuned = bench.tune("a", "b", asked=Tuning(("a", "b"), ("learning_rate",), variants=5, at_once=2))
    assert sorted(one.number for one in tuned.variants) == [0, 1, 2, 3, 4]
    assert all(one.state in ("dropped", "finished") for one in tuned.variants)
    assert tuned.best is not None
    assert {f"{tuned.best.number}/{id}" for id in "ab"} <= set(tuned.learned)


@pytest.mark.usefixtures("by_size")
def test_a_variant_that_diverges_costs_the_others_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench.tune("a", asked=Tuning(vary=("learning_rate",), variants=3), prior={"enabled": False})
    step: Callable[[Pack], list[StepReport]] = Pack.step

    def breaking(pack: Pack) -> list[StepReport]:
        return [r._replace(failure="diverged: for the test") if r.id == "1/a" else r for r in step(pack)]

    monkeypatch.setattr(Pack, "step", breaking)
    tuned = bench.tune("a", asked=Tuning(vary=("learning_rate",), variants=3), prior={"enabled": False})
    assert (tuned.variants[-1].number, tuned.variants[-1].state) == (1, "failed")
    assert tuned.variants[-1].reason == "diverged: for the test"
    rungs = {one.number: one.rungs for one in whole.variants}
    for one in tuned.variants[:-1]:
        assert one.rungs[0].score == pytest.approx(rungs[one.number][0].score, rel=1e-4)


@pytest.mark.parametrize(
    ("ids", "asked", "settings", "message"),
    [
        ("a", Tuning(), {"evaluate": {"enabled": False}}, "`evaluate.enabled` of subject 'a' is false"),
        ("ab", Tuning(), {}, "has 2 subjects: a, b. Say which to tune: --subject ID"),
        ("a", Tuning(("z",)), {}, "Subject 'z' is not in the manifest. It has a."),
    ],
)
def test_what_cannot_be_tuned_is_said(
    bench: Bench, ids: str, asked: Tuning, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        bench.tune(*ids, asked=asked, **settings)


def test_subjects_with_different_steps_are_not_compared(bench: Bench) -> None:
    path = bench.manifest("a", "b")
    raw = yaml.safe_load(path.read_text())
    raw["subjects"][1]["train"] = {"max_steps": 9}
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match="`train.max_steps` is 4 for 'a' and 9 for 'b'"):
        tune(path, open_storage(str(bench.folder / "storage")), Tuning(("a", "b")))
