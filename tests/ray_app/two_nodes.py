"""Trains on a cluster of two nodes, whose workers find no memory free for activations. See `tests.ray_app.nodes`."""

import json
import sys

import psutil
from rich.console import Console

from ray_app.train.cluster import AUTO, ClusterLimits
from ray_app.train.drive import drive_run
from tests.ray_app.nodes import cluster_of
from training.run.submission import submit
from training.storage.storage import open_storage


def be_small() -> None:
    """What every worker of the cluster does first."""
    found = psutil.virtual_memory()
    psutil.virtual_memory = lambda: found._replace(available=0)


def main() -> None:
    storage = open_storage(sys.argv[2])
    with cluster_of(2, runtime_env={"worker_process_setup_hook": "tests.ray_app.two_nodes.be_small"}):
        whole = drive_run(submit(sys.argv[1], storage), AUTO, ClusterLimits(), Console(stderr=True, width=1000))
        sys.stdout.write(json.dumps([subject.model_dump(mode="json") for subject in whole.subjects]))


if __name__ == "__main__":
    main()
