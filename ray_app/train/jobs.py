"""Runs on a cluster elsewhere, through Ray's Jobs API: the driver is a job there, this command only looks on.

What the driver needs travels by the storage: the manifest, the states and the photos. So the storage must be one that
the cluster sees as well; that is checked before anything is submitted.
"""

import shlex
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from ray_app.train.cluster import ClusterLimits
from ray_app.train.drive import Whole, drive_arguments, drive_environment, look_on, read_run
from training.base.files.folder import EMBEDDED, find_base
from training.errors import UserError
from training.run.submission import Submission

JOB_SECONDS = 5.0  # how often the job itself is asked for
HEAD_SECONDS = 60.0  # how long a head that has just started may take
_ALIVE = ("PENDING", "RUNNING")


def check_reach(address: str, storage: str, base: str, root: str) -> None:
    """Raises UserError for a storage or a base that the cluster at `address` cannot see."""
    if urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1"):
        return
    if "://" not in storage:
        raise UserError(
            f"Storage '{storage}' is a folder of this machine, which the cluster at {address} does not see. Use "
            "s3://bucket/prefix or gs://bucket/prefix, or file:///path for a folder that every node has mounted."
        )
    folder = find_base(base, root)
    if Path(root, base).exists() and EMBEDDED not in folder.parents:
        raise UserError(
            f"Base '{base}' is a folder of this machine, which the cluster at {address} does not see. Use a hub id or "
            "an embedded base, or an absolute path that every node has, submitted from a node."
        )


def submit_job(submission: Submission, address: str, limits: ClusterLimits) -> str:
    """Starts the driver as a Ray job and returns the job's id. Raises UserError if the cluster does not take it."""
    arguments = drive_arguments(submission, "auto", limits)
    python = sys.executable if urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1") else "python"
    job = {
        "entrypoint": shlex.join([python, "-m", "ray_app.cli.main", *arguments]),
        "submission_id": f"{submission.record.run}-{time.time_ns() & 0xFFFFFFFF:08x}",
        "runtime_env": {"env_vars": drive_environment(submission)},
        "metadata": {"run": submission.record.run, "tenant": submission.record.tenant},
    }
    return _submit(_client(address), job, address)


def _submit(client: Any, job: dict[str, Any], address: str) -> str:
    deadline = time.monotonic() + HEAD_SECONDS
    while True:
        try:
            id: str = client.submit_job(**job)
            return id
        except RuntimeError as error:
            # a head that has just started has no agent yet
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise UserError(f"The cluster at {address} refused the job: {str(error).splitlines()[0]}") from None
            time.sleep(2)


def follow_job(submission: Submission, address: str, job: str, console: Console) -> Whole:
    """Looks on until the run has ended. Raises UserError if its driver ended before it; the same command goes on."""
    client, asked = _client(address), time.monotonic()

    def over() -> bool:
        nonlocal asked
        if time.monotonic() - asked < JOB_SECONDS:
            return False
        asked = time.monotonic()
        return str(client.get_job_status(job)) not in _ALIVE

    look_on(submission.store, console, until=over)
    whole = read_run(submission.store)
    if whole.record.state == "running":
        said = client.get_job_logs(job).strip().splitlines()[-5:]
        raise UserError("\n".join([f"The driver of run {whole.record.run} (job {job}) has ended before it:", *said]))
    return whole


def _client(address: str) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(
            f"The cluster at {address} asks for Ray's token. Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file."
        ) from None
    except (ConnectionError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(
            f"No Ray dashboard responds at {address}: {said}. Give the head's, like http://head:8265."
        ) from None
