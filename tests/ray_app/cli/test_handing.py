"""`dreamfleet train --address URL`: the manifest is handed to a fleet, which trains it; nothing is trained twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.house import House
from tests.ray_app.conftest import Desk
from training.base.base import load_base


@pytest.fixture
def fleet(tiny_folder: Path, tmp_path: Path) -> Iterator[House]:
    (tmp_path / "fleet").mkdir()
    made = House(load_base(str(tiny_folder), device="cpu"), tiny_folder, tmp_path / "fleet", ("ann",))
    yield made
    made.close()


def test_a_fleet_trains_what_it_is_handed_once(fleet: House, desk: Desk) -> None:
    manifest = desk.manifest("rusty", "tabby", steps=6)
    key = ("--address", fleet.url, "--key", fleet.tokens["ann"])
    first = desk.run("train", manifest, *key, "--json")
    assert first.status == 0, first.err
    assert [(one["id"], one["state"], one["adapter"]) for one in first.json["subjects"]] == [
        ("rusty", "published", "ann/rusty"),
        ("tabby", "published", "ann/tabby"),
    ]
    assert fleet.registry.ids("ann") == ["rusty", "tabby"]
    again = desk.run("train", manifest, *key, "--json")
    assert again.json["run"] == first.json["run"]
    wrong = desk.run("train", manifest, "--address", fleet.url, "--key", "dfk_wrong")
    assert wrong.status == 2 and "refused (401)" in wrong.err
