"""The prior of several workers: one makes it, the others wait for it."""

from pathlib import Path

import pytest
import torch

from tests.training.subjects import subject
from training import prior
from training.base import Base
from training.manifest import SubjectSpec
from training.prior import prepare_prior
from training.storage import open_storage


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior, "BATCH", 2)
    monkeypatch.setattr(prior, "LOOK_SECONDS", 0.0)


def spec() -> SubjectSpec:
    return subject("rusty", prior={"images": 4, "steps": 2}).spec


def test_of_two_workers_one_makes_it(tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[range] = []
    generate = prior._generate

    def counted(base: Base, subject: SubjectSpec, indices: range) -> torch.Tensor:
        made.append(indices)
        return generate(base, subject, indices)

    monkeypatch.setattr(prior, "_generate", counted)
    storage = open_storage(str(tmp_path))
    first, second = (prepare_prior(tiny, storage, spec()) for _ in range(2))
    assert next(first) == (2, 4, None)
    assert next(second) == (0, 4, None)
    assert next(second) == (0, 4, None)
    *_, (_, _, mine) = first
    *_, (_, _, theirs) = second
    assert mine is not None and theirs is not None
    assert torch.equal(mine.mean_VCHW, theirs.mean_VCHW)
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
