"""`python -m training MANIFEST [--storage DIR]`: a whole manifest on this machine, without Ray.

Prints a line a second; the exit status is 0 if every subject was published, 1 if some failed, 2 for bad input.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

# threads that spin long make busy cores crawl, those that never spin halve idle ones; torch's OpenMP reads this once
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from training.base.base import best_device, load_base
from training.base.files.outline import outline
from training.errors import UserError
from training.evaluation.report import write_report
from training.manifest.defaults import filled
from training.manifest.manifest import Manifest, load_manifest
from training.manifest.plan import PackPlan, plan_run
from training.photos.intake import current_fingerprint
from training.run.run import RunRecord, RunStore, State, SubjectRecord, digest_of, find_unfinished, new_run_id
from training.run.source import Beat, Orders, Outcome, Task
from training.storage.registry import Registry
from training.storage.storage import Storage, open_storage
from training.trainer.worker.worker import precision, work


class LocalSource:
    """Subjects of one pack plan, in order; outcomes are printed, counted and kept with the run."""

    def __init__(self, manifest: Manifest, plan: PackPlan, run: RunStore, base_hash: str) -> None:
        self._todo = [subject for subject in manifest.subjects if subject.id in plan.subjects]
        self._manifest = manifest
        self._storage = run.storage
        self._run = run
        self._base_hash = base_hash
        self.failed = 0

    def lease(self, count: int) -> Sequence[Task]:
        tasks: list[Task] = []
        while self._todo and len(tasks) < count:
            subject = self._todo.pop(0)
            try:
                mark = current_fingerprint(subject, self._base_hash, self._storage, self._manifest.root)
            except UserError as error:
                self.ended(Outcome(subject.id, "bad subject", str(error)))
                continue
            version = Registry(self._storage).find(self._manifest.tenant, subject.id, mark)
            if version is not None:
                print(f"{subject.id}: reused {version[:12]}")
                self._run.save_subject(SubjectRecord(id=subject.id, state="reused", version=version, fingerprint=mark))
            else:
                tasks.append(Task(subject, mark))
        return tasks

    def beat(self, beat: Beat) -> Orders:
        doing = " ".join(
            f"{id}={beat.steps[id]}({beat.losses[id]:.3f})" if id in beat.steps else f"{id}: {phase}"
            for id, phase in beat.phase.items()
        )
        print(f"{beat.images_per_second:6.1f} images/s  {doing}", flush=True)
        return Orders()

    def ended(self, outcome: Outcome) -> None:
        self.failed += outcome.version is None
        state: State = "published" if outcome.version else "cancelled" if outcome.kind == "cancelled" else "failed"
        self._run.save_subject(
            SubjectRecord(
                id=outcome.id,
                state=state,
                step=outcome.step,
                loss=outcome.loss,
                version=outcome.version,
                seconds=outcome.seconds,
                reason=outcome.reason,
                warnings=outcome.warnings,
            )
        )
        print(f"{outcome.id}: {outcome.reason or f'published {(outcome.version or str())[:12]}'}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("manifest")
    parser.add_argument("--storage", default="storage")
    asked = parser.parse_args()
    try:
        return _run(load_manifest(asked.manifest), open_storage(asked.storage), asked.manifest)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _run(manifest: Manifest, storage: Storage, path: str) -> int:
    found = outline(manifest.base, manifest.root)
    manifest = filled(manifest, found.facts)
    plan = plan_run(manifest, found)
    failed, started = 0, time.time()
    for pack in plan.packs:
        dtype = precision(pack.profile.mixed_precision, best_device())
        base = load_base(manifest.base, dtype=dtype, root=manifest.root)
        run = _open_run(manifest, storage, base.hash, path)
        source = LocalSource(manifest, pack, run, base.hash)
        work(base, pack, source, run, tenant=manifest.tenant, root=manifest.root)
        failed += source.failed
    record = run.record()
    run.save(record.model_copy(update={"state": "failed" if failed else "done", "finished": time.time()}))
    print(f"report: {write_report(run)}")
    print(f"run {run.run}: {len(manifest.subjects) - failed} published, {failed} failed, {time.time() - started:.0f} s")
    return 1 if failed else 0


def _open_run(manifest: Manifest, storage: Storage, base_hash: str, path: str) -> RunStore:
    """The unfinished run of the same manifest, or a new one."""
    digest = digest_of(manifest, base_hash)
    unfinished = find_unfinished(storage, manifest.name, digest)
    if unfinished is not None:
        return RunStore(storage, unfinished.run)
    run = RunStore(storage, new_run_id(storage, manifest.name, digest))
    with open(path, encoding="utf-8") as file:
        text = file.read()
    run.create(
        RunRecord(
            run=run.run,
            name=manifest.name,
            tenant=manifest.tenant,
            base=manifest.base,
            base_hash=base_hash,
            digest=digest,
            manifest=manifest,
        ),
        text,
    )
    return run


if __name__ == "__main__":
    sys.exit(main())
