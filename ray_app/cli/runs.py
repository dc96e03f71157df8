"""`status`, `logs`, `cancel` and `retry`: runs as they lie on the storage, from any machine."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click
from rich.table import Table

from ray_app.cli import options
from ray_app.cli.train import follow, lanes_option, max_gpus_option, priority_option, run_json
from ray_app.train.cluster import ClusterLimits
from training.errors import UserError
from training.storage.storage import open_storage

if TYPE_CHECKING:
    from training.run.run import RunRecord


@click.command()
@click.argument("run", required=False)
@options.storage
@click.option("--watch", is_flag=True, help="follow the run until it ends")
@options.as_json
def status(run: str | None, storage: str, watch: bool, as_json: bool) -> None:
    """Print all runs, or the subjects of one."""
    from ray_app.train.drive import read_run
    from training.run.run import RunStore

    if run is None:
        if watch:
            raise UserError("--watch needs a run. Name one of those that `dreamfleet status` lists.")
        return _list(storage, as_json)
    store = RunStore(open_storage(storage), run)
    console = options.console(as_json)
    if watch:
        from ray_app.train.drive import look_on

        record, subjects = look_on(store, console)
    else:
        record, subjects = read_run(store)
    if as_json:
        return options.print_json(run_json(record, subjects, _seconds(record)))
    from ray_app.train.console import result_table

    console.print(result_table(subjects))
    console.print(f"run {record.run}: {record.state}, {_seconds(record):.1f} s")


@click.command()
@click.argument("run")
@click.argument("subject", required=False)
@options.storage
@options.as_json
def logs(run: str, subject: str | None, storage: str, as_json: bool) -> None:
    """Print the events of a run, or of one of its subjects."""
    from training.run.log import read_log
    from training.run.run import RunStore

    store = RunStore(open_storage(storage), run)
    _check_subjects(store.record(), [subject] if subject else [])
    lines = list(read_log(store, subject))
    if as_json:
        return options.print_json({"run": run, "lines": [{"time": when, "text": text} for when, text in lines]})
    for when, text in lines:
        click.echo(f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M:%S}Z  {text}")


@click.command()
@click.argument("run")
@click.argument("subjects", nargs=-1)
@options.storage
@options.as_json
def cancel(run: str, subjects: Sequence[str], storage: str, as_json: bool) -> None:
    """Stop a run, or some of its subjects. Published adapters remain."""
    from training.run.cancel import cancel_run
    from training.run.lead import Lead
    from training.run.run import RunStore

    store = RunStore(open_storage(storage), run)
    record = store.record()
    _check_subjects(record, subjects)
    if record.state != "running":
        raise UserError(f"Run '{run}' has ended already: {record.state}. There is nothing to cancel.")
    ended = cancel_run(store, record, subjects, driven=Lead(store.storage, store.driver_key).living() is not None)
    said = "is cancelled" if ended else "will be cancelled by its driver within seconds"
    if as_json:
        return options.print_json({"run": run, "subjects": list(subjects), "ended": ended})
    click.echo(f"run {run} {said}")


@click.command()
@click.argument("run")
@options.address
@options.storage
@lanes_option
@max_gpus_option
@priority_option
@options.as_json
def retry(
    run: str, address: str, storage: str, lanes: int | None, max_gpus: int | None, priority: int, as_json: bool
) -> None:
    """Train the failed and cancelled subjects of a run again, from their checkpoints."""
    from training.run import accepted
    from training.run.run import RunStore
    from training.run.submission import reopen

    store = RunStore(open_storage(storage), run)
    if accepted.read_order(store.storage, run) is not None:
        store.record()
        accepted.ask(store.storage, accepted.Ask(run=run, verb="retry"))
        return click.echo(f"run {run} is a fleet's, which will queue again what failed within seconds", err=True)
    follow(reopen(store), address, ClusterLimits(lanes, max_gpus, priority=priority), as_json, retry=True)


def _list(storage: str, as_json: bool) -> None:
    from training.run.run import read_runs

    opened = open_storage(storage)
    records, problems = read_runs(opened)
    for problem in problems:
        click.echo(problem, err=True)
    if as_json:
        return options.print_json(
            {"runs": [record.model_dump(mode="json", exclude={"manifest"}, by_alias=True) for record in records]}
        )
    if not records:
        return click.echo(f"no runs in {opened}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "state", "subjects", "base", "started", "seconds"):
        table.add_column(column)
    for record in records:
        started = f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%d %H:%M}Z"
        count = str(len(record.manifest.subjects))
        table.add_row(record.run, record.state, count, record.base, started, f"{_seconds(record):.0f}")
    options.console().print(table)


def _check_subjects(record: "RunRecord", subjects: Sequence[str]) -> None:
    known = {subject.id for subject in record.manifest.subjects}
    for id in subjects:
        if id not in known:
            few = ", ".join(sorted(known)[:5])
            raise UserError(f"Run '{record.run}' has no subject '{id}'. It has: {few} ({len(known)} in all).")


def _seconds(record: "RunRecord") -> float:
    return (record.finished or time.time()) - record.created
