"""A lane: one long-lived Ray Train run. Its base is loaded once; the subject queue keeps its pack filled.

`run_lane` is the Ray task that holds the run; `lane_worker` is what each of the run's workers does: one on its one
device, or a gang, of which the first alone talks to the queue. Both get a `LaneSetup` as the plain dict that crosses
Ray's border.
"""

import itertools
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from ray_app.silence import silence
from ray_app.train.homes import task_of
from training.base.quantization import Offload, Quantization
from training.errors import UserError
from training.manifest.plan import PackPlan
from training.run.lease import Lease
from training.run.run import RunStore
from training.run.source import Beat, Orders, Outcome, Release, Task
from training.storage.closed import Closed
from training.storage.storage import StorageUnavailable, open_storage

if TYPE_CHECKING:
    from ray.train.torch import TorchConfig

    from training.base.base import Base

IDLE_SECONDS = 1.0  # how long an empty reply of the queue holds while the pack is busy
QUEUE_TIMEOUT_S = 60.0
WARM_LOOK_S = 0.5  # how often a lane without subjects asks for some
STORAGE_REST_S = 10.0  # before a lane tries a storage again that did not respond
_ORDERS = TypeAdapter(Orders)

log = logging.getLogger(__name__)


class LaneSetup(Closed):
    """What a lane is told. `storage` is a whole URI; `threads`: compute threads, 0 for torch's own choice.

    `marks` are the times (seconds since the epoch) at which the lane was opened and its stages ended.
    `run` is empty for a lane of a fleet, which trains subjects of any run on `base`, and waits for more for `warm_s`.
    """

    run: str
    base: str = ""
    base_hash: str = ""
    warm_s: float = 0.0
    storage: str
    lane: int
    profile: int
    plan: PackPlan
    queue: str
    threads: int = 0
    resources: dict[str, float]
    marks: dict[str, float] = {}

    def marked(self, stage: str) -> "LaneSetup":
        """The same order, with the end of a stage."""
        return self.model_copy(update={"marks": {**self.marks, stage: time.time()}})

    def start(self) -> str:
        """How long the lane took to be ready, by stage, in words."""
        times = list(self.marks.items())
        parts = [f"{name} {when - before:.1f}" for (_, before), (name, when) in itertools.pairwise(times)]
        return f"lane {self.lane} is ready {times[-1][1] - times[0][1]:.1f} s after it was opened: {', '.join(parts)}"


class QueueSource:
    """The subject queue as the subject loop sees it: every call goes to the queue's actor."""

    def __init__(self, queue: Any, lane: int, warm_s: float = 0.0) -> None:
        self.task_of: Callable[[Lease], Task] = _unknown
        self._warm_s = warm_s
        self._queue = queue
        self._lane = lane
        self._held: set[str] = set()
        self._empty_until = 0.0

    def lease(self, count: int) -> Sequence[Task]:
        """See `Source`; an empty reply holds for a second while something is held. With nothing held, a lane of a fleet
        waits for a while before it gives up."""
        if self._held and time.monotonic() < self._empty_until:
            return []
        leases = self._ask("lease", count)
        until = time.monotonic() + self._warm_s
        while not leases and not self._held and time.monotonic() < until and self._ask("stays"):
            time.sleep(WARM_LOOK_S)
            leases = self._ask("lease", count)
        self._held |= {lease["id"] for lease in leases}
        if not leases:
            self._empty_until = time.monotonic() + IDLE_SECONDS
        return [self.task_of(Lease.model_validate(lease)) for lease in leases]

    def beat(self, beat: Beat) -> Orders:
        """See `Source`."""
        return _ORDERS.validate_python(self._ask("beat", asdict(beat)))

    def ended(self, outcome: Outcome) -> None:
        """See `Source`."""
        self._held.discard(outcome.id)
        self._ask("ended", asdict(outcome))

    def enter(self, profile: int, node: str) -> bool:
        """Whether this lane's worker may begin; what an earlier one held goes back."""
        return bool(self._ask("enter", profile, node))

    def leave(self, reason: str, kind: Release) -> None:
        """Gives back what is still held."""
        self._ask("leave", reason, kind)

    def trouble(self) -> str | None:
        """Why this lane cannot work, if it cannot."""
        trouble: str | None = self._ask("trouble")
        return trouble

    def _ask(self, method: str, *values: object) -> Any:
        import ray

        return ray.get(getattr(self._queue, method).remote(self._lane, *values), timeout=QUEUE_TIMEOUT_S)


def lane_worker(payload: dict[str, Any]) -> None:
    """Loads the base and works until the queue has nothing more for this lane. Runs in Ray Train's workers."""
    silence()
    order = LaneSetup.model_validate(payload).marked("Ray Train's worker")
    import ray
    from ray.train import get_context

    first = get_context().get_world_rank() == 0
    source = QueueSource(ray.get_actor(order.queue), order.lane, order.warm_s)
    node = ray.get_runtime_context().get_node_id()
    if not _all_begin(order, first and source.enter(order.profile, node)):
        return  # its earlier workers all failed at once; `run_lane` asks for the reason
    try:
        _work(order, source, first)
    except StorageUnavailable as error:
        # the storage failed, no subject did; what is on it is whole
        source.leave(str(error), "preempted")
        time.sleep(STORAGE_REST_S)
        raise
    except Exception as error:
        # every worker of a gang gives its own reason: Ray restarts them all without one
        source.leave(in_words(error), "lost")
        raise
    if first:
        source.leave("the run was stopped", "stopped")


