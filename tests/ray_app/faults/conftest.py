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
from torch import Tensor

from tests.ray_app.conftest import Desk
from training.adapter import load_adapter
from training.registry import Registry
from training.run import RunStore, list_runs
from training.storage import open_storage


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


def difference(one: Path, other: Path, id: str) -> float:
    """The largest difference of an adapter in two storages."""
    mine, theirs = (_adapter(folder, id) for folder in (one, other))
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def versions(desk: Desk, id: str) -> list[str]:
    return Registry(open_storage(str(desk.storage))).versions("default", id)


def _adapter(folder: Path, id: str) -> dict[str, Tensor]:
    registry = Registry(open_storage(str(folder)))
    adapter = load_adapter(registry.weights(registry.resolve(id)))
    tensors = {}
    for name, low in adapter.modules.items():
        tensors[f"{name}.down"], tensors[f"{name}.up"] = low.down.double(), low.up.double()
    return tensors
