"""Subjects and states that go wrong by themselves: they end with their reason and cost the others nothing."""

import json
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.ray_app.conftest import Desk, Result
from tests.ray_app.faults.conftest import only_run, processes, step_of, wait_until
from tests.tiny import tiny_images

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_subject_that_diverges_is_tried_once_more_and_fails_alone(desk: Desk) -> None:
    tail = "  - {id: wild, images: images/rusty, lora: {alpha: 1.0e+38}}\n"  # too much for fp32 after the first step
    result = desk.run("train", desk.manifest("rusty", steps=200, every=20, tail=tail), "--json")
    assert result.status == 1
    assert result.states() == {"rusty": "published", "wild": "failed"}
    wild = result.json["subjects"][1]
    assert "diverged" in wild["reason"]
    assert [attempt["kind"] for attempt in wild["attempts"]] == ["diverged", "diverged"]


def test_a_subject_that_needs_more_memory_than_there_is_goes_on_with_fewer_rows(desk: Desk) -> None:
    """The limit is set from outside, to what the usual subjects take and some: the kernel refuses what goes beyond."""
    large = ", train: {resolution: 128, batch_size: 64, strategy: plain, max_steps: 5}"
    usual = ", train: {resolution: 128}"
    for id in ("rusty", "greedy", "tabby"):
        tiny_images(desk.folder / "images" / id, side=128)
    tail = "".join(
        f"  - {{id: {id}, images: images/{id}{how}}}\n"
        for id, how in (("rusty", usual), ("greedy", large), ("tabby", usual))
    )
    with desk.start("train", desk.manifest(steps=200, every=20, tail=tail), "--json") as driver:
        wait_until(lambda: step_of(desk, "rusty") >= 40, "a checkpoint")
        (worker,) = processes(driver, "ray::RayTrainWorker")
        # not RLIMIT_AS: it counts what threads reserve and never touch
        limit = worker.memory_info().data + 400 * 2**20
        wait_until(lambda: _others(driver, worker), "the worker of the larger subject")
        for other in _others(driver, worker):
            other.rlimit(psutil.RLIMIT_DATA, (limit, limit))
        out, err = driver.communicate(timeout=200)
    assert driver.returncode == 0, err
    result = Result(driver.returncode, out, err)
    assert set(result.states().values()) == {"published"}
    assert [subject["attempts"] for subject in result.json["subjects"]] == [[], [], []]
    assert "out of memory with 64 rows: greedy goes on with at most 32 of its rows at once" in err


def _others(driver: "subprocess.Popen[str]", worker: psutil.Process) -> list[psutil.Process]:
    return [other for other in processes(driver, "ray::RayTrainWorker") if other.pid != worker.pid]


def test_a_base_that_no_lane_can_load_is_told_in_the_words_of_who_tried(desk: Desk) -> None:
    """Its configs and headers are good, so it is not found out beforehand; its weights are of other shapes."""
    base = Path(shutil.copytree(desk.base, desk.folder / "base"))
    config = base / "unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [16, 64]}))
    desk = Desk(desk.folder, base)
    manifest = desk.manifest("rusty")
    assert desk.run("validate", manifest).status == 0
    result = desk.run("train", manifest, "--json")
    assert result.status == 1, result.err
    reason = result.json["subjects"][0]["reason"]
    assert reason.startswith("no lane can work: ") and "shape" in reason and "worker died" not in result.err
    assert "shape" in result.err.partition("lane 0 failed")[0]  # at once, before anybody gives up
    log = [line["text"] for line in desk.run("logs", result.json["run"], "--json").json["lines"]]
    assert any(text.startswith("pack 0: ") and "shape" in text for text in log)


def test_retry_takes_up_only_what_failed(desk: Desk) -> None:
    manifest = desk.manifest("rusty", "tabby")
    whole = (desk.folder / "images/tabby/0.png").read_bytes()
    (desk.folder / "images/tabby/0.png").write_bytes(b"no picture")
    first = desk.run("train", manifest, "--json")
    assert first.states() == {"rusty": "published", "tabby": "failed"}
    (desk.folder / "images/tabby/0.png").write_bytes(whole)
    again = desk.run("retry", first.json["run"], "--json")
    assert again.status == 0, again.err
    assert again.states() == {"rusty": "published", "tabby": "published"}
    assert again.json["run"] == first.json["run"]


def test_cancelled_while_it_is_prepared_and_while_it_waits(desk: Desk) -> None:
    manifest = desk.manifest("rusty", "tabby", steps=400, every=20)
    with desk.start("train", manifest, "--json") as driver:
        wait_until(lambda: (found := only_run(desk)) is not None and found.record(), "a run")
        run = only_run(desk)
        assert run is not None
        assert desk.run("cancel", run.run, "tabby").status == 0  # nothing has begun: it is queued
        out, err = driver.communicate(timeout=200)
    assert driver.returncode == 1, err
    assert step_of(desk, "tabby") == 0
    found = [run.subject(id) for id in ("rusty", "tabby")]
    assert [subject and subject.state for subject in found] == ["published", "cancelled"]


def test_a_detached_run_is_followed_to_its_end(desk: Desk) -> None:
    started = desk.run("train", desk.manifest("rusty", steps=100), "--detach", "--json")
    run = only_run(desk)
    assert started.status == 0 and run is not None
    assert run.record().state == "running"  # the command did not wait for it
    watched = desk.run("status", started.json["run"], "--watch", "--json")
    assert watched.json["state"] == "done" and watched.states() == {"rusty": "published"}
