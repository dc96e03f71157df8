"""Prompts of frozen text encoders: encoded once a text, with the encoders on the device only meanwhile."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families import write_family
from tests.training.subjects import subject
from tests.training.trainer.test_pack import TIGHT, distance, run
from training.base.base import load_base
from training.base.family import Cond, Wording
from training.base.frozen_prompts import FrozenPrompts
from training.trainer.checkpoint import dump_state, load_state
from training.trainer.member import Subject


class Moves(nn.Module):
    """Notes where it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def to(self, *args: Any, **kwargs: Any) -> "Moves":
        self.places.append(torch.device(args[0]).type)
        return self


def test_encoders_come_for_unknown_texts_alone_and_always_leave() -> None:
    encoder, asked = Moves(), list[str]()
    prompts = FrozenPrompts({"text_encoder": encoder}, torch.device("cpu"))

    def encode(prompt: Wording, chunks: int) -> Cond:
        assert encoder.places[-1] == "cpu" and len(encoder.places) % 2 == 1
        asked.append(str(prompt))
        if prompt == "bad":
            raise RuntimeError("no")
        return {"states": torch.full((len(str(prompt)),), float(chunks))}

    one, two, again = prompts.encode(["dog", "horse", "dog"], 1, encode)
    assert torch.equal(one["states"], again["states"]) and len(two["states"]) == 5
    assert (asked, encoder.places) == (["dog", "horse"], ["cpu", "cpu"])
    prompts.encode(["horse"], 1, encode)
    assert len(encoder.places) == 2
    assert prompts.encode(["dog"], 2, encode)[0]["states"].tolist() == [2.0] * 3
    with pytest.raises(RuntimeError):
        prompts.encode(["bad"], 1, encode)
    assert len(encoder.places) == 6 and len(prompts) == 3


def test_records_beyond_the_limit_are_encoded_again() -> None:
    asked: list[str] = []

    def encode(prompt: Wording, chunks: int) -> Cond:
        asked.append(str(prompt))
        return {"states": torch.zeros(4)}

    prompts = FrozenPrompts({}, torch.device("cpu"), limit=32)
    for texts in ("ab", "c", "b", "a"):
        prompts.encode(list(texts), 1, encode)
    assert asked == ["a", "b", "c", "a"] and len(prompts) == 2


@pytest.mark.parametrize("family", ["klein", "z-image", "flux"])
def test_a_base_parks_its_encoders_and_says_the_same(family: str, tmp_path: Path) -> None:
    folder = str(write_family(family, tmp_path))
    plain, parked = (load_base(folder, device="cpu", park_text=on) for on in (False, True))
    assert plain.prompts is None and parked.prompts is not None
    texts = ["a photo of a dog", "", "a photo of a dog"]
    for one, other in zip(parked.encode(texts), [plain.encode([text])[0] for text in texts], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(part, other[name]) for name, part in one.items())
    wanted = set(parked.facts.frozen_encoders)
    device = load_base(folder, device="meta", park_text=True)
    places = {name: {p.device.type for p in model.parameters()} for name, model in device.parts.models.items()}
    assert all((found == {"cpu"}) == (name in wanted) for name, found in places.items())


def test_training_with_parked_encoders_is_training(tmp_path: Path) -> None:
    folder = str(write_family("z-image", tmp_path))
    plain, parked = (load_base(folder, device="cpu", dtype=torch.float64, park_text=on) for on in (False, True))
    settings: dict[str, Any] = {"prior": {"source": "prediction"}}
    ones = [subject("a", 1, plain.facts, **settings), subject("b", 2, plain.facts, instance_prompt="a sks {class} toy")]
    wanted, found = (run(base, ones, slots=2).adapters for base in (plain, parked))
    assert all(distance(wanted[id], found[id]) <= TIGHT for id in wanted)
    stopped = run(parked, ones, slots=2, stop=2).states
    resumed = [Subject(s.spec, s.instance, s.prior, load_state(dump_state(stopped[s.spec.id]))) for s in ones]
    through, again = run(parked, ones, slots=2).states, run(parked, resumed, slots=2).states
    assert all(dump_state(state) == dump_state(again[id]) for id, state in through.items())


def test_encoders_that_somebody_may_train_stay(tmp_path: Path) -> None:
    base = load_base(str(write_family("sd", tmp_path)), device="cpu", park_text=True)
    assert base.prompts is None
    made: list[Tensor] = [cond["states"] for cond in base.encode(["a dog"])]
    assert len(made) == 1
