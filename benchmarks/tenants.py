"""Ten single-subject jobs of two tenants, submitted over two minutes to one device: do they train as one manifest does?

    python -m benchmarks.tenants [--steps 200] [--over 120] [--alone 2] [--write]

Starts `dreamfleet up` on the embedded base with two tenants, on this machine's CPU, and submits a job every twelve
seconds, the tenants in turn. Looked at while they train:

- packs: which subjects of whom train together, as the fleet tells it;
- images/s: the pack's rate while all ten are in it, and of the whole, all images by the time from the first step to the
  last; both against one manifest with the same ten subjects in `python -m training`, in the same run;
- law 2: each job's adapter against that of the same subject in the manifest, where its company came at other times, and
  of some subjects against the same trained alone: |difference| of the weights' change by its size, fp32.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from benchmarks.fleet import PHOTOS, ServerProcess, Tenant, archive, settings
from serving.http.access.tenants import Keys
from training.adapters.adapter import load_adapter
from training.storage.registry import Registry
from training.storage.storage import open_storage

COUNT = 10
NAMES = ("ann", "bob")


@dataclass
class Seen:
    """What was seen of a training: the pack's rates while all were in it, the whole rate, and subjects of a pack."""

    full: list[float] = field(default_factory=list)
    whole: float = 0.0
    packs: list[frozenset[str]] = field(default_factory=list)


def subjects() -> list[tuple[str, Path]]:
    """Ids and folders of photos."""
    folders = [folder for folder in sorted(PHOTOS.iterdir()) if folder.is_dir()]
    return [(f"s{index}", folders[index % len(folders)]) for index in range(COUNT)]


def chosen_settings(steps: int, index: int) -> dict[str, object]:
    """A subject's; those of the same photos differ in their seed."""
    found = settings(steps)
    return {**found, "train": {**found["train"], "seed": index, "mixed_precision": "no"}}


