"""What Ray and the run's bookkeeping cost beside the training: many subjects of one step each.

    python -m benchmarks.orchestration [--subjects 200] [--base pocket]

The same subjects are worked off twice by the same subject loop: fed from a list in this process, and by `dreamfleet
train`'s own driver, queue and lane. The difference, less the start of Ray, is the overhead.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from rich.console import Console

from ray_app.cluster import LOCAL, Limits, connect
from ray_app.drive import drive_run
from ray_app.submission import submit
from training.base import best_device, load_base
from training.plan import base_facts, plan_run
from training.run import RunStore
from training.source import Beat, Orders, Outcome, Task
from training.storage import open_storage

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


def write_manifest(folder: Path, base: str, subjects: int) -> Path:
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
            "train": {"max_steps": 1},
        },
        "subjects": [
            {"id": f"subject-{index:05d}", "images": str(PHOTOS), "train": {"seed": index}} for index in range(subjects)
        ],
    }
    path.write_text(yaml.safe_dump(text))
    return path


def plain(manifest: Path, storage: Path) -> float:
    """Seconds of the subject loop alone, from its first lease to its end."""
    from training.worker import precision, work

    submission = submit(manifest, open_storage(str(storage)))
    specs = submission.manifest.subjects
    source = ListSource([Task(spec, f"{index:064x}") for index, spec in enumerate(specs)])
    (pack,) = plan_run(submission.manifest, base_facts(submission.record.base)).packs
    dtype = precision(pack.profile.mixed_precision, best_device())
    base = load_base(submission.record.base, dtype=dtype)
    store = RunStore(submission.store.storage, submission.record.run)
    work(base, pack, source, store, tenant="default", root=submission.manifest.root)
    assert source.published == len(specs)
    return time.perf_counter() - source.began


def through_ray(manifest: Path, storage: Path) -> tuple[float, float]:
    """Seconds from the first lease to the end of the run, and seconds before the first lease."""
    began = time.time()
    submission = submit(manifest, open_storage(str(storage)))
    with connect(LOCAL):
        whole = drive_run(submission, LOCAL, Limits(), Console(quiet=True))
    ended = time.time()
    assert all(subject.state == "published" for subject in whole.subjects)
    first = min(_first_lease(submission.store), ended)
    return ended - first, first - began


def _first_lease(store: RunStore) -> float:
    from ray_app.runlog import read_log

    return next(when for when, text in read_log(store) if ": preparing" in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=200)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/orchestration.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = write_manifest(folder, asked.base, asked.subjects)
        alone = plain(manifest, folder / "plain")
        with_ray, start = through_ray(manifest, folder / "ray")
    count, load = asked.subjects, os.getloadavg()[0]
    table = [
        f"{time.strftime('%Y-%m-%d')}: {count} subjects of 1 step on {asked.base}",
        f"{os.cpu_count()} cores, load {load:.1f}",
        "",
        "| | seconds | a subject |",
        "|---|---:|---:|",
        f"| subject loop alone | {alone:.1f} | {alone / count:.3f} |",
        f"| through driver, queue and lane, {start:.1f} s after it began | {with_ray:.1f} | {with_ray / count:.3f} |",
        f"| overhead | {with_ray - alone:.1f} | {(with_ray - alone) / count:.3f} |",
    ]
    print("\n".join(table))
    if asked.write:
        Path(__file__).with_suffix(".md").write_text("# Orchestration\n\n" + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
