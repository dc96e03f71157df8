"""Runs on a cluster of several nodes, each in a program of its own, since a process has one Ray.

Such a program gets a manifest and a storage, trains inside `cluster_of`, and prints JSON in its last line; a test
starts it with `run_program`. Light to import: every worker of such a cluster may do so.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tests.ray_app.conftest import Desk

SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
}
MEMORY = {"object_store_memory": 100 * 2**20}


class Nodes(NamedTuple):
    """Ray's `cluster_utils.Cluster`, and its nodes by id but for the head, which takes no work."""

    cluster: Any
    nodes: dict[str, Any]

    def add(self) -> None:
        node = self.cluster.add_node(num_cpus=1, **MEMORY)
        self.nodes[node.node_id] = node


@contextmanager
def cluster_of(count: int, **joining: Any) -> Iterator[Nodes]:
    """So many nodes of one CPU each; this process has joined them, with `joining` for ray.init."""
    import ray
    from ray.cluster_utils import Cluster

    found = Nodes(
        Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **MEMORY}), {}
    )
    for _ in range(count):
        found.add()
    ray.init(address=found.cluster.address, log_to_driver=False, **joining)
    yield found
    ray.shutdown()
    found.cluster.shutdown()


class Ran(NamedTuple):
    """What a program printed, and what a person read meanwhile."""

    json: Any
    err: str


def run_program(module: str, manifest: Path, desk: "Desk", timeout_s: float = 500) -> Ran:
    """Runs a program to its end, which has to be a good one."""
    root = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory(prefix="dfn-") as folder:
        environment = {**os.environ, **SETTINGS, "PYTHONPATH": root, "RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", module, manifest, desk.storage],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return Ran(json.loads(done.stdout.splitlines()[-1]), done.stderr)
