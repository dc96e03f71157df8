"""The prior of several workers: one makes it, the others wait for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.subjects import subject
from training.base.base import Base
from training.manifest.subject import SubjectSpec
from training.storage.storage import open_storage
from training.trainer import prior
from training.trainer.prior import class_prompts, prepare_prior


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior, "BATCH", 2)
    monkeypatch.setattr(prior, "LOOK_SECONDS", 0.0)


def spec() -> SubjectSpec:
    return subject("rusty", prior={"images": 4, "steps": 2}).spec


def test_of_two_workers_one_makes_it(tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[range] = []
    generate = prior._generate

    def counted(base: Base, subject: SubjectSpec, prompts: Sequence[str], indices: range) -> torch.Tensor:
        made.append(indices)
        return generate(base, subject, prompts, indices)

    monkeypatch.setattr(prior, "_generate", counted)
    storage = open_storage(str(tmp_path))
    first, second = (prepare_prior(tiny, storage, spec()) for _ in range(2))
    assert next(first) == (2, 4, None)
    assert next(second) == (0, 4, None)
    assert next(second) == (0, 4, None)
    *_, (_, _, mine) = first
    *_, (_, _, theirs) = second
    assert mine is not None and theirs is not None
    assert all(torch.equal(one.mean_CHW, other.mean_CHW) for one, other in zip(mine.images, theirs.images, strict=True))
    assert made == [range(2), range(2, 4)]


def test_one_that_gives_up_is_followed(tiny: Base, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    first, second = (prepare_prior(tiny, storage, spec()) for _ in range(2))
    next(first)
    assert next(second) == (0, 4, None)
    del first
    assert next(second) == (2, 4, None)
    *_, (_, _, found) = second
    assert found is not None and len(found) == 4


CAPTIONS = ("a photo of sks dog on the grass", "a photo of sks dog at night", "a photo of sks dog on the grass")


def test_captions_lose_the_words_of_the_subject_alone() -> None:
    one = subject("rusty", instance_prompt="a photo of sks {class}", class_prompt="a photo of {class}").spec
    assert class_prompts(one) == ("a photo of dog",)
    assert class_prompts(one, CAPTIONS) == ("a photo of dog", "a photo of dog at night", "a photo of dog on the grass")


def test_class_images_are_shared_out_among_the_captions(tiny: Base, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    prompts: dict[str, Any] = {"instance_prompt": "a photo of sks {class}", "class_prompt": "a photo of {class}"}
    plain = subject("rusty", **prompts, prior={"images": 4, "steps": 2}).spec
    captioned = subject("rusty", **prompts, prior={"images": 4, "steps": 2, "captions": True}).spec
    *_, (_, _, without) = prepare_prior(tiny, storage, plain, captions=CAPTIONS)
    *_, (_, _, found) = prepare_prior(tiny, storage, captioned, captions=CAPTIONS)
    assert without is not None and set(without.prompts) == {"a photo of dog"}
    assert found is not None
    assert found.prompts == (*class_prompts(captioned, CAPTIONS), "a photo of dog")
    same = [torch.equal(one.mean_CHW, other.mean_CHW) for one, other in zip(found.images, without.images, strict=True)]
    assert same == [True, False, False, True]  # an image depends on its prompt and place alone
