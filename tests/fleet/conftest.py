"""Fleets that several tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.house import House
from training.base.base import Base, load_base


@pytest.fixture(autouse=True)
def _every_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.trainer.worker.worker.BEAT_SECONDS", 0.0)


@pytest.fixture(scope="session")
def own_base(tiny_folder: Path) -> Base:
    """The tiny base once more: a fleet lays two banks over it."""
    return load_base(str(tiny_folder), device="cpu")


@pytest.fixture
def house(own_base: Base, tiny_folder: Path, tmp_path: Path) -> Iterator[House]:
    """A fleet without keys."""
    made = House(own_base, tiny_folder, tmp_path / "storage")
    yield made
    made.close()


@pytest.fixture
def two(own_base: Base, tiny_folder: Path, tmp_path: Path) -> Iterator[House]:
    """A fleet with the keys of two tenants."""
    storage = tmp_path / "storage"
    storage.mkdir()
    made = House(own_base, tiny_folder, storage, ("ann", "bob"))
    yield made
    made.close()
