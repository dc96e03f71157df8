"""A protocol on a cluster: an evaluator on each device, subjects to the one that is free. No maths, no files."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ray_app.silence import silence
from ray_app.train.cluster import Cluster, ClusterLimits, connect
from ray_app.train.lanes import slot_resources
from training.evaluation.protocol import JudgedSubject, Protocol, ProtocolSubject
from training.sampling.render import Look


class Evaluator:
    """Loads base and judges once, then sits subjects. `base`: a name or folder that every node finds."""

    def __init__(self, base: str, models: Path | None, likeness: str, fidelity: str, threads: int) -> None:
        silence()
        import torch

        from training.base.base import load_base
        from training.evaluation.judges.box import JudgeBox

        if threads:
            torch.set_num_threads(threads)
        self._base = load_base(base, park_text=True)
        box = JudgeBox(self._base, models)
        self._judges, self._inception = box.judges(likeness, fidelity), box.inception()

    def sit(self, protocol: Protocol, sitting: ProtocolSubject, look: Look, images: int | None) -> JudgedSubject:
        """Judges one subject of a protocol on this device."""
        from training.evaluation.protocol import run_protocol

        (judged,) = run_protocol(
            self._base, protocol, [sitting], self._judges, look=look, images=images, inception=self._inception
        )
        return judged


def spread_protocol(
    address: str,
    judging: tuple[str, Path | None, str, str],
    protocol: Protocol,
    sittings: Sequence[ProtocolSubject],
    look: Look,
    images: int | None,
) -> Iterator[JudgedSubject]:
    """Judges every sitting on the cluster at `address`, in the order in which they are done.

    `judging`: the base, the folder of models, the models of likeness and fidelity.
    """
    with connect(address) as cluster:
        import ray
        from ray.util import ActorPool

        count = min(cluster.seats, len(sittings))
        needs = slot_resources(cluster, ClusterLimits())
        evaluator: Any = ray.remote(Evaluator).options(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0))
        threads = _threads(cluster, count)
        pool = ActorPool([evaluator.remote(*judging, threads) for _ in range(count)])
        yield from pool.map_unordered(
            lambda one, sitting: one.sit.remote(protocol, sitting, look, images), list(sittings)
        )


def _threads(cluster: Cluster, evaluators: int) -> int:
    """Compute threads of each on this machine's CPUs; 0 leaves it to torch."""
    return max(1, (os.cpu_count() or 1) // evaluators) if cluster.local and not cluster.gpus else 0
