"""A Ray cluster of one node that is already there, as another command would find it."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

# read by Ray where it is started and by the commands that join it
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "f" * 64,
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head(NamedTuple):
    """Where a cluster answers: its dashboard, for jobs and `serve deploy`, and what drivers join."""

    dashboard: str
    address: str


@contextmanager
def ray_head(*arguments: str) -> Iterator[Head]:
    """A cluster of one node, with token auth, on loopback. `SETTINGS` have to be set."""
    dashboard, port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="dfh-") as folder:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=8"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=150000000", *arguments]
        for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "ray-client-server-port"):
            command.append(f"--{name}={free_port()}")  # other clusters may run on this machine
        environment = {**os.environ, "RAY_TMPDIR": folder}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(f"http://127.0.0.1:{dashboard}/api/version", process)
            yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}")
        finally:
            end(process)


def _wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
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
    """Kills a process and all that it has started."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout=10)
    process.wait()
