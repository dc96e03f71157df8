"""The storage fails under a run: an object store that answers badly, a disk that is full."""

import itertools
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ray_app.conftest import Desk
from tests.ray_app.faults.conftest import kill_all, only_run, step_of, wait_until
from tests.training.storage.test_storage import BUCKET, Faults
from training.storage.registry import Registry
from training.storage.storage import open_storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Store:
    """moto on loopback behind injected faults."""

    def __init__(self, faults: Faults, uri: str) -> None:
        self.faults = faults
        self.uri = uri


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    import urllib.request

    urllib.request.urlopen(
        urllib.request.Request(f"http://127.0.0.1:{server.server_port}/{BUCKET}", method="PUT"), timeout=10
    ).close()
    # the server's buckets live as long as this process
    uri = f"s3://{BUCKET}/fleet-{secrets.token_hex(4)}?endpoint_override=http://127.0.0.1:{server.server_port}&region=us-east-1"
    yield Store(faults, uri)
    server.shutdown()
    thread.join(timeout=10)


@contextmanager
def sometimes(faults: Faults) -> Iterator[list[tuple[str, str]]]:
    """Injects another fault every quarter of a second, if the one before has been met."""
    kinds = itertools.cycle(itertools.product(("PUT", "GET"), ("503", "500", "lost", "truncate")))
    met: list[tuple[str, str]] = []
    over = threading.Event()

    def inject() -> None:
        while not over.wait(0.25):
            if not faults.plan:
                method, fault = next(kinds)
                fault = "503" if (method, fault) == ("PUT", "truncate") else fault
                met.append((method, fault))
                faults.plan.append((method, fault))

    thread = threading.Thread(target=inject)
    thread.start()
    yield met
    over.set()
    thread.join()
    faults.plan.clear()


def test_a_run_on_an_object_store_that_fails_now_and_then(desk: Desk, store: Store) -> None:
    manifest = desk.manifest("rusty", "tabby", steps=40, every=10)
    with sometimes(store.faults) as injected:
        result = desk.run("train", manifest, "--storage", store.uri, "--json")
    assert result.status == 0, result.err
    assert set(result.states().values()) == {"published"}
    assert len(injected) > 20
    registry = Registry(open_storage(store.uri))
    for resolved in registry.list():
        assert len(registry.versions("default", resolved.id)) == 1
        registry.weights(resolved)  # raises if a byte is wrong
    assert len(registry.list()) == 2
    again = desk.run("train", manifest, "--storage", store.uri, "--json")
    assert set(again.states().values()) == {"reused"}


def test_a_store_that_is_gone_stops_the_run_and_the_same_command_ends_it(desk: Desk, store: Store) -> None:
    manifest = desk.manifest("rusty", "tabby", steps=400, every=20)
    uri = f"{store.uri}&attempts=2&request_timeout=2"
    with desk.start("train", manifest, "--storage", uri, "--json") as driver:
        opened = open_storage(uri)
        wait_until(lambda: [k for k in opened.list("runs") if "/checkpoints/" in k], "a checkpoint")
        store.faults.plan += [(method, "503*") for method in ("GET", "PUT", "HEAD", "DELETE")]
        out, err = driver.communicate(timeout=120)
    assert driver.returncode == 2 and "Traceback" not in err, err
    assert "storage" in err
    store.faults.plan.clear()
    result = desk.run("train", manifest, "--storage", uri, "--json")
    assert result.status == 0, result.err
    assert set(result.states().values()) == {"published"}
    assert all(len(Registry(opened).versions("default", id)) == 1 for id in ("rusty", "tabby"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_tears_nothing_and_more_room_ends_the_run(desk: Desk, small_disk: Path) -> None:
    manifest = desk.manifest("rusty", "tabby", steps=100, every=10)
    storage = small_disk / "storage"
    result = desk.run("train", manifest, "--storage", storage, "--json")
    assert result.status in (1, 2) and "Traceback" not in result.err, result
    assert "space" in result.err or "full" in result.err
    opened = open_storage(str(storage))
    for key in opened.list("runs"):
        if key.endswith(".json"):
            json.loads(opened.get(key))
    assert not [name for _, _, names in os.walk(storage) for name in names if name.startswith(".tmp-")]
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    again = desk.run("train", manifest, "--storage", storage, "--json")
    assert again.status == 0, again.err
    assert set(again.states().values()) <= {"published", "reused"}


def test_a_clock_that_jumps_changes_nothing(desk: Desk) -> None:
    """The machine's clock cannot be set here: two drivers see different ones, by what Python tells them."""
    jump = desk.folder / "sitecustomize.py"
    jump.write_text("import time\nreal = time.time\ntime.time = lambda: real() - 86400 * 365\n")
    manifest = desk.manifest("rusty", "tabby", steps=400, every=20)
    with desk.start("train", manifest) as driver:
        wait_until(lambda: step_of(desk, "tabby") >= 20, "a checkpoint")
        kill_all(driver)
    environment = {**os.environ, "PYTHONPATH": f"{desk.folder}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [str(Path(sys.executable).parent / "dreamfleet"), "train", manifest, "--storage", desk.storage, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = only_run(desk)
    assert run is not None and run.run == json.loads(done.stdout)["run"]
