"""A run through the Ray Jobs API of a cluster that is already there."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.ray_app.conftest import Desk

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The dashboard's address of a cluster of one node, with token auth, on loopback."""
    dashboard = free_port()
    with tempfile.TemporaryDirectory(prefix="dfh-") as folder:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=8"]
        command += [f"--port={free_port()}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=150000000"]
        for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "ray-client-server-port"):
            command.append(f"--{name}={free_port()}")  # other clusters may run on this machine
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(f"http://127.0.0.1:{dashboard}/api/version", process)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            end(process)


def wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"})
        try:
            urllib.request.urlopen(request, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"the head does not answer at {url} (exit status {process.poll()})")


def end(process: "subprocess.Popen[bytes]") -> None:
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout=10)
    process.wait()


def test_a_run_as_a_job_then_again_and_detached(desk: Desk, head: str) -> None:
    manifest = desk.manifest("rusty", "tabby")
    result = desk.run("train", manifest, "--address", head, "--json")
    assert result.status == 0, result.err
    assert set(result.states().values()) == {"published"}
    uploaded = desk.storage / "runs" / result.json["run"] / "subjects/rusty/images"
    assert len(list(uploaded.iterdir())) == 5

    again = desk.run("train", manifest, "--address", head, "--detach", "--json")
    assert again.status == 0 and again.json["state"] == "running"
    watched = desk.run("status", again.json["run"], "--watch", "--json")
    assert set(watched.states().values()) == {"reused"}


def test_what_the_cluster_cannot_see_is_refused_before_anything_is_submitted(desk: Desk) -> None:
    manifest = desk.manifest("rusty")
    result = desk.run("train", manifest, "--address", "http://head.example:8265")
    assert result.status == 2 and "folder of this machine" in result.err and "s3://" in result.err
    result = desk.run("train", manifest, "--address", "http://head.example:8265", "--storage", "s3://bucket/x")
    assert result.status == 2 and "Base" in result.err and "does not see" in result.err
    assert not desk.storage.exists()


def test_a_dashboard_that_is_not_there(desk: Desk) -> None:
    result = desk.run("train", desk.manifest("rusty"), "--address", f"http://127.0.0.1:{free_port()}")
    assert result.status == 2 and "No Ray dashboard answers" in result.err
    assert "Traceback" not in result.err
    assert json.loads(desk.run("status", "--json").out)["runs"][0]["state"] == "running"
