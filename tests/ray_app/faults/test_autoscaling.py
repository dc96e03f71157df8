"""A run on a cluster without a GPU node: Ray's own autoscaler adds them for it, within its bounds, and takes them away.

Its timings are logged: `pytest -m slow -o log_cli=true --log-cli-level=INFO tests/ray_app/faults/test_autoscaling.py`.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from tests.ray_app.conftest import Desk
from tests.ray_app.faults.conftest import wait_until
from tests.ray_app.head import end

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.ray, pytest.mark.slow]

PORT = 26379
HEAD = "ray.head.default"  # what the provider calls it
NODES_THERE_ARE = 4  # more than the run may have
NODES_ALLOWED = 2


def settings() -> dict[str, Any]:
    """A cluster of a head without GPUs and up to `NODES_THERE_ARE` nodes that Ray only pretends to start."""
    return {
        "cluster_name": "growing",
        "max_workers": NODES_THERE_ARE,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{PORT}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            HEAD: {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 80 * 2**20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": NODES_THERE_ARE,
            },
        },
        "head_node_type": HEAD,
        "auth": {},
        "docker": {},
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


@contextmanager
def growing_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of commands that run on the cluster."""
    config = folder / "cluster.json"
    config.write_text(json.dumps(settings()))
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_TMPDIR": str(folder),
        "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
        "OMP_NUM_THREADS": "1",
    }
    ray_command = Path(sys.executable).with_name("ray")
    arguments = ["start", "--head", "--block", f"--port={PORT}", "--num-cpus=2", "--include-dashboard=false"]
    arguments += [f"--object-store-memory={100 * 2**20}", f"--autoscaling-config={config}"]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen([ray_command, *arguments], env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: b"Ray runtime started" in (folder / "head.log").read_bytes(), "the head starts")
        yield environment
    finally:
        end(head)


class GpuNodes:
    """How many GPU nodes there are over the time, as another process on the cluster sees it. Use as a context."""

    # a file of its own: Ray prints warnings of its raylets on stdout
    PROGRAM = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
with open(sys.argv[2], "w") as log:
    while True:
        print(sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes()), file=log, flush=True)
        time.sleep(0.5)
"""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._seen = log
        log.touch()
        command = [sys.executable, "-c", self.PROGRAM, f"127.0.0.1:{PORT}", str(log)]
        self._looker = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    def seen(self) -> list[int]:
        return [int(line) for line in self._seen.read_text().split()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._looker.kill()
        self._looker.wait()


def test_nodes_come_for_a_run_and_go_after_it(desk: Desk) -> None:
    manifest = desk.manifest(*(f"subject-{index:02d}" for index in range(12)), steps=60, every=20)
    with (
        tempfile.TemporaryDirectory(prefix="dfa-") as root,
        growing_cluster(Path(root)) as environment,
        GpuNodes(environment, Path(root, "nodes.log")) as nodes,
    ):
        wait_until(nodes.seen, "the cluster answers")
        assert max(nodes.seen()) == 0
        command = [sys.executable, "-m", "ray_app.cli.main", "train", str(manifest), "--address", f"127.0.0.1:{PORT}"]
        command += ["--max-gpus", str(NODES_ALLOWED), "--storage", str(desk.storage), "--json"]
        began = time.monotonic()
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as driver:
            wait_until(lambda: nodes.seen()[-1] >= 1, "a node for the first lane")
            first = time.monotonic() - began
            out, err = driver.communicate(timeout=400)
        ended = time.monotonic()
        assert driver.returncode == 0, err[-3000:]
        subjects = json.loads(out)["subjects"]
        assert {subject["state"] for subject in subjects} == {"published"}
        assert len({subject["pack"] for subject in subjects}) == NODES_ALLOWED  # spread over what it may have
        assert max(nodes.seen()) == NODES_ALLOWED
        wait_until(lambda: nodes.seen()[-1] == 0, "the nodes go")
        gone = time.monotonic() - ended
    log.info("first node after %.0f s, run of %.0f s, all nodes gone %.0f s later", first, ended - began, gone)
