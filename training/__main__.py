"""`python -m training MANIFEST [--storage DIR]`: a whole manifest on this machine, without Ray.

The run is like any other: the same states, attempts and log; the same command again goes on with it and trains nothing
twice. Prints a line a second. Exit status: 0 if every subject is published, 1 if some are not, 2 for bad input, 130 if
it was interrupted.
"""

import argparse
import os
import sys
import time

# threads that spin long make busy cores crawl, those that never spin halve idle ones; torch's OpenMP reads this once
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from training.errors import UserError
from training.evaluation.report import write_report
from training.manifest.plan import PackPlan
from training.run.lead import Lead, Lost
from training.run.local import LocalRun
from training.run.run import ENDED, end_run
from training.run.source import Beat
from training.run.submission import submit
from training.run.view import RunView
from training.storage.storage import open_storage


def train_manifest(path: str, storage: str) -> int:
    """Trains a manifest and returns the exit status. Raises UserError for bad input, and for a run that is led
    elsewhere."""
    started = time.time()
    submission = submit(path, open_storage(storage))
    store = submission.store
    with Lead(store.storage, store.driver_key) as lead:
        leader = lead.acquire()
        if leader is not None:
            raise UserError(
                f"Run {store.run} is driven by process {leader.pid} on {leader.host.split()[0]}. Wait for its end, or "
                f"end it: dreamfleet cancel {store.run} --storage {storage}"
            )
        try:
            records = LocalRun(submission, lead, show).train(train_pack)
        except Lost:
            raise UserError(f"Run {store.run} has been taken over by another process. It goes on there.") from None
        end_run(store, submission.record, records)
    good = sum(record.state in ("published", "reused") for record in records)
    print(f"report: {write_report(store)}")
    print(f"run {store.run}: {good} published, {len(records) - good} failed, {time.time() - started:.0f} s")
    return 0 if good == len(records) else 1


def train_pack(run: LocalRun, pack: PackPlan) -> None:
    """Trains the subjects of one pack on the best device of this machine."""
    from training.base.base import best_device, load_base
    from training.trainer.assistant import read_training_adapter
    from training.trainer.fitting import precision
    from training.trainer.worker.worker import work

    record, root = run.submission.record, run.submission.manifest.root
    dtype = precision(pack.profile.mixed_precision, best_device())
    asked = record.manifest
    base = load_base(
        record.base,
        dtype=dtype,
        root=root,
        park_text=True,
        quantization=asked.base_quantization,
        offload=asked.base_offload,
    )
    base, worn = read_training_adapter(base, asked.training_adapter, root, record.worn)
    work(base, pack, run, run.submission.store, tenant=record.tenant, root=root, training_adapter=worn)


def show(view: RunView, beat: Beat | None) -> None:
    """Prints what is new: notes, subjects that have ended, and after a sign of life what is being done."""
    for note in view.notes:
        print(note)
    for record in view.changed:
        if record.state in ENDED:
            print(f"{record.id}: {record.reason or f'{record.state} {(record.version or str())[:12]}'}", flush=True)
    if beat is not None:
        doing = " ".join(
            f"{id}={beat.steps[id]}({beat.losses[id]:.3f})" if id in beat.steps else f"{id}: {doing}"
            for id, doing in beat.phase.items()
        )
        print(f"{beat.images_per_second:6.1f} images/s  {doing}", flush=True)


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("manifest")
    parser.add_argument("--storage", default="storage")
    asked = parser.parse_args()
    try:
        return train_manifest(asked.manifest, asked.storage)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; its checkpoints are kept. The same command goes on with it.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
