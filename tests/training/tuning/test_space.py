"""What is searched, what is tried, and who goes on: without a model."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training.subjects import spec
from training.errors import UserError
from training.evaluation.choose import Candidate
from training.manifest.manifest import load_manifest
from training.tuning.asker import Asker
from training.tuning.space import SEARCHED, Between, OneOf, own_setting, space_around, with_settings
from training.tuning.tuned import write_tuned
from training.tuning.variant import Variant, best_of, goes_on, planned_steps, ranked, rung_of, rung_steps


def test_the_space_lies_around_the_subjects_own_settings() -> None:
    space = space_around(spec("a", train={"learning_rate": 0.004}, lora={"rank": 8}))
    assert set(space.axes) == set(SEARCHED)
    assert space.axes["train.learning_rate"] == Between(0.001, 0.016)
    assert space.axes["lora.rank"] == OneOf((2, 4, 8, 16), ordered=True)
    assert space.own["lora.rank"] == 8
    assert space_around(spec("a", lora={"rank": 8}), max_rank=64).axes["lora.rank"] == OneOf(
        (2, 4, 8, 16, 32, 64), ordered=True
    )


def test_what_has_no_meaning_for_a_subject_is_not_searched() -> None:
    space = space_around(spec("a", prior={"enabled": False}, lora={"text_encoder": False}))
    assert set(space.axes) == {"train.learning_rate", "lora.rank", "train.lr_scheduler"}
    with pytest.raises(UserError, match=r"`prior.weight` of subject 'a' cannot be varied: `prior.enabled` is false"):
        space_around(spec("a", prior={"enabled": False}), ["weight"])


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("learning_rat", r"'learning_rat' is no setting.*Did you mean 'learning_rate'\?.*lora.rank"),
        ("zzz", "Known are"),
    ],
)
def test_an_unknown_setting_is_refused_in_words(vary: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        space_around(spec("a"), [vary])


def test_a_highest_rank_below_the_subjects_own_is_refused() -> None:
    with pytest.raises(UserError, match="highest rank to try is 4; allowed are 8"):
        space_around(spec("a", lora={"rank": 8}), max_rank=4)


def test_settings_are_asked_from_the_own_ones_on_within_the_space_and_the_same_for_a_seed() -> None:
    subject = spec("a", lora={"rank": 8})
    space = space_around(subject)

    def asked(seed: int) -> list[dict[str, Any]]:
        asker = Asker(space, random=3, seed=seed)
        found = []
        for _ in range(6):
            number, settings = asker.ask()
            asker.score(number, 1, 0.1 * number)
            asker.finish(number, 0.1 * number)
            found.append(dict(settings))
        return found

    first = asked(0)
    assert first == asked(0) != asked(1)
    assert first[0] == {name: own_setting(subject, name) for name in space.axes}
    for settings in first:
        made = with_settings(subject, settings)
        assert type(made).model_validate(made.model_dump(by_alias=True)) == made
        for name, axis in space.axes.items():
            value = settings[name]
            assert axis.low * 0.99 <= value <= axis.high * 1.01 if isinstance(axis, Between) else value in axis.values


def variant(number: int, *scores: float, **about: Any) -> Variant:
    steps = (25, 50, 100)
    rungs = [
        rung_of(step, {"a": Candidate(step, likeness=score, fidelity=score)})
        for step, score in zip(steps, scores, strict=False)
    ]
    return Variant(number, {"train.learning_rate": 0.1}, (spec("a"),), rungs, **about)


def test_the_better_half_of_all_at_a_step_goes_on() -> None:
    early = [variant(0, 0.2), variant(1, 0.4), variant(2, 0.6, 0.1), variant(3, 0.8)]
    assert [goes_on(one, early) for one in (early[0], early[1], early[3])] == [False, False, True]
    equal = [variant(number, 0.0) for number in range(3)]
    assert [goes_on(one, equal) for one in equal] == [True, True, False]
    late = variant(4, 0.7)
    assert goes_on(late, [*early, late])
    assert rung_steps(350) == (88, 175, 350)
    assert planned_steps(8, 1, 100) == 8 * 25 + 4 * 25 + 2 * 50


def test_the_ranking_goes_by_how_far_a_variant_came_then_by_its_score() -> None:
    variants = [
        variant(0, 0.9, state="dropped"),
        variant(1, 0.5, 0.5, 0.5, state="finished"),
        variant(2, 0.5, 0.5, 0.6, state="finished"),
        variant(3, 0.95, 0.95, state="failed", reason="diverged"),
    ]
    assert [one.number for one in ranked(variants)] == [2, 1, 0, 3]
    best = best_of(variants)
    assert best is not None and best.number == 2
    assert best_of(variants[:1]) is None


def test_a_step_with_an_alarm_is_below_every_one_without() -> None:
    alarmed = rung_of(5, {"a": Candidate(5, likeness=1.0, fidelity=1.0, drift=0.9, drift_limit=0.5)})
    sound = rung_of(5, {"a": Candidate(5, likeness=-0.1, fidelity=0.2, drift=0.1, drift_limit=0.5)})
    assert alarmed.key < sound.key < rung_of(5, {"a": Candidate(5, likeness=0.0, fidelity=1.0)}, cosine=0.1).key
    assert "turns into the subject" in alarmed.alarms[0]


def test_the_tuned_manifest_says_the_same_from_another_folder(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    path = tmp_path / "from/pets.yaml"
    text = {
        "version": 1,
        "name": "pets",
        "base": "pocket",
        "defaults": {"class": "dog", "preset": "fast", "train": {"learning_rate": 0.01, "batch_size": 2}},
        "subjects": [{"id": "a", "images": "photos/a"}, {"id": "b", "images": "s3://bucket/b"}],
    }
    path.write_text(yaml.safe_dump(text))
    out = tmp_path / "out/tune/tuned.yaml"
    write_tuned(path, out, ["a"], {"train.learning_rate": 1e-05, "lora.rank": 4, "prior.target": "image"})
    a, b = load_manifest(out).subjects
    assert (a.train.learning_rate, a.lora.rank, a.prior.target, a.train.batch_size) == (1e-05, 4, "image", 2)
    assert (a.train.max_steps, b.train.learning_rate, b.prior.source) == (350, 0.01, "prediction")
    assert (out.parent / a.images).resolve() == tmp_path / "from/photos/a"
    assert not Path(a.images).is_absolute() and b.images == "s3://bucket/b"
