"""Trains on a cluster of three nodes in this process, and takes the node away that a lane works on. Prints JSON.

A program of its own, since a process has one Ray. Arguments: manifest, storage.
"""

import json
import os
import sys
import threading
import time

os.environ.update(
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_prestart_worker_first_driver="0",
)

import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from ray_app.cluster import AUTO, Limits
from ray_app.drive import drive_run
from ray_app.submission import submit
from training.run import RunStore
from training.storage import open_storage


def main() -> None:
    storage = open_storage(sys.argv[2])
    memory = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1, **memory) for _ in range(2))}
    ray.init(address=cluster.address, log_to_driver=False)
    submission = submit(sys.argv[1], storage)
    lost: list[str] = []

    def lose_one() -> None:
        """Once there is a checkpoint: the first node that has a lane's worker."""
        run = RunStore(storage, submission.record.run)
        while not any(run.checkpoints(subject.id) for subject in submission.manifest.subjects):
            time.sleep(0.2)

        busy = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] in nodes]
        lost.append(busy[0])
        cluster.remove_node(nodes[busy[0]], allow_graceful=False)
        cluster.add_node(num_cpus=1, **memory)

    thread = threading.Thread(target=lose_one, daemon=True)
    thread.start()
    whole = drive_run(submission, AUTO, Limits(), Console(stderr=True))
    sys.stdout.write(
        json.dumps(
            {
                "lost": lost,
                "subjects": [
                    {
                        "id": subject.id,
                        "state": subject.state,
                        "pack": subject.pack,
                        "attempts": [attempt.kind for attempt in subject.attempts],
                    }
                    for subject in whole.subjects
                ],
            }
        )
    )
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
