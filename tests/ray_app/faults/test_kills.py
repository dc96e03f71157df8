"""Processes are killed at any moment: every subject is published once, and is what it would have been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.ray_app.conftest import Desk
from tests.ray_app.faults.conftest import (
    kill_all,
    only_run,
    processes,
    same_as_in,
    step_of,
    versions,
    wait_until,
)
from tests.tiny import tiny_images
from training.storage.registry import Registry
from training.storage.storage import open_storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PETS = ("rusty", "tabby", "bolt")


def undisturbed(desk: Desk, *ids: str, **how: int) -> Path:
    """The storage of the same manifest trained in peace."""
    manifest = desk.manifest(*ids, **how)  # type: ignore[arg-type]
    storage = desk.folder / "peace"
    result = desk.run("train", manifest, "--storage", storage, "--json")
    assert result.status == 0, result.err
    return storage


def test_a_worker_killed_at_a_random_step(desk: Desk) -> None:
    peace = undisturbed(desk, *PETS, steps=400, every=20)
    with desk.start("train", desk.manifest(*PETS, steps=400, every=20), "--json") as driver:
        wait_until(lambda: step_of(desk, "bolt") >= random.choice((20, 60, 100)), "a checkpoint")
        (worker,) = processes(driver, "ray::RayTrainWorker")
        worker.kill()
        out, err = driver.communicate(timeout=200)
    assert driver.returncode == 0, err
    run = only_run(desk)
    assert run is not None
    for id in PETS:
        subject = run.subject(id)
        assert subject is not None and [attempt.kind for attempt in subject.attempts] == ["lost"]
    same_as_in(peace, desk, PETS)


@pytest.mark.parametrize("place", [0, 1])
def test_one_worker_of_a_gang_is_killed(desk: Desk, place: int) -> None:
    tiny_images(desk.folder / "images" / "large")
    large = "  - {id: large, images: images/large, train: {strategy: zero, batch_size: 2}}\n"
    with desk.start("train", desk.manifest(steps=200, every=20, tail=large), "--json") as driver:
        wait_until(lambda: step_of(desk, "large") >= 40, "a checkpoint", timeout_s=300)
        workers = sorted(processes(driver, "ray::RayTrainWorker"), key=lambda worker: worker.create_time())
        workers[place].kill()
        _, err = driver.communicate(timeout=400)
    assert driver.returncode == 0, err
    run = only_run(desk)
    assert run is not None
    subject = run.subject("large")
    assert subject is not None and subject.state == "published"
    assert [attempt.kind for attempt in subject.attempts] == ["lost"]


def test_everything_killed_then_the_same_command(desk: Desk) -> None:
    peace = undisturbed(desk, *PETS, steps=400, every=20)
    manifest = desk.manifest(*PETS, steps=400, every=20)
    with desk.start("train", manifest) as driver:
        wait_until(lambda: step_of(desk, "bolt") >= 60, "a checkpoint")
        kill_all(driver)
    result = desk.run("train", manifest, "--json")
    assert result.status == 0, result.err
    same_as_in(peace, desk, PETS)


@pytest.mark.parametrize("after", [False, True], ids=["before the commit", "after the commit"])
def test_killed_around_the_commit_of_a_publication(desk: Desk, after: bool) -> None:
    manifest = desk.manifest("rusty", "tabby")
    code = f"""
import os, sys
from training.storage.ledger import Ledger
real = Ledger.commit
def commit(self, fingerprint, mine):
    answer = real(self, fingerprint, mine) if {after} else None
    os.kill(os.getpid(), 9)
Ledger.commit = commit
from training.__main__ import main
sys.argv = ["x", {str(manifest)!r}, "--storage", {str(desk.storage)!r}]
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    died = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    registry = Registry(open_storage(str(desk.storage)))
    assert len(registry.list()) == 0  # a reader sees none of it: `current` comes last
    result = desk.run("train", manifest, "--json")
    assert result.status == 0, result.err
    assert [len(versions(desk, id)) for id in ("rusty", "tabby")] == [1, 1]
    assert registry.orphans(grace_s=0) == []  # the same bytes have the same name


def test_two_drivers_at_once(desk: Desk) -> None:
    manifest = desk.manifest("rusty", "tabby", steps=100)
    with desk.start("train", manifest, "--json") as one, desk.start("train", manifest, "--json") as other:
        (out, err), (out2, err2) = one.communicate(timeout=240), other.communicate(timeout=240)
    assert (one.returncode, other.returncode) == (0, 0), err + err2
    assert [len(versions(desk, id)) for id in ("rusty", "tabby")] == [1, 1]
    run = only_run(desk)
    assert run is not None and run.run in out and run.run in out2
    assert "looking on" in err + err2


def test_a_driver_that_looks_on_takes_over_when_the_leader_dies(desk: Desk) -> None:
    manifest = desk.manifest("rusty", "tabby", steps=600, every=20)
    with desk.start("train", manifest) as leader:
        wait_until(lambda: step_of(desk, "tabby") >= 20, "a checkpoint")
        with desk.start("train", manifest, "--json") as other:
            time.sleep(3)
            kill_all(leader)
            _, err = other.communicate(timeout=240)
    assert other.returncode == 0, err
    assert [len(versions(desk, id)) for id in ("rusty", "tabby")] == [1, 1]


def test_a_torn_checkpoint_is_passed_over(desk: Desk) -> None:
    manifest = desk.manifest("rusty", "tabby", steps=400, every=20)
    with desk.start("train", manifest) as driver:
        wait_until(lambda: step_of(desk, "rusty") >= 60, "a checkpoint")
        kill_all(driver)
    run = only_run(desk)
    assert run is not None
    steps = run.checkpoints("rusty")
    torn = desk.storage / "runs" / run.run / "subjects/rusty/checkpoints" / f"{steps[-1]:08d}.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    result = desk.run("train", manifest, "--json")
    assert result.status == 0, result.err
    assert f"checkpoint of step {steps[-1]} is skipped" in result.err
    began = [
        line["text"]
        for line in desk.run("logs", run.run, "rusty", "--json").json["lines"]
        if "preparing" in line["text"]
    ]
    assert not began[-1].endswith(" 0/400")


def test_thirty_subjects_killed_three_times(desk: Desk) -> None:
    ids = tuple(f"subject-{index:02d}" for index in range(30))
    manifest = desk.manifest(*ids, steps=60, every=10)
    for turn in range(3):
        with desk.start("train", manifest) as driver:
            run = wait_for_progress(desk, ids, turn)
            time.sleep(random.uniform(0, 2))
            kill_all(driver)
    result = desk.run("train", manifest, "--json")
    assert result.status == 0, result.err
    assert set(result.states().values()) <= {"published", "reused"} and len(result.states()) == 30
    assert [len(versions(desk, id)) for id in ids] == [1] * 30
    assert run == result.json["run"]


def wait_for_progress(desk: Desk, ids: tuple[str, ...], turn: int) -> str:
    """Until more has been learned than in the turn before."""
    goal = (turn + 1) * 150
    wait_until(lambda: sum(step_of(desk, id) for id in ids) >= goal, f"{goal} steps in all")
    run = only_run(desk)
    assert run is not None
    return run.run


def test_nothing_of_it_is_left_behind() -> None:
    mine = psutil.Process()
    assert [p.name() for p in mine.children(recursive=True) if p.name().startswith(("raylet", "gcs_server"))] == []
