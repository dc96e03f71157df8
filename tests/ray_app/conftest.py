"""A manifest on the tiny base, and the command line as users run it."""

import contextlib
import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

# Ray reads these when it is imported, once a process: everything on 127.0.0.1, and tokens
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")

from tests.ray_app.head import SETTINGS, ray_head
from tests.tiny import tiny_images

MANIFEST = """\
version: 1
name: {name}
base: {base}
defaults:
  instance_prompt: "a photo of sks {{class}}"
  class: dog
  prior: {{enabled: false}}
  evaluate: {{enabled: false}}
  train: {{max_steps: {steps}, checkpoint_every: {every}, learning_rate: 1.0e-3}}
subjects:
"""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def states(self) -> dict[str, str]:
        return {subject["id"]: subject["state"] for subject in self.json["subjects"]}


@dataclass(frozen=True)
class Desk:
    """A user's folder with a tiny base, where manifests are written and commands are run."""

    folder: Path
    base: Path

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    def manifest(self, *ids: str, name: str = "pets", steps: int = 20, every: int = 5, tail: str = "") -> Path:
        """Writes a manifest and photos of these subjects."""
        for seed, id in enumerate(ids):
            tiny_images(self.folder / "images" / id, seed=seed)
        text = MANIFEST.format(name=name, base=self.base, steps=steps, every=every)
        text += "".join(f"  - {{id: {id}, images: images/{id}}}\n" for id in ids) + tail
        path = self.folder / f"{name}.yaml"
        path.write_text(text)
        return path

    def start(self, *arguments: str | Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "ray_app.cli.main", *map(str, arguments)]
        environment = {**os.environ, "DREAMFLEET_STORAGE": str(self.storage), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str | Path, timeout_s: float = 240) -> Result:
        """Runs `dreamfleet` with these arguments to its end."""
        with self.start(*arguments) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.terminate()
                out, err = process.communicate(timeout=60)
                raise AssertionError(f"timed out; stdout:\n{out}\nstderr:\n{err}") from None
            return Result(process.returncode, out, err)


def open_ports(pid: int) -> dict[int, str]:
    """The ports on which a process and those it has started listen beyond loopback, with the process's title."""
    found = {}
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                address = ipaddress.ip_address(connection.laddr.ip.removeprefix("::ffff:"))
                if connection.status == psutil.CONN_LISTEN and not address.is_loopback:
                    found[connection.laddr.port] = " ".join(process.cmdline())
    return found


@pytest.fixture
def desk(tmp_path: Path, tiny_folder: Path) -> Desk:
    return Desk(tmp_path, tiny_folder)


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The dashboard's address of a cluster that is already there."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    with ray_head() as head:
        yield head.dashboard
