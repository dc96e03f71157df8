"""Trains on a cluster of two nodes, whose workers find no memory free for activations. Prints JSON.

A program of its own, since a process has one Ray. Arguments: manifest, storage.
"""

import json
import os
import sys

os.environ.update(
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_prestart_worker_first_driver="0",
)

import psutil
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from ray_app.cluster import AUTO, Limits
from ray_app.drive import drive_run
from ray_app.submission import submit
from training.storage import open_storage


def be_small() -> None:
    """What every worker of the cluster does first."""
    found = psutil.virtual_memory()
    psutil.virtual_memory = lambda: found._replace(available=0)


def main() -> None:
    storage = open_storage(sys.argv[2])
    memory = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **memory)
    hook = {"worker_process_setup_hook": "tests.ray_app.two_nodes.be_small"}
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=hook)
    whole = drive_run(submit(sys.argv[1], storage), AUTO, Limits(), Console(stderr=True, width=1000))
    sys.stdout.write(json.dumps([subject.model_dump(mode="json") for subject in whole.subjects]))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
