"""`validate`, `train` and `drive`: from a manifest to published adapters."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from ray_app.cli import options
from ray_app.train.cluster import JOBS, LOCAL, ClusterLimits, check_address
from serving.config import EngineSpec
from training.errors import UserError
from training.storage.storage import open_storage

if TYPE_CHECKING:
    from ray_app.cli.handing import FleetClient
    from training.manifest.manifest import Manifest
    from training.manifest.plan import Plan
    from training.run.run import RunRecord, SubjectRecord
    from training.run.submission import Submission

_GOOD = ("published", "reused")
manifest_path = click.argument("manifest", type=click.Path(path_type=Path))
lanes_option = click.option(
    "--lanes", type=click.IntRange(1), help="packs at the same time; default: one per GPU, else per node"
)
max_gpus_option = click.option(
    "--max-gpus", type=click.IntRange(1), help="maximum number of GPUs; an autoscaler may add them"
)
priority_option = click.option(
    "--priority", type=int, default=0, help="runs of a higher priority get the cluster's devices first; default: 0"
)


@click.command()
@manifest_path
@options.as_json
def validate(manifest: Path, as_json: bool) -> None:
    """Check MANIFEST and its photos and print the plan. Trains nothing."""
    from training.manifest.plan import plan_run
    from training.run.submission import photo_report, read_manifest

    checked, base = read_manifest(manifest)
    plan = plan_run(checked, base)
    problems, warnings = photo_report(checked, base)
    for subject in checked.subjects:
        if needed := EngineSpec().flags_for(subject.lora.rank, len(subject.words.tokens)):
            warnings.setdefault(subject.id, []).append(f"a server takes its adapter only if started with {needed}")
    if as_json:
        options.print_json(_plan_json(checked, plan, problems, warnings))
    else:
        _print_plan(options.console(), checked, plan, problems, warnings)
    if problems:
        raise UserError("\n".join(f"{manifest}: subject '{id}': {problem}" for id, problem in problems.items()))


@click.command()
@manifest_path
@options.address
@options.storage
@click.option("--detach", is_flag=True, help="print the run's id and return; `status RUN --watch` follows it")
@click.option("--keep-last", is_flag=True, help="publish the last step of every subject, regardless of its scores")
@lanes_option
@max_gpus_option
@priority_option
@click.option("--key", envvar="DREAMFLEET_KEY", help="API key, where --address is a fleet that has keys")
@options.as_json
def train(
    manifest: Path,
    address: str,
    storage: str,
    detach: bool,
    keep_last: bool,
    lanes: int | None,
    max_gpus: int | None,
    priority: int,
    key: str | None,
    as_json: bool,
) -> None:
    """Train the subjects of MANIFEST. Running it again resumes an unfinished run and trains nothing twice."""
    from training.run.submission import submit

    check_address(address)
    limits = ClusterLimits(lanes, max_gpus, priority=priority)
    if address.startswith(JOBS):
        from ray_app.cli.handing import FleetClient

        fleet = FleetClient(address, key)
        if fleet.stands():
            return _hand_over(fleet, manifest, detach=detach, as_json=as_json)
        return _train_elsewhere(manifest, address, storage, limits, detach=detach, keep_last=keep_last, as_json=as_json)
    submission = submit(manifest, open_storage(storage), upload=address != LOCAL, keep_last=keep_last)
    if not detach:
        return follow(submission, address, limits, as_json)
    from ray_app.train.drive import detach_run

    log = detach_run(submission, address, limits)
    _say_detached(submission, as_json, f"its driver's log is {log}")


@click.command(hidden=True)
@click.argument("run")
@options.address
@options.storage
@lanes_option
@max_gpus_option
@priority_option
@options.as_json
def drive(
    run: str, address: str, storage: str, lanes: int | None, max_gpus: int | None, priority: int, as_json: bool
) -> None:
    """Drive a run that is on the storage; detached runs and Ray jobs call this."""
    from training.run.run import RunStore
    from training.run.submission import reopen

    follow(
        reopen(RunStore(open_storage(storage), run)),
        address,
        ClusterLimits(lanes, max_gpus, priority=priority),
        as_json,
    )


def follow(
    submission: "Submission",
    address: str,
    limits: ClusterLimits,
    as_json: bool,
    *,
    retry: bool = False,
) -> None:
    """Drives a run to its end, or looks on while another driver does; prints how it ended and exits accordingly."""
    from ray_app.train.drive import drive_run

    console = options.console(as_json)
    started = time.monotonic()
    run = submission.record.run
    console.print(f"run {run}{' goes on' if submission.taken_up else ''}: {len(submission.manifest.subjects)} subjects")
    try:
        record, subjects = drive_run(submission, address, limits, console, retry=retry)
    except KeyboardInterrupt:
        console.print(f"run {run} is stopped; its checkpoints are kept. The same command goes on with it.")
        sys.exit(130)
    _print_end(record, subjects, time.monotonic() - started, console, as_json)
    sys.exit(0 if all(subject.state in _GOOD for subject in subjects) else 1)


def _hand_over(fleet: "FleetClient", manifest: Path, *, detach: bool, as_json: bool) -> None:
    """`train` by a fleet: it trains beside whatever others have sent there."""
    from training.manifest.manifest import load_manifest

    console, started = options.console(as_json), time.monotonic()
    checked = load_manifest(manifest)
    checked = checked.model_copy(update={"root": str(Path(checked.root).resolve())})
    run = fleet.submit(manifest, checked)
    if detach:
        click.echo(f"run {run} trains at {fleet.url}; the same command without --detach follows it", err=True)
        return options.print_json({"run": run, "state": "running"}) if as_json else click.echo(run)
    console.print(f"run {run} at {fleet.url}: {len(checked.subjects)} subjects")
    try:
        record, subjects = fleet.follow(run, checked, console)
    except KeyboardInterrupt:
        console.print(f"run {run} goes on at {fleet.url}; the same command follows it")
        sys.exit(130)
    _print_end(record, subjects, time.monotonic() - started, console, as_json)
    sys.exit(0 if all(subject.state in _GOOD for subject in subjects) else 1)


def _train_elsewhere(
    manifest: Path, address: str, storage: str, limits: ClusterLimits, *, detach: bool, keep_last: bool, as_json: bool
) -> None:
    """`train` through the Ray Jobs API: checks what the cluster can see, uploads, submits, and looks on."""
    from ray_app.train.jobs import check_reach, follow_job, submit_job
    from training.run.submission import read_manifest, submit

    opened, console, started = open_storage(storage), options.console(as_json), time.monotonic()
    checked, _ = read_manifest(manifest)
    check_reach(address, storage, checked.base, checked.root)
    submission = submit(manifest, opened, upload=True, keep_last=keep_last)
    job = submit_job(submission, address, limits)
    if detach:
        return _say_detached(submission, as_json, f"it is job {job} at {address}")
    console.print(f"run {submission.record.run} is job {job} at {address}")
    try:
        record, subjects = follow_job(submission, address, job, console)
    except KeyboardInterrupt:
        console.print(f"run {submission.record.run} goes on; `dreamfleet cancel {submission.record.run}` stops it")
        sys.exit(130)
    _print_end(record, subjects, time.monotonic() - started, console, as_json)
    sys.exit(0 if all(subject.state in _GOOD for subject in subjects) else 1)


def _say_detached(submission: "Submission", as_json: bool, where: str) -> None:
    run = submission.record.run
    click.echo(f"run {run} goes on without this command; {where}", err=True)
    if as_json:
        return options.print_json({"run": run, "state": "running"})
    click.echo(run)


def _print_end(
    record: "RunRecord", subjects: Sequence["SubjectRecord"], seconds: float, console: Console, as_json: bool
) -> None:
    from ray_app.train.console import result_table

    console.print(result_table(subjects))
    console.print(f"run {record.run}: {record.state} in {seconds:.1f} s")
    if as_json:
        options.print_json(run_json(record, subjects, seconds))


def run_json(record: "RunRecord", subjects: Sequence["SubjectRecord"], seconds: float) -> dict[str, object]:
    """A run as `train --json` and `status --json` print it."""
    return {
        "run": record.run,
        "state": record.state,
        "seconds": round(seconds, 1),
        "subjects": [
            {
                "id": subject.id,
                "state": subject.state,
                "adapter": f"{record.tenant}/{subject.id}" if subject.state in _GOOD else None,
                "version": subject.version,
                "steps": subject.step,
                "loss": subject.loss,
                "seconds": round(subject.seconds, 1),
                "pack": subject.pack,
                "reason": subject.reason,
                "warnings": list(subject.warnings),
                "attempts": [attempt.model_dump(mode="json") for attempt in subject.attempts],
            }
            for subject in subjects
        ],
    }


def _plan_json(
    manifest: "Manifest", plan: "Plan", problems: dict[str, str], warnings: dict[str, list[str]]
) -> dict[str, object]:
    return {
        "name": manifest.name,
        "tenant": manifest.tenant,
        "base": manifest.base,
        "subjects": len(manifest.subjects),
        "steps": plan.steps,
        "images": plan.images,
        "disk_mb": round(plan.disk_mb, 2),
        "packs": [pack.model_dump(mode="json") for pack in plan.packs],
        "adapter_mb": {id: round(size, 3) for id, size in plan.adapter_mb.items()},
        "problems": dict(problems),
        "presets": {subject.id: subject.preset for subject in manifest.subjects if subject.preset},
        "warnings": {id: list(found) for id, found in warnings.items()},
    }


def _print_plan(
    console: Console, manifest: "Manifest", plan: "Plan", problems: dict[str, str], warnings: dict[str, list[str]]
) -> None:
    packs = Table(
        title=f"{manifest.name}: {len(manifest.subjects)} subjects on base {manifest.base}", title_style="bold"
    )
    for column in ("pack", "subjects", "at once", "devices", "resolution", "rank", "memory"):
        packs.add_column(column, justify="left" if column == "subjects" else "right")
    for index, pack in enumerate(plan.packs):
        shown = ", ".join(pack.subjects[:8]) + (f" and {len(pack.subjects) - 8} more" if len(pack.subjects) > 8 else "")
        size = f"{pack.profile.resolution} px"
        packs.add_row(
            str(index), shown, str(pack.slots), str(pack.workers), size, str(pack.rank), f"{pack.memory_mb:,.0f} MB"
        )
    console.print(packs)
    sizes = plan.adapter_mb.values()
    console.print(
        f"{plan.steps:,} steps, {plan.images:,} images; an adapter is {min(sizes):.2f} to {max(sizes):.2f} MB; "
        f"{plan.disk_mb:,.0f} MB of disk at most"
    )
    from training.manifest.presets import preset_in_words

    for preset in dict.fromkeys(subject.preset for subject in manifest.subjects if subject.preset):
        ids = [subject.id for subject in manifest.subjects if subject.preset == preset]
        console.print(f"{preset_in_words(preset)} ({len(ids)} of {len(manifest.subjects)} subjects)")
    for id, found in warnings.items():
        for warning in found:
            console.print(f"warning: {id}: {warning}", style="yellow", markup=False)
    if not problems:
        console.print("the manifest is good", style="green")
