"""What a command does with a run: it leads the run, or looks on while another driver leads, or lets it run detached."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ray_app.train.cluster import ClusterLimits, connect
from ray_app.train.console import RunConsole
from ray_app.train.driver import Driver, finish
from ray_app.train.metrics import RunMetrics
from training.run.lead import Lead, Lost
from training.run.run import ENDED, RunRecord, RunStore, SubjectRecord
from training.run.submission import Submission, settle
from training.run.view import RunView

LOOK_SECONDS = 1.0


class Whole(NamedTuple):
    """A run and its subjects in manifest order."""

    record: RunRecord
    subjects: Sequence[SubjectRecord]


def drive_run(
    submission: Submission, address: str, limits: ClusterLimits, console: Console, *, retry: bool = False
) -> Whole:
    """Works a run off, or waits for the process that leads it.

    On KeyboardInterrupt checkpoints are written and it is raised again.
    """
    store, lead = submission.store, Lead(submission.store.storage, submission.store.driver_key)
    while True:
        leader = lead.acquire()
        if leader is not None:
            console.print(f"process {leader.pid} on {leader.host.split()[0]} drives run {store.run}; looking on")
            whole = look_on(store, console, until=lambda: lead.living() is None)
            if whole.record.state != "running":
                return whole
            continue
        try:
            with _termination_interrupts():
                return _lead_run(submission, lead, address, limits, console, retry)
        except Lost:
            console.print(f"another driver has taken over run {store.run}")
        finally:
            lead.release()


def look_on(store: RunStore, console: Console, until: Callable[[], bool] = lambda: False) -> Whole:
    """Shows the states on the storage until the run has ended, or `until` says so."""
    with RunConsole(console, store.run) as watcher:
        while True:
            whole = read_run(store)
            watcher.see(RunView.of_records(whole.subjects), {subject.id: subject for subject in whole.subjects})
            if whole.record.state != "running" or until():
                return whole
            time.sleep(LOOK_SECONDS)


def read_run(store: RunStore) -> Whole:
    """A run as it lies on the storage. Raises UserError if it is not there."""
    record = store.record()
    subjects = [
        store.subject(subject.id) or SubjectRecord(id=subject.id, max_steps=subject.train.max_steps)
        for subject in record.manifest.subjects
    ]
    return Whole(record, subjects)


def detach_run(submission: Submission, address: str, limits: ClusterLimits) -> Path:
    """Starts a driver of its own that outlives this command; returns the file its output goes to."""
    log = Path(tempfile.gettempdir(), f"dreamfleet-{submission.record.run}-{os.getpid()}.log")
    command = [sys.executable, "-m", "ray_app.cli.main", *drive_arguments(submission, address, limits)]
    with log.open("wb") as output:
        subprocess.Popen(
            command,
            env={**os.environ, **drive_environment(submission)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return log


def drive_arguments(submission: Submission, address: str, limits: ClusterLimits) -> list[str]:
    """The arguments of the command that goes on with a run from anywhere, in `drive_environment`."""
    arguments = ["drive", submission.record.run, "--address", address]
    arguments += ["--lanes", str(limits.lanes)] if limits.lanes else []
    arguments += ["--max-gpus", str(limits.gpus)] if limits.gpus else []
    arguments += ["--priority", str(limits.priority)] if limits.priority else []
    return arguments


def drive_environment(submission: Submission) -> dict[str, str]:
    """The storage of that command: its URI may hold credentials, and arguments are shown to every user of a machine."""
    return {"DREAMFLEET_STORAGE": submission.store.storage.uri}


def _lead_run(
    submission: Submission, lead: Lead, address: str, limits: ClusterLimits, console: Console, retry: bool
) -> Whole:
    store = submission.store
    record = store.record()
    if retry and record.state != "running":
        record = record.model_copy(update={"state": "running", "finished": None})
        store.save(record)
    submission = replace(submission, record=record)
    subjects = settle(submission, retry)
    for subject in subjects:
        submission.files.take_out(subject.id)  # lanes read for themselves
    lead.renew()
    if all(subject.state in ENDED for subject in subjects):
        return Whole(finish(store, record, subjects), subjects)
    # Ray prints what nodes have to say on stdout, where only a command's result belongs
    with (
        contextlib.redirect_stdout(sys.stderr),
        connect(address) as cluster,
        RunConsole(console, record.run) as shown,
    ):
        watchers = (shown, RunMetrics(record.run))
        driver = Driver(submission, subjects, lead, cluster, watchers, limits)
        return Whole(driver.run(), tuple(driver.records.values()))


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM is a wish to stop, as Ctrl-C is. (Signals can be handled in the main thread only.)"""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
