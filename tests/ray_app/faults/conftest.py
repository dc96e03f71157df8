"""What the faults share: processes of a run to kill, and adapters to compare."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from tests.ray_app.conftest import Desk
from training.run.log import read_log
from training.run.run import RunStore, list_runs
from training.storage.registry import Registry
from training.storage.storage import open_storage
from training.trainer.checkpoint import load_state


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(20261122)


def wait_until(what: Callable[[], object], why: str, timeout_s: float = 150) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, f"not within {timeout_s} s: {why}"
        time.sleep(0.1)


def only_run(desk: Desk) -> RunStore | None:
    storage = open_storage(str(desk.storage))
    runs = list_runs(storage)
    return RunStore(storage, runs[0]) if runs else None


def step_of(desk: Desk, id: str) -> int:
    """The latest checkpoint of a subject, 0 if there is none."""
    run = only_run(desk)
    return max(run.checkpoints(id), default=0) if run else 0


def processes(driver: "subprocess.Popen[str]", name: str = "") -> list[psutil.Process]:
    """The processes that a driver has started, by the start of their name."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if process.name().startswith(name) or any(part.startswith(name) for part in process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_all(driver: "subprocess.Popen[str]") -> None:
    """SIGKILL to a driver and everything it has started, at once."""
    victims = processes(driver)
    os.kill(driver.pid, signal.SIGKILL)
    for process in victims:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    driver.wait()
    psutil.wait_procs(victims, timeout=10)


def same_as_in(peace: Path, desk: Desk, ids: tuple[str, ...]) -> None:
    """Law 3: bit-equal if everyone went on from the same step, and so kept its company; else within law 2.

    (Law 2 holds to 1e-5 in fp64; hundreds of fp32 steps in another company add up their roundings.)
    """
    began = {tuple(began_at(desk, id)) for id in ids}
    for id in ids:
        assert len(versions(desk, id)) == 1
        mine, theirs = (_last_adapter(storage, id) for storage in (desk.storage, peace))
        if len(began) == 1:
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-3


def began_at(desk: Desk, id: str) -> list[int]:
    """The steps at which workers went on with a subject."""
    run = only_run(desk)
    assert run is not None
    lines = [text for _, text in read_log(run, id) if ": preparing at step" in text]
    return [int(line.split()[-1].split("/")[0]) for line in lines]


def versions(desk: Desk, id: str) -> list[str]:
    return Registry(open_storage(str(desk.storage))).versions("default", id)


def _last_adapter(folder: Path, id: str) -> dict[str, Tensor]:
    """What the last checkpoint holds, in fp32."""
    storage = open_storage(str(folder))
    (run,) = list_runs(storage)
    _, data = next(RunStore(storage, run).load_checkpoints(id))
    modules = load_state(data).adapter.modules
    return {f"{name}.{half}": getattr(low, half) for name, low in modules.items() for half in ("down", "up")}
