"""The Ray cluster a command runs on: started on this machine, found, or joined. Owns Ray's settings and its shutdown.

`import ray` happens inside `connect`, because Ray reads its environment when it is imported. Knows nothing about runs.
"""

import functools
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from training.errors import UserError

LOCAL, AUTO, CLIENT, JOBS = "local", "auto", "ray://", ("http://", "https://")
OBJECT_STORE_BYTES = 150 * 2**20  # paths and ids travel through it, never tensors
LEAST_LOCAL_CPUS = 8  # logical: a lane, a server and their helpers must fit on any machine
_FOLDER = "dreamfleet-"

# Read by Ray and by every process that Ray starts.
_LOCAL_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own processes listen on 127.0.0.1; the name does not say so. Two kinds of port do not heed it: the gRPC of
    # Serve's replicas, which asks for the token, and the rendezvous of a gang's workers (docs/operations.md)
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # idle workers cost a second of CPU each
    "RAY_prestart_worker_first_driver": "0",
    "RAY_AUTH_MODE": "token",
    # there is no preemption on one machine
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ray_app.serve.proxy.guard",
    # Ray's own 15 leaves its workers next to nothing where anything else computes
    "RAY_worker_niceness": "0",
}
_ALL_SETTINGS = {
    # OpenMP threads that spin long while they wait make every process on busy cores crawl, ten times slower and more;
    # threads that never spin make idle cores half as fast
    "GOMP_SPINCOUNT": "1000",
    # Train polls its workers this often; at its own 2 s every start and end waits that long
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # a node that an autoscaler adds may take minutes; at Train's own 60 s the demand is withdrawn and made anew
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Cluster(NamedTuple):
    """What a run may use. `seats`: lanes that can work at once (GPUs; on a cluster without, its nodes)."""

    local: bool
    gpus: int
    cpus: int
    nodes: int

    @property
    def seats(self) -> int:
        """Lanes that fit at once: one a GPU, or one a node where there is none."""
        return self.gpus or self.nodes


class ClusterLimits(NamedTuple):
    """What a run may take of the cluster. `lanes`: the most lanes at once; None: as many as there are seats.

    `gpus` are waited for where there are fewer: an autoscaler sees the demand. `priority`: above runs of lower ones.
    """

    lanes: int | None = None
    gpus: int | None = None
    cpus_per_lane: int = 1
    priority: int = 0


def check_address(address: str) -> str:
    """`address`, if it is of a known form; raises UserError otherwise."""
    if address in (LOCAL, AUTO) or address.startswith((CLIENT, *JOBS)) or _is_host_port(address):
        return address
    raise UserError(
        f"Address {address!r} is not known. Use local (starts Ray here), auto (a cluster on this machine), "
        "host:port, ray://host:10001 or http://host:8265 (Ray Jobs)."
    )


@contextmanager
def connect(address: str = LOCAL) -> Iterator[Cluster]:
    """Joins the cluster at `address`, or starts one for this process alone that ends with it, however it ends.

    Inside another `connect` it is that one's cluster. Raises UserError if there is no such cluster.
    """
    check_address(address)
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield current()._replace(local=address == LOCAL)
        return
    if address.startswith(JOBS):
        raise UserError(f"Address {address!r} is a Ray Jobs address: it takes `train` only. Use ray://host:10001 here.")
    os.environ.update({name: value for name, value in _ALL_SETTINGS.items() if name not in os.environ})
    if address == LOCAL:
        with _local_folder() as folder:
            yield from _local(folder)
    else:
        yield from _remote(address)


def _local(folder: Path) -> Iterator[Cluster]:
    os.environ.update(_LOCAL_SETTINGS)
    # other users of this machine could else run code as this one
    os.environ["RAY_AUTH_TOKEN"] = _token()
    os.environ["RAY_TMPDIR"] = str(folder)
    import ray

    ray.init(
        address="local",
        num_cpus=max(LEAST_LOCAL_CPUS, os.cpu_count() or 1),
        object_store_memory=OBJECT_STORE_BYTES,
        # a dashboard costs 4 s and 1 GB, and a cluster that ends with its command needs none
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
    )
    try:
        yield current()._replace(local=True)
    finally:
        ray.shutdown()


@functools.cache
def _token() -> str:
    """One for all clusters of this process: Ray reads it once and keeps it."""
    return secrets.token_hex(32)


def _remote(address: str) -> Iterator[Cluster]:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RaySystemError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"No Ray cluster responds at {address!r}: {said}. "
            "Start one with `ray start --head`, or use --address local."
        ) from None
    try:
        yield current()
    finally:
        ray.shutdown()


def current() -> Cluster:
    """The cluster this process is connected to, as it is now."""
    import ray

    resources = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    return Cluster(False, int(resources.get("GPU", 0)), int(resources.get("CPU", 0)), max(1, len(nodes)))


@contextmanager
def _local_folder() -> Iterator[Path]:
    """A folder for Ray's session that is removed afterwards; those of processes that were killed are removed first.

    Its path is short because Ray puts Unix sockets into it, and their paths may have 107 characters.
    """
    parent = Path(tempfile.gettempdir())
    for old in parent.glob(f"{_FOLDER}{os.getuid()}-*-*"):
        if not _is_alive(int(old.name.split("-")[2])):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getuid()}-{os.getpid()}-", dir=parent))
    before = {name: os.environ.get(name) for name in (*_LOCAL_SETTINGS, "RAY_AUTH_TOKEN", "RAY_TMPDIR")}
    try:
        yield folder
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_host_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and "/" not in address and port.isdigit()