def _work(order: LaneSetup, source: QueueSource, first: bool) -> None:
    """What a worker does; all of a gang but its first follow that one."""
    import training.base.base  # noqa: F401  # here, so that what it takes can be told

    order = order.marked("torch")
    storage = open_storage(order.storage)
    run = RunStore(storage, order.run)
    record = run.record() if order.run else None
    if record is not None:
        asked = record.manifest
        base = _base(order, record.base, record.base_hash, asked.root, asked.base_quantization, asked.base_offload)
        specs = {subject.id: subject for subject in asked.subjects}
        source.task_of = lambda lease: lease.task(specs[lease.id])
    else:
        base = _base(order, order.base, order.base_hash, ".")
        source.task_of = partial(task_of, storage)
    order = order.marked("the base")
    if first:
        from training.trainer.assistant import read_training_adapter
        from training.trainer.worker.worker import work

        source.beat(Beat(notes=[order.marked("the trainer").start()]))
        if record is None:
            work(base, order.plan, source, run, tenant="")
        else:
            base, worn = read_training_adapter(base, asked.training_adapter, asked.root, record.worn)
            work(base, order.plan, source, run, tenant=record.tenant, root=asked.root, training_adapter=worn)
    else:
        from training.trainer.fitting import follow_pack

        follow_pack(base, order.plan)


def _all_begin(order: LaneSetup, first_begins: bool) -> bool:
    """Whether to begin: as the first worker of the gang says, for all of them."""
    if order.plan.workers == 1:
        return first_begins
    from training.trainer.zero import Gang

    return Gang().any(first_begins)


def _unknown(lease: Lease) -> Task:
    raise RuntimeError(f"nobody has said what {lease.id} is")


def _base(
    order: LaneSetup, name: str, wanted: str, root: str, quantization: Quantization = "none", offload: Offload = "none"
) -> "Base":
    """The base on this worker's device. Raises UserError if it is not the one of the hash `wanted`."""
    import torch

    from training.base.base import best_device, load_base
    from training.trainer.fitting import precision

    if order.threads:
        torch.set_num_threads(order.threads)
    device = best_device()
    dtype = precision(order.plan.profile.mixed_precision, device)
    base = load_base(
        name, device=device, dtype=dtype, root=root, park_text=True, quantization=quantization, offload=offload
    )
    if base.hash != wanted:
        raise UserError(
            f"Base '{name}' on node {os.uname().nodename} is not the one the run was submitted with "
            f"({base.hash[:12]} instead of {wanted[:12]}). Put the same files on every node."
        )
    return base


def in_words(error: BaseException) -> str:
    """The message of an error: unchanged if it is meant for users, else with the type of the error before it."""
    text = str(error).strip()
    return text if text and isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def run_lane(payload: dict[str, Any]) -> None:
    """One Ray Train run from start to end. A Ray task of its own, so that it can live on any node."""
    silence()
    order = LaneSetup.model_validate(payload).marked("its task")
    payload = order.model_dump()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    on_gpus = order.resources.get("GPU", 0) > 0
    # Train's own notes of the run; checkpoints go to the storage, subject by subject
    notes = tempfile.mkdtemp(prefix="dreamfleet-lane-", dir=os.environ.get("RAY_TMPDIR"))
    trainer = DataParallelTrainer(
        # not as `train_loop_config`, which Ray may show in its dashboard: the storage's URI may hold credentials
        lambda: lane_worker(payload),
        backend_config=_process_group(order.plan.workers),
        scaling_config=ScalingConfig(
            num_workers=order.plan.workers,
            use_gpu=on_gpus,
            resources_per_worker=order.resources,
            # GPUs of a gang are fastest within one node; CPU workers go to several nodes for their memory
            placement_strategy="PACK" if on_gpus else "SPREAD",
        ),
        run_config=RunConfig(
            name=f"lane-{order.lane}-{time.time_ns():x}",
            storage_path=notes,
            # the queue counts what a subject costs; a lane itself is never given up for its workers' deaths
            failure_config=FailureConfig(max_failures=-1),
        ),
    )
    try:
        trainer.fit()
        trouble = QueueSource(ray.get_actor(order.queue), order.lane).trouble()
        if trouble is not None:
            raise UserError(trouble)
    finally:
        shutil.rmtree(notes, ignore_errors=True)


def _process_group(workers: int) -> "TorchConfig | None":
    """The process group of a gang; None for a single worker, for which torch's store would listen on all interfaces."""
    if workers == 1:
        return None
    import torch
    from ray.train.torch import TorchConfig

    # said outright: with logical GPUs on a CPU machine Ray would choose nccl
    return TorchConfig(backend="nccl" if torch.cuda.is_available() else "gloo")