def by_manifest(folder: Path, steps: int, only: Sequence[int] = range(COUNT)) -> Seen:
    """`python -m training` with these subjects in one manifest."""
    listed = [
        {"id": id, "images": str(photos.absolute()), **chosen_settings(steps, index)}
        for index, (id, photos) in enumerate(subjects())
        if index in only
    ]
    folder.mkdir()
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "name": "ten", "base": "pocket", "subjects": listed}))
    command = [sys.executable, "-m", "training", str(path), "--storage", str(folder / "storage")]
    seen, began = Seen(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "=" in line and line.split()[0].replace(".", "").isdigit():
                began = began or time.monotonic()
                ended = time.monotonic()
                if line.count("=") == len(listed):
                    seen.full.append(float(line.split()[0]))
    seen.whole = len(listed) * steps / (ended - began)
    return seen


def by_jobs(url: str, tokens: Sequence[str], steps: int, over_s: float) -> Seen:
    """Jobs of the tenants in turn, spread over `over_s` seconds."""
    tenants = [Tenant(url, token) for token in tokens]
    seen, jobs, began = Seen(), {}, 0.0
    waiting = [(index, id, photos) for index, (id, photos) in enumerate(subjects())]
    start = time.monotonic()
    while True:
        while waiting and time.monotonic() - start >= waiting[0][0] * over_s / (COUNT - 1):
            index, id, photos = waiting.pop(0)
            who = index % len(tenants)
            jobs[f"{NAMES[who]}/{id}"] = tenants[who].train(id, archive(photos), chosen_settings(steps, index)), who
        shown = {name: tenants[who].call("GET", f"/v1/fine_tuning/jobs/{job}") for name, (job, who) in jobs.items()}
        assert not [one for one in shown.values() if one["status"] in ("failed", "cancelled")], shown
        progress = {name: one["progress"] for name, one in shown.items()}
        if not began and any(one["step"] for one in progress.values()):
            began = time.monotonic()
        training = {name for name, one in progress.items() if one["state"] == "training" and one["lane"] is not None}
        if training:
            seen.packs.append(frozenset(training))
        rate = next((one["images_per_second"] for one in progress.values() if one["images_per_second"]), None)
        if len(training) == COUNT and rate:
            seen.full.append(rate)
        if not waiting and all(one["step"] == steps for one in progress.values()):
            break
        time.sleep(1.0)
    seen.whole = COUNT * steps / (time.monotonic() - began)
    while not all(
        tenants[who].call("GET", f"/v1/fine_tuning/jobs/{job}")["status"] == "succeeded" for job, who in jobs.values()
    ):
        time.sleep(1.0)
    return seen


def change(storage: Path, tenant: str, id: str) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight."""
    registry = Registry(open_storage(str(storage)))
    adapter = load_adapter(registry.weights(registry.resolve(f"{tenant}/{id}")))
    return {name: low.delta() for name, low in adapter.modules.items()}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The size of the difference of two adapters, by that of the first."""
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return float((difference / sum(float(delta.square().sum()) for delta in one.values())) ** 0.5)


def measure(folder: Path, steps: int, over_s: float, alone: int) -> dict[str, str]:
    """All of it; what it is called, and its value."""
    keys = folder / "keys.json"
    tokens = [Keys(keys).make(name)[1] for name in NAMES]
    manifest = by_manifest(folder / "manifest", steps)
    up = [sys.executable, "-m", "ray_app.cli.main", "up", "--port", "0", "--storage", str(folder / "up")]
    server = ServerProcess([*up, "--keys", str(keys)], folder / "up.log")
    try:
        jobs = by_jobs(server.url, tokens, steps, over_s)
    finally:
        server.stop()
    names = [(NAMES[index % 2], id) for index, (id, _) in enumerate(subjects())]
    mine = {id: change(folder / "up", tenant, id) for tenant, id in names}
    theirs = {id: change(folder / "manifest" / "storage", "default", id) for _, id in names}
    differ = [apart(mine[id], theirs[id]) for _, id in names]
    single = []
    for index in range(alone):
        by_manifest(folder / f"alone-{index}", steps, [index])
        single.append(apart(mine[f"s{index}"], change(folder / f"alone-{index}" / "storage", "default", f"s{index}")))
    shared = sum(len({name.partition("/")[0] for name in pack}) == 2 for pack in jobs.packs)
    full = statistics.median(jobs.full) / statistics.median(manifest.full) if jobs.full else float("nan")
    return {
        "looks at the pack while it trained, of them with subjects of both tenants": f"{len(jobs.packs)}, {shared}",
        "most subjects in one pack": f"{max(map(len, jobs.packs))}",
        "images/s while all ten train: the manifest": f"{statistics.median(manifest.full):.1f}",
        "images/s while all ten train: the jobs": f"{statistics.median(jobs.full):.1f}" if jobs.full else "never",
        "... against the manifest": f"{full:.2f}",
        "images/s from the first step to the last: the manifest": f"{manifest.whole:.1f}",
        "images/s from the first step to the last: the jobs": f"{jobs.whole:.1f}",
        "... against the manifest, ": f"{jobs.whole / manifest.whole:.2f}",
        "difference of an adapter to the manifest's, largest of ten": f"{max(differ):.1%}",
        f"difference of an adapter to the one trained alone, largest of {alone}": f"{max(single, default=0):.1%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--over", type=float, default=120.0, help="seconds from the first job to the last")
    parser.add_argument("--alone", type=int, default=2, help="subjects that are also trained alone")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/tenants.md")
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), asked.steps, asked.over, asked.alone)
    table = [
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores, no GPU, load {load:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after; the embedded base at its own size, fp32, subjects of {asked.steps} steps "
        f"without a prior, submitted over {asked.over:.0f} s.",
        "",
        "| what | measured |",
        "|---|---:|",
        *(f"| {name.rstrip(', ')} | {value} |" for name, value in found.items()),
    ]
    print("\n".join(table))
    if asked.write:
        text = "# Jobs of two tenants against one manifest\n\nThe docstring of [`tenants.py`](tenants.py) says how.\n\n"
        Path(__file__).with_suffix(".md").write_text(text + "\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
