"""The report's ablations (rank, prior weight, steps) on the pocket base, scored: does its table hold?

python -m benchmarks.ablations manifest > ablations.yaml     # every variant of every subject, one run
python -m training ablations.yaml --storage DIR
python -m benchmarks.ablations table DIR [RUN]               # prints the tables of docs/ablations.md
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml

from training.evaluation.compare import standard_error
from training.evaluation.record import Record, load_record
from training.run.run import RunStore, list_runs
from training.storage.registry import Registry
from training.storage.storage import open_storage

DEMO = Path(__file__).parents[1] / "manifests" / "demo"
SUBJECTS = {"clover": "rabbit", "scout": "backpack", "rusty": "dog"}
STEPS, LOOKS = 300, 3
VARIANTS: dict[str, dict[str, dict[str, object]]] = {
    "r8p1": {},
    "r4p1": {"lora": {"rank": 4}},
    "r16p1": {"lora": {"rank": 16}},
    "r8p05": {"prior": {"weight": 0.5}},
    "r8p0": {"prior": {"enabled": False}},
}
NAMES = {
    "r8p1": "rank 8, prior 1.0",
    "r4p1": "rank 4",
    "r16p1": "rank 16",
    "r8p05": "prior 0.5",
    "r8p0": "no prior",
}
COLUMNS = ("likeness", "fidelity", "diversity", "class_drift", "language_drift")


def manifest() -> str:
    """The demo's settings, with every variant of every subject as a subject of its own."""
    defaults = yaml.safe_load((DEMO / "manifest.yaml").read_text())["defaults"]
    defaults["train"] |= {"max_steps": STEPS, "checkpoint_every": STEPS}
    defaults["evaluate"] = {"candidates": LOOKS, "keep_last": True}
    subjects = [
        {"id": f"{id}-{variant}", "class": noun, "images": str(DEMO / "images" / id), **changes}
        for id, noun in SUBJECTS.items()
        for variant, changes in VARIANTS.items()
    ]
    whole = {"version": 1, "name": "ablations", "base": "pocket", "defaults": defaults, "subjects": subjects}
    return yaml.safe_dump(whole, sort_keys=False)


def tables(run: RunStore) -> str:
    """Both tables as Markdown: variants at the last step, and steps of the plain variant."""
    ids = [subject.id for subject in run.record().manifest.subjects]
    records = {id: record for id in ids if (record := load_record(run, id)) is not None}
    registry, tenant = Registry(run.storage), run.record().tenant
    head = "| " + " | ".join(("setting", "file kB", *(name.replace("_", " ") for name in COLUMNS))) + " |"
    lines = [head, "|---" * (len(COLUMNS) + 2) + "|"]
    for variant, name in NAMES.items():
        mine = [records[f"{id}-{variant}"] for id in SUBJECTS if f"{id}-{variant}" in records]
        size = registry.resolve(f"{tenant}/{mine[0].id}").card.size / 1000
        cells = [_cell([_value(record, record.steps[-1], column) for record in mine]) for column in COLUMNS]
        lines.append(f"| {name} | {size:.0f} | " + " | ".join(cells) + " |")
    plain = [records[f"{id}-r8p1"] for id in SUBJECTS if f"{id}-r8p1" in records]
    lines += ["", head.replace("setting | file kB", "steps"), "|---" * (len(COLUMNS) + 1) + "|"]
    for place, step in enumerate(plain[0].steps):
        cells = [_cell([_value(record, record.steps[place], column) for record in plain]) for column in COLUMNS]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _value(record: Record, step: int, name: str) -> float:
    """Likeness and fidelity from floor to ceiling, the others as they are."""
    if name in ("likeness", "fidelity"):
        return (record.likeness if name == "likeness" else record.fidelity)[step]
    return next(score.value for score in record.scores if (score.name, score.step) == (name, step))


def _cell(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f} ± {standard_error(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("manifest", "table"))
    parser.add_argument("storage", nargs="?", default="storage")
    parser.add_argument("run", nargs="?")
    asked = parser.parse_args()
    if asked.what == "manifest":
        print(manifest())
        return
    storage = open_storage(asked.storage)
    found = asked.run or next(run for run in reversed(list_runs(storage)) if run.startswith("ablations-"))
    print(tables(RunStore(storage, found)))


if __name__ == "__main__":
    main()
