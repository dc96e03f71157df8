"""The choice on curves whose answer is known, the early stop on losses whose answer is known, and the gate."""

import random

import pytest
from pydantic import ValidationError

from training.evaluation.choose import Candidate, choose, harmonic_mean, has_settled, overfits_after
from training.manifest.gate import Condition, EvaluateSpec, GateSpec, failures, parse_condition
from training.storage.card import Score

STEPS = (200, 400, 600, 800, 1000)


def curve(likeness: list[float], fidelity: list[float], copying: list[float] | None = None) -> list[Candidate]:
    return [
        Candidate(step, i, t, copying=c, copying_limit=0.8)
        for step, i, t, c in zip(STEPS, likeness, fidelity, copying or [0.0] * 5, strict=True)
    ]


def test_a_curve_with_one_peak_is_chosen_there() -> None:
    choice = choose(curve([0.1, 0.4, 0.8, 0.9, 0.95], [0.9, 0.9, 0.8, 0.5, 0.2]))
    assert choice.step == 600
    assert "likeness 0.80 and fidelity 0.80" in choice.reason


def test_likeness_alone_does_not_win() -> None:
    """What a selector by faces only would take: the most alike, which no longer follows any prompt."""
    assert choose(curve([0.2, 0.5, 0.6, 0.9, 1.0], [1.0, 1.0, 0.9, 0.1, 0.0])).step == 600


def test_a_tie_goes_to_the_earlier_step() -> None:
    choice = choose(curve([0.3, 0.795, 0.8, 0.8, 0.805], [0.8] * 5))
    assert choice.step == 400
    assert "the earlier one is kept" in choice.reason


def test_a_copying_step_is_out_of_the_question() -> None:
    choice = choose(curve([0.1, 0.4, 0.6, 0.9, 0.9], [0.9] * 5, [0.2, 0.3, 0.4, 0.85, 0.95]))
    assert choice.step == 600
    assert set(choice.rejected) == {800, 1000}
    assert "Step 800 rejected: copies training photos (0.85 > 0.80)" in choice.reason


def test_a_drifting_step_is_out_of_the_question() -> None:
    drifting = [Candidate(s, s / 1000, 0.9, drift=s / 1000, drift_limit=0.5) for s in STEPS]
    assert choose(drifting).step == 400


def test_if_all_have_an_alarm_the_smallest_is_taken_and_said() -> None:
    choice = choose(curve([0.9] * 5, [0.9] * 5, [0.99, 0.9, 0.85, 0.9, 0.99]))
    assert choice.step == 600
    assert choice.reason.startswith("every step has an alarm")


def test_keep_last_keeps_the_last_and_still_warns() -> None:
    choice = choose(curve([0.9] * 5, [0.9] * 5, [0, 0, 0, 0, 0.95]), keep_last=True)
    assert choice.step == 1000
    assert "as asked" in choice.reason and "copies training photos" in choice.reason


def test_nothing_learned_takes_the_latest() -> None:
    choice = choose(curve([0.0] * 5, [1.0] * 5))
    assert choice.step == 1000
    assert "Train longer" in choice.reason


def test_one_checkpoint_and_none() -> None:
    assert choose([Candidate(7, 0.5, 0.5)]).reason == "the last step, the only checkpoint"
    with pytest.raises(ValueError, match="no checkpoint"):
        choose([])


def test_noise_below_the_tie_does_not_move_the_choice() -> None:
    rng = random.Random(0)
    for _ in range(50):
        noisy = [0.8 + rng.uniform(-0.008, 0.008) for _ in STEPS]
        assert choose(curve(noisy, [0.8] * 5)).step == 200


def test_harmonic_mean_needs_both() -> None:
    assert harmonic_mean(1.0, 0.0) == 0 and harmonic_mean(-0.1, 1.0) == 0
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)


def test_overfitting_is_where_fidelity_breaks() -> None:
    assert overfits_after(curve([0.1, 0.5, 0.8, 0.9, 1.0], [0.9, 0.9, 0.9, 0.5, 0.3])) == 600
    assert overfits_after(curve([0.1, 0.5, 0.8, 0.9, 1.0], [0.9] * 5)) is None
    assert overfits_after(curve([0.5] * 5, [0.9] * 5, [0.1, 0.1, 0.9, 0.9, 0.9])) == 400
    assert overfits_after(curve([0.5] * 5, [0.9] * 5, [0.1, 0.1, 0.9, 0.1, 0.1])) is None, "one alarm is chance"


def test_early_stop_waits_for_the_loss_to_settle() -> None:
    falling = [max(1 - step / 120, 0.0) for step in range(300)]
    assert not has_settled(falling[:60], window=50, share=0.15), "two windows are needed"
    assert not has_settled(falling[:100], window=50, share=0.15), "still falling"
    assert has_settled(falling, window=50, share=0.15)
    assert not has_settled([1.0] * 200, window=50, share=0.15), "a loss that never varied says nothing"
    noise = random.Random(1)
    assert not has_settled([noise.random() for _ in range(400)], window=50, share=0.15), "noise does not settle"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(">= 0.5", Condition(">=", 0.5)), ("<0.3", Condition("<", 0.3)), (" > -1 ", Condition(">", -1.0))],
)
def test_conditions_are_parsed(text: str, expected: Condition) -> None:
    assert parse_condition(text) == expected


@pytest.mark.parametrize("text", ["0.5", "= 0.5", ">= half", ">= 0.5 or so", ""])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="is no condition; write a sign and a number"):
        GateSpec.model_validate({"likeness": text})


def test_conditions_hold_at_their_bound_as_written() -> None:
    assert parse_condition(">= 0.5").holds(0.5) and not parse_condition("> 0.5").holds(0.5)
    assert parse_condition("<= 0.5").holds(0.5) and not parse_condition("< 0.5").holds(0.5)


def test_the_gate_names_value_model_condition_and_what_to_do() -> None:
    gate = GateSpec.model_validate({"likeness": ">= 0.5", "identity": ">= 0.9", "fidelity": "> 0.1"})
    scores = [Score(name="likeness", value=0.42, model="dino"), Score(name="fidelity", value=0.2, model="clip")]
    low, missing = failures(gate, scores)
    assert low.startswith("likeness is 0.420 (dino), asked is >= 0.5; train longer")
    assert missing == "identity was not measured, asked is >= 0.9"
    assert failures(GateSpec(), scores) == []


def test_the_specs_are_closed() -> None:
    with pytest.raises(ValidationError):
        EvaluateSpec.model_validate({"candidate": 3})
    with pytest.raises(ValidationError):
        GateSpec.model_validate({"likenes": ">= 1"})
