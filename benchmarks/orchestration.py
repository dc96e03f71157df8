"""What Ray and the run's bookkeeping cost beside the training: many subjects of one step each.

    python -m benchmarks.orchestration [--subjects 200 1000] [--base pocket] [--write]

The same subjects are worked off by the same subject loop in turn: fed from a list in this process, and by `dreamfleet
train`'s own driver, queue and lane. The difference, less the start of Ray, is the overhead. Then subjects train
for some steps on 1, 2 and 4 logical devices of this machine.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line has it

from rich.console import Console

from ray_app.train.cluster import LOCAL, ClusterLimits, connect
from ray_app.train.drive import drive_run
from training.base.base import best_device, load_base
from training.base.files.outline import outline
from training.manifest.plan import plan_run
from training.photos.intake import current_fingerprint
from training.run.run import RunStore
from training.run.source import Beat, Orders, Outcome, Task
from training.run.submission import submit
from training.storage.storage import open_storage

PHOTOS = Path(__file__).resolve().parents[1] / "manifests" / "demo" / "images" / "rusty"


class ListSource:
    """Subjects from a list; counts those that end."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._todo = list(tasks)
        self.began = 0.0
        self.published = 0

    def lease(self, count: int) -> Sequence[Task]:
        self.began = self.began or time.perf_counter()
        taken, self._todo = self._todo[:count], self._todo[count:]
        return taken

    def beat(self, beat: Beat) -> Orders:
        return Orders()

    def ended(self, outcome: Outcome) -> None:
        self.published += outcome.version is not None


def write_manifest(folder: Path, base: str, subjects: int, **train: int) -> Path:
    folder.mkdir()
    path = folder / "manifest.yaml"
    text = {
        "version": 1,
        "name": "many",
        "base": base,
        "defaults": {
            "class": "dog",
            "instance_prompt": "a photo of a sks {class}",
            "prior": {"enabled": False},
            "evaluate": {"enabled": False},
            "train": train,
        },
        "subjects": [
            {"id": f"subject-{index:05d}", "images": str(PHOTOS), "train": {"seed": index}} for index in range(subjects)
        ],
    }
    path.write_text(yaml.safe_dump(text))
    return path


def plain(manifest: Path, storage: Path) -> float:
    """Seconds of the subject loop alone, from its first lease to its end."""
    from training.trainer.fitting import precision
    from training.trainer.worker.worker import work

    submission = submit(manifest, open_storage(str(storage)))
    specs = submission.manifest.subjects
    held, root = submission.store.storage, submission.manifest.root
    marks = [current_fingerprint(spec, submission.record.base_hash, held, root) for spec in specs]
    source = ListSource([Task(spec, mark) for spec, mark in zip(specs, marks, strict=True)])
    (pack,) = plan_run(submission.manifest, outline(submission.record.base)).packs
    dtype = precision(pack.profile.mixed_precision, best_device())
    base = load_base(submission.record.base, dtype=dtype)
    store = RunStore(held, submission.record.run)
    work(base, pack, source, store, tenant="default", root=root)
    assert source.published == len(specs)
    return time.perf_counter() - source.began


def through_ray(manifest: Path, storage: Path, lanes: int = 1) -> tuple[float, float]:
    """Seconds from the first lease to the end of the run, and seconds before the first lease."""
    began = time.time()
    submission = submit(manifest, open_storage(str(storage)))
    with connect(LOCAL):
        whole = drive_run(submission, LOCAL, ClusterLimits(lanes), Console(quiet=True))
    ended = time.time()
    assert all(subject.state == "published" for subject in whole.subjects)
    first = min(_first_lease(submission.store), ended)
    return ended - first, first - began


def cold_start(folder: Path, base: str) -> list[str]:
    """Rows: how long each stage takes from a submission to the first step, with nothing warm."""
    from training.run.log import read_log

    manifest = write_manifest(folder / "cold", base, 1, max_steps=1, resolution=32)
    began = time.time()
    submission = submit(manifest, open_storage(str(manifest.parent / "ray")))
    submitted = time.time()
    with connect(LOCAL):
        started = time.time()
        drive_run(submission, LOCAL, ClusterLimits(1), Console(quiet=True))
    lines = read_log(submission.store)
    ready, told = next((when, text) for when, text in lines if " is ready " in text)
    stages = [part.rsplit(" ", 1) for part in told.partition(": ")[2].split(", ")]
    first = min(when for when, text in lines if ": training at step" in text or ": published" in text)
    opened = ready - sum(float(seconds) for _, seconds in stages)
    rows = [
        ("the submission: files read, run written", submitted - began),
        ("Ray itself", started - submitted),
        ("the driver: queue, first look", opened - started),
        *((f"the lane: {name}", float(seconds)) for name, seconds in stages),
        ("the subject: photos, latents, to its first step", first - ready),
    ]
    return [f"| {name} | {seconds:.1f} |" for name, seconds in rows] + [f"| in all | {first - began:.1f} |"]


def _first_lease(store: RunStore) -> float:
    from training.run.log import read_log

    return next(when for when, text in read_log(store) if ": preparing" in text)


def overhead(folder: Path, base: str, subjects: int) -> str:
    """A row of the table: both ways in turn."""
    manifest = write_manifest(folder / str(subjects), base, subjects, max_steps=1, resolution=32)
    theirs = plain(manifest, manifest.parent / "plain")
    ours, _ = through_ray(manifest, manifest.parent / "ray")
    return f"| {subjects} | {theirs:.1f} | {ours:.1f} | {theirs / subjects:.3f} | {(ours - theirs) / subjects:+.3f} |"


def devices(folder: Path, base: str, lanes: int, alone: float | None) -> tuple[str, float]:
    """A row of the table, and the images a second of so many lanes: 16 subjects of 60 steps."""
    manifest = write_manifest(folder / f"lanes-{lanes}", base, 16, max_steps=60)
    seconds, start = through_ray(manifest, manifest.parent / "ray", lanes)
    rate = 16 * 60 / seconds
    share = f"{rate / alone:.2f}" if alone else "1.00"
    return f"| {lanes} | {start:.1f} | {seconds:.1f} | {rate:.1f} | {share} |", rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/orchestration.md")
    asked = parser.parse_args()
    cores, load = os.cpu_count(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, rate = devices(folder, asked.base, 1, None)
        spread = [first, *(devices(folder, asked.base, lanes, rate)[0] for lanes in (2, 4))]
        cold = cold_start(folder, asked.base)
        costs = []
        for count in asked.subjects:
            costs.append(overhead(folder, asked.base, count))
            print(costs[-1], file=sys.stderr, flush=True)
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {asked.base}, {cores} cores, load average {load:.1f} at the start.",
        "",
        "Subjects of one training step, published with four sample images of 32 px each: time of the subject loop",
        "alone, and with driver, queue and lane, measured from the first lease.",
        "",
        "| subjects | loop alone, s | through Ray, s | loop a subject, s | overhead a subject, s |",
        "|---:|---:|---:|---:|---:|",
        *costs,
        "",
        "16 subjects of 60 steps on so many lanes. The lanes share the same cores, so 1.00 is the ideal.",
        "",
        "| lanes | first lease after, s | then, s | images/s with preparing and publishing | of one lane |",
        "|---:|---:|---:|---:|---:|",
        *spread,
        "",
        "One subject, nothing warm: what passes before its first step, by stage.",
        "",
        "| stage | s |",
        "|---|---:|",
        *cold,
    ]
    print("\n".join(lines))
    if asked.write:
        text = "# Orchestration overhead\n\n" + "\n".join(lines) + "\n"
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
