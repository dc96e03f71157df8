"""Two runs on one cluster whose devices one of them has taken: it gives back what the other has a right to."""

import json
import time
from pathlib import Path

import pytest

from tests.ray_app.conftest import Desk
from tests.ray_app.head import SETTINGS, ray_head
from training.run.run import RunStore, list_runs
from training.run.shares import PATIENCE_SECONDS
from training.storage.storage import open_storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def states(desk: Desk, name: str) -> list[str]:
    """The states of the subjects of the run of that name."""
    storage = open_storage(str(desk.storage))
    for run in list_runs(storage):
        if run.startswith(f"{name}-"):
            store = RunStore(storage, run)
            return [found.state for s in store.record().manifest.subjects if (found := store.subject(s.id))]
    return []


def until_training(desk: Desk, name: str, count: int, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while states(desk, name).count("training") < count:
        assert time.monotonic() < end, f"{name} does not train after {timeout_s} s: {states(desk, name)}"
        time.sleep(0.5)


def test_a_second_tenant_gets_its_share(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    first = desk.manifest("rusty", "tabby", "bolt", "dash", name="first", steps=20_000, every=500)
    second = desk.manifest("mocha", "puddle", name="second", steps=20)
    second.write_text(second.read_text(encoding="utf-8").replace("name: second", "name: second\ntenant: acme"))
    with ray_head("--num-gpus=2") as head:
        arguments = ("--address", head.address, "--json")
        with desk.start("train", first, *arguments) as greedy:
            until_training(desk, "first", 4, 120)
            began = time.monotonic()
            late = desk.run("train", second, *arguments, timeout_s=400)
            assert late.status == 0, late.err[-3000:]
            assert time.monotonic() - began > PATIENCE_SECONDS  # an autoscaler would have had its chance
            assert set(late.states().values()) == {"published"}
            until_training(desk, "first", 4, 120)  # the device is its own again
            run = next(run for run in list_runs(open_storage(str(desk.storage))) if run.startswith("first-"))
            assert desk.run("cancel", run).status == 0
            out, _ = greedy.communicate(timeout=120)
    ended = json.loads(out)
    assert {subject["state"] for subject in ended["subjects"]} == {"cancelled"}
    assert not any(subject["attempts"] for subject in ended["subjects"])  # giving back costs nothing
    assert "given back" in desk.run("logs", run).out


def test_quotas_and_priorities_are_options_of_a_user(desk: Desk, tmp_path: Path) -> None:
    result = desk.run("train", desk.manifest("rusty"), "--priority", "high")
    assert result.status == 2 and "--priority" in result.err
