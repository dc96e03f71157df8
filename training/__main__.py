"""`python -m training MANIFEST [--storage DIR]`: a whole manifest on this machine, without Ray.

The exit status is 0 if every subject was published, 1 if some failed, 2 for bad input.
"""

import argparse
import os
import sys
import time

# threads that spin long make busy cores crawl, those that never spin halve idle ones; torch's OpenMP reads this once
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from training.base.base import best_device, load_base
from training.errors import UserError
from training.evaluation.report import write_report
from training.manifest.plan import plan_run
from training.run.lead import Lead
from training.run.local import LocalSource, entries
from training.run.run import SubjectRecord, end_run
from training.run.subject_queue import SubjectQueue, View
from training.run.submission import Submission, settle, submit
from training.storage.storage import Storage, open_storage
from training.trainer.worker.worker import precision, work


def main() -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("manifest")
    parser.add_argument("--storage", default="storage")
    asked = parser.parse_args()
    try:
        return train_here(asked.manifest, open_storage(asked.storage))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def train_here(path: str, storage: Storage) -> int:
    """Trains a manifest's subjects in this process, one pack after another; returns the exit status.

    Raises UserError for a manifest that is wrong, or whose run another process leads.
    """
    submission = submit(path, storage)
    store, started = submission.store, time.time()
    lead = Lead(storage, store.driver_key)
    leader = lead.acquire()
    if leader is not None:
        raise UserError(
            f"Process {leader.pid} on {leader.host} drives run {store.run}. Wait for it, or stop it and try again."
        )
    with lead:
        records = _train(submission, settle(submission), lead)
        end_run(store, submission.record, records)
    report = write_report(store)
    states = [record.state for record in records]
    done = sum(state in ("published", "reused") for state in states)
    print(f"report: {report}")
    print(f"run {store.run}: {done} published, {len(states) - done} failed, {time.time() - started:.0f} s")
    return 0 if done == len(states) else 1


EVERYTHING = -1  # what has changed since before the beginning


class Console:
    """What a person sees: a line for every change of a subject's state, one a second for those that train."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}

    def show(self, view: View) -> None:
        """Prints what has changed."""
        for note in view.notes:
            print(note, flush=True)
        for record in view.changed:
            if record.state != self._states.get(record.id):
                about = record.reason or (record.version or "")[:12]
                print(f"{record.id}: {record.state} {about}".rstrip(), flush=True)
            self._states[record.id] = record.state
        training = [record for record in view.changed if record.state == "training" and record.loss is not None]
        if training:
            speed = sum(lane.images_per_second for lane in view.lanes)
            steps = " ".join(f"{record.id}={record.step}/{record.max_steps}({record.loss:.3f})" for record in training)
            print(f"{speed:6.1f} images/s  {steps}", flush=True)


def _train(submission: Submission, subjects: tuple[SubjectRecord, ...], lead: Lead) -> tuple[SubjectRecord, ...]:
    """Works the packs of a run off; returns every subject as it stands then."""
    manifest = submission.manifest
    packs = plan_run(submission.record.manifest, submission.base).packs
    queue = SubjectQueue(entries(submission, subjects, packs))

    console = Console()
    console.show(queue.view(EVERYTHING))

    def see(view: View) -> None:
        lead.renew()
        console.show(view)

    for lane, pack in enumerate(packs):
        if not queue.view().waiting.get(lane):
            continue
        queue.enter(lane, lane)
        source = LocalSource(queue, lane, submission, see)
        dtype = precision(pack.profile.mixed_precision, best_device())
        base = load_base(manifest.base, dtype=dtype, root=manifest.root)
        try:
            work(base, pack, source, submission.store, tenant=manifest.tenant, root=manifest.root)
        finally:
            source.leave("the run was stopped")
    return queue.view(EVERYTHING).changed


if __name__ == "__main__":
    sys.exit(main())
