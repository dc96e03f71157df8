"""Trains on a cluster of two nodes and takes the one away that a lane works on. See `tests.ray_app.nodes`."""

import json
import sys
import threading
import time

import ray
from rich.console import Console

from ray_app.train.cluster import AUTO, ClusterLimits
from ray_app.train.drive import drive_run
from tests.ray_app.nodes import cluster_of
from training.run.run import RunStore
from training.run.submission import submit
from training.storage.storage import open_storage


def main() -> None:
    storage = open_storage(sys.argv[2])
    with cluster_of(2) as found:
        submission = submit(sys.argv[1], storage)
        lost: list[str] = []

        def lose_one() -> None:
            """Once there is a checkpoint: the first node that has a lane's worker."""
            run = RunStore(storage, submission.record.run)
            while not any(run.checkpoints(subject.id) for subject in submission.manifest.subjects):
                time.sleep(0.2)
            busy = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] in found.nodes]
            lost.append(busy[0])
            found.cluster.remove_node(found.nodes[busy[0]], allow_graceful=False)
            found.add()

        threading.Thread(target=lose_one, daemon=True).start()
        whole = drive_run(submission, AUTO, ClusterLimits(), Console(stderr=True))
        subjects = [subject.model_dump(mode="json") for subject in whole.subjects]
        sys.stdout.write(json.dumps({"lost": lost, "subjects": subjects}))


if __name__ == "__main__":
    main()
