"""Adapters trained on one base and served on its few-step sister, where server or base say so and the shapes fit."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from serving.http.library import Library
from tests.families import FAMILIES, SISTERS, write_family
from tests.serving.company import random_adapter, small
from tests.serving.http.test_api import World, problem
from training.adapters.adapter import Adapter, LowRank, save_adapter
from training.base.base import Base, load_base
from training.base.files.folder import hash_base
from training.base.files.outline import outline
from training.errors import UserError
from training.storage.card import Card
from training.storage.registry import Registry
from training.storage.storage import content_id, open_storage

PAIRS = {"klein": "klein-distilled", "flux": "flux-schnell"}


def publish(storage: Path, base: Base, id: str, adapter: Adapter) -> None:
    """As a training on `base` does it."""
    data = save_adapter(adapter)
    fields = {
        "sha256": content_id(data), "size": len(data), "created": "2026-01-01T00:00:00+00:00", "fingerprint": "0" * 64,
        "base": "trained-on", "base_hash": base.hash, "family": base.facts.title, "rank": 4, "alpha": 4,
        "targets": base.facts.targets, "instance_prompt": "a sks dog", "class": "dog",
    }  # fmt: skip
    Registry(open_storage(str(storage))).publish("default", id, data, Card.model_validate(fields))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sisters")


@pytest.fixture(params=PAIRS)
def trained(request: pytest.FixtureRequest, folder: Path) -> Base:
    return load_base(str(write_family(request.param, folder)), device="cpu")


@pytest.fixture
def world(trained: Base, folder: Path, tmp_path: Path) -> Iterator[World]:
    """A server on the sister, which is told the beginning of the other's hash."""
    sister = write_family(PAIRS[trained.folder.name], folder)
    base = load_base(str(sister), device="cpu")
    made = World(base, sister, tmp_path / "storage", keys=False, serves=(trained.hash[:16],))
    yield made
    made.loop.close()


def test_an_adapter_of_the_base_is_served_on_its_sister(world: World, trained: Base) -> None:
    adapter = random_adapter(trained, 1, targets=trained.facts.targets)
    publish(Path(world.spec.storage), trained, "rusty", adapter)
    drawn = world.images(model="rusty")
    assert drawn.status_code == 200, drawn.text
    assert drawn.json()["data"][0]["b64_json"] != world.images().json()["data"][0]["b64_json"]
    assert [one["id"] for one in world.call("GET", "/v1/adapters").json()["data"]] == ["rusty"]


def test_one_of_other_shapes_is_refused_in_words(world: World, trained: Base) -> None:
    (key, low), *_ = random_adapter(trained, 1, targets=trained.facts.targets).modules.items()
    wider = Adapter({key: LowRank(low.down, torch.cat([low.up, low.up]))})
    publish(Path(world.spec.storage), trained, "wide", wider)
    said = problem(world.images(model="wide"), 400)["message"]
    assert "which serves that one's adapters, but it does not fit" in said and "this base needs" in said


def test_it_is_refused_where_nobody_says_so(trained: Base, folder: Path, tmp_path: Path) -> None:
    publish(tmp_path, trained, "rusty", random_adapter(trained, 1, targets=trained.facts.targets))
    sister = write_family(PAIRS[trained.folder.name], folder)
    library = Library(Registry(open_storage(str(tmp_path))), outline(str(sister)))
    with pytest.raises(UserError, match=rf"made for another base.*--serves {trained.hash[:12]}"):
        library.resolve("default", "rusty")
    assert library.list("default") == []
    asking = Path(shutil.copytree(sister, tmp_path / "asking"))
    (asking / "dreamfleet.json").write_text(json.dumps({"serves": [trained.hash]}))
    told = Library(Registry(open_storage(str(tmp_path))), outline(str(asking)))
    assert told.resolve("default", "rusty").card.base == "trained-on"
    assert hash_base(asking) == hash_base(sister)


def test_a_hash_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    sister = Path(shutil.copytree(write_family("flux-schnell", folder), tmp_path / "bad"))
    for bad in ('{"serves": ["nonsense"]}', '{"serve": []}', '{"steps": 0}', "[", '{"sampler": "best"}'):
        (sister / "dreamfleet.json").write_text(bad)
        with pytest.raises(
            UserError, match=r"dreamfleet.json'.*Known keys: steps, guidance_scale, sampler, judge, serves"
        ):
            outline(str(sister))
    assert small().dtype == "auto" and PAIRS.keys() <= FAMILIES.keys() and set(PAIRS.values()) == SISTERS.keys()
