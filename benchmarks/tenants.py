"""Ten single-subject jobs of two tenants, submitted over two minutes to one device: do they train as one manifest does?

    python -m benchmarks.tenants [--steps 200] [--over 120] [--alone 2] [--write]

Starts `dreamfleet up` on the embedded base with two tenants, on this machine's CPU, and submits a job every twelve
seconds, the tenants in turn. Looked at while they train:

- packs: which subjects of whom train together, as the fleet tells it;
- images a second, and a second of the process' CPU time, which others on the machine change less: while all ten are in
  the pack, and of the whole; against one manifest with the same ten subjects in `python -m training`, in the same run;
- law 2: each job's adapter against that of the same subject in the manifest, where its company came at other times, and
  of some subjects against the same trained alone: |difference| of the weights' change by its size, fp32.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import yaml

from benchmarks.fleet import PHOTOS, ServerProcess, Tenant, archive, settings
from serving.http.access.tenants import Keys
from training.adapters.adapter import load_adapter
from training.storage.registry import Registry
from training.storage.storage import open_storage

NOTE = """

The second pair counts from the first job's first step, so also the two minutes in which the pack fills: a pack of few
makes fewer images a second. The fleet's CPU-seconds include answering HTTP: the ten jobs are asked for every second.
Equality in fp32 over so many steps: [equality.md](equality.md).
"""
COUNT = 10
NAMES = ("ann", "bob")
STEP = re.compile(r"(\w+)=(\d+)\(")


class Look(NamedTuple):
    """A moment of a training: seconds, CPU-seconds of its process, images so far, and who is in the pack."""

    at: float
    cpu: float
    images: int
    pack: frozenset[str]


@dataclass
class Seen:
    """What was seen of a training, from the first step to the last."""

    looks: list[Look] = field(default_factory=list)

    def add(self, process: int, steps: dict[str, int], pack: Iterable[str]) -> None:
        """Looks once more; `steps` are those that each subject has made."""
        cpu = psutil.Process(process).cpu_times()
        self.looks.append(Look(time.monotonic(), cpu.user + cpu.system, sum(steps.values()), frozenset(pack)))

    def rates(self, full: bool) -> tuple[float, float]:
        """Images a second, and a CPU-second; with `full` while all subjects were in the pack."""
        looks = [one for one in self.looks if len(one.pack) == COUNT] if full else self.looks
        if len(looks) < 2 or looks[-1].cpu == looks[0].cpu:
            return float("nan"), float("nan")
        first, last = looks[0], looks[-1]
        images = last.images - first.images
        return images / (last.at - first.at), images / (last.cpu - first.cpu)


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
    seen, made = Seen(), dict[str, int]()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = {id: int(step) for id, step in STEP.findall(line)} if "images/s" in line else {}
            made |= found
            if found:
                seen.add(process.pid, made, found)
    return seen


def by_jobs(server: ServerProcess, tokens: Sequence[str], steps: int, over_s: float) -> Seen:
    """Jobs of the tenants in turn, spread over `over_s` seconds."""
    tenants = [Tenant(server.url, token) for token in tokens]
    seen, jobs = Seen(), dict[str, tuple[str, int]]()
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
        made = {name: one["step"] for name, one in progress.items()}
        if any(made.values()):
            pack = [name for name, one in progress.items() if 0 < one["step"] < steps and one["state"] == "training"]
            seen.add(server.process.pid, made, pack)
        if not waiting and all(step == steps for step in made.values()):
            break
        time.sleep(1.0)
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
        jobs = by_jobs(server, tokens, steps, over_s)
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
    busy = [one.pack for one in jobs.looks if one.pack]
    shared = sum(len({name.partition("/")[0] for name in pack}) == 2 for pack in busy)
    found = {
        "looks at the pack while it trained, of them with subjects of both tenants": f"{len(busy)}, {shared}",
        "most subjects in one pack": f"{max(map(len, busy))}",
    }
    for full, when in (
        (True, "while all ten train"),
        (False, "from the first step to the last, with the pack filling"),
    ):
        (theirs_s, theirs_cpu), (mine_s, mine_cpu) = manifest.rates(full), jobs.rates(full)
        found |= {
            f"images/s {when}: manifest, jobs, ratio": f"{theirs_s:.1f}, {mine_s:.1f}, {mine_s / theirs_s:.2f}",
            f"images a CPU-second {when}": f"{theirs_cpu:.2f}, {mine_cpu:.2f}, {mine_cpu / theirs_cpu:.2f}",
        }
    return found | {
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
        *(f"| {name} | {value} |" for name, value in found.items()),
    ]
    print("\n".join(table))
    if asked.write:
        text = "# Jobs of two tenants against one manifest\n\nThe docstring of [`tenants.py`](tenants.py) says how.\n\n"
        Path(__file__).with_suffix(".md").write_text(text + "\n".join(table) + NOTE, encoding="utf-8")


if __name__ == "__main__":
    main()
