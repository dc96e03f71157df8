"""Runs on a real local Ray, through the command line: lanes, failures, resubmission, kill and Ctrl-C."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.ray_app.conftest import Desk, open_ports
from training.run.run import RunStore, list_runs
from training.storage.storage import open_storage

pytestmark = pytest.mark.ray


def only_run(desk: Desk) -> RunStore:
    storage = open_storage(str(desk.storage))
    (run,) = list_runs(storage)
    return RunStore(storage, run)


def wait_for_step(desk: Desk, id: str, step: int, timeout_s: float = 120) -> None:
    """Until a subject has a checkpoint of that step or a later one."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        storage = open_storage(str(desk.storage))
        for run in list_runs(storage):
            if any(saved >= step for saved in RunStore(storage, run).checkpoints(id)):
                return
        time.sleep(0.2)
    raise AssertionError(f"{id} has no checkpoint of step {step} after {timeout_s} s")


def wait_for_training(store: RunStore, id: str, after: float, timeout_s: float = 120) -> None:
    """Until a driver that was started `after` has written down that the subject trains."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        subject = store.subject(id)
        if subject is not None and subject.state == "training" and subject.updated > after:
            return
        time.sleep(0.2)
    raise AssertionError(f"{id} does not train after {timeout_s} s")


def test_a_pack_with_a_corrupt_subject_then_the_same_again(desk: Desk) -> None:
    manifest = desk.manifest("rusty", "tabby", "bolt", "torn")
    (desk.folder / "images/torn/2.png").write_bytes(b"no picture")
    first = desk.run("train", manifest, "--json")
    assert first.status == 1, first.err
    assert first.states() == {"rusty": "published", "tabby": "published", "bolt": "published", "torn": "failed"}
    rusty, *_, torn = first.json["subjects"]
    assert rusty["steps"] == 20 and rusty["pack"] == 0 and rusty["adapter"] == "default/rusty" and rusty["loss"] > 0
    assert "2.png" in torn["reason"] and torn["adapter"] is None
    assert "torn" in first.err and "published" in first.err  # a person reads along

    again = desk.run("train", desk.manifest("rusty", "tabby", "bolt"), "--json")
    assert again.status == 0
    assert [subject["pack"] for subject in again.json["subjects"]] == [None] * 3  # no lane was opened for them
    assert "preparing" not in again.err
    assert set(again.states().values()) == {"reused"}
    assert [s["version"] for s in again.json["subjects"]] == [s["version"] for s in first.json["subjects"][:3]]

    assert {a["id"] for a in desk.run("adapters", "list", "--json").json["adapters"]} == {
        "default/rusty",
        "default/tabby",
        "default/bolt",
    }
    shown = desk.run("adapters", "show", f"rusty@{rusty['version'][:8]}", "--json").json
    assert shown["card"]["steps"] == 20 and "adapter.safetensors" in shown["files"]
    assert "rusty: published" in desk.run("logs", first.json["run"], "rusty").out


def test_a_killed_driver_then_a_stopped_one_then_to_the_end(desk: Desk) -> None:
    manifest = desk.manifest("rusty", "tabby", steps=600, every=20)
    with desk.start("train", manifest) as driver:
        wait_for_step(desk, "tabby", 40)
        assert open_ports(driver.pid) == {}
        os.kill(driver.pid, signal.SIGKILL)
    store = only_run(desk)
    saved = {id: max(store.checkpoints(id)) for id in ("rusty", "tabby")}

    started = time.time()
    with desk.start("train", manifest) as driver:
        # the killed driver's lane may have gone on for a moment: a checkpoint alone does not tell whose it is
        wait_for_training(store, "tabby", started)
        os.kill(driver.pid, signal.SIGINT)
        out, err = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "The same command goes on with it" in out and "Traceback" not in err
    stopped = {id: max(store.checkpoints(id)) for id in ("rusty", "tabby")}
    assert store.record().state == "running"
    subject = store.subject("rusty")
    assert subject is not None and subject.state == "queued" and subject.step == stopped["rusty"]

    done = desk.run("train", manifest, "--json")
    assert done.status == 0, done.err
    assert set(done.states().values()) == {"published"}
    assert only_run(desk).run == done.json["run"]  # it was one run all along
    for id in ("rusty", "tabby"):
        *first, second, third = began_at(desk, done.json["run"], id)
        assert first in ([0], [])  # what a driver logged in the seconds before it was killed may be lost
        assert second >= saved[id] - 20 and third >= stopped[id] > 40
    assert not leftovers()


def began_at(desk: Desk, run: str, id: str) -> list[int]:
    """The step at which each driver's lane began with a subject, from the run's log."""
    lines = [line["text"] for line in desk.run("logs", run, id, "--json").json["lines"]]
    return [int(line.split()[-1].split("/")[0]) for line in lines if ": preparing at step" in line]


def leftovers() -> list[Path]:
    """Session folders of Ray whose process is dead."""
    found = Path(os.environ.get("TMPDIR", "/tmp")).glob(f"dreamfleet-{os.getuid()}-*-*")
    return [folder for folder in found if not Path(f"/proc/{folder.name.split('-')[2]}").exists()]


def test_cancel_reaches_a_living_driver(desk: Desk) -> None:
    manifest = desk.manifest("rusty", "tabby", steps=3000, every=20)
    with desk.start("train", manifest, "--json") as driver:
        wait_for_step(desk, "rusty", 20)
        run = only_run(desk).run
        assert desk.run("cancel", run, "tabby").status == 0
        deadline = time.monotonic() + 30
        while desk.run("status", run, "--json").states()["tabby"] != "cancelled":
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert desk.run("status", run, "--json").states()["rusty"] == "training"
        assert desk.run("cancel", run).status == 0
        out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert json.loads(out)["state"] == "cancelled"
    assert {subject["state"] for subject in json.loads(out)["subjects"]} == {"cancelled"}
