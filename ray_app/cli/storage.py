"""`gc`: what nobody needs any more on a storage."""

import time
from typing import TYPE_CHECKING

import click

from ray_app.cli import options
from training.storage.storage import open_storage

if TYPE_CHECKING:
    from training.run.run import RunRecord
    from training.storage.storage import Storage

DAY_S = 86400.0


@click.command()
@options.storage
@click.option("--days", default=7.0, show_default=True, help="days after a run's end for which its files are kept")
@click.option("--yes", is_flag=True, help="remove; without it only list what would be removed")
@options.as_json
def gc(storage: str, days: float, yes: bool, as_json: bool) -> None:
    """Remove checkpoints and uploaded photos of ended runs, and versions that were never committed."""
    from training.storage.registry import Registry

    opened = open_storage(storage)
    folders = _of_runs(opened, days * DAY_S)
    orphans = Registry(opened).gc(dry_run=not yes)
    if yes:
        for folder in folders:
            opened.delete_tree(folder)
    if as_json:
        return options.print_json({"removed": yes, "folders": [*folders, *orphans]})
    for folder in (*folders, *orphans):
        click.echo(f"{'removed' if yes else 'would remove'} {folder}")
    if not yes:
        click.echo(f"{len(folders) + len(orphans)} folders; remove them with --yes")


def _of_runs(storage: "Storage", age_s: float) -> list[str]:
    """The folders of checkpoints and uploaded photos of runs that ended at least `age_s` seconds ago.

    Those of a run that can be retried go as well: after that time it trains from the beginning.
    """
    from training.run.run import RunStore, read_runs

    found: list[str] = []
    records, problems = read_runs(storage)
    for problem in problems:
        click.echo(problem, err=True)
    for record in records:
        store = RunStore(storage, record.run)
        if not _is_over(record, age_s):
            continue
        for subject in record.manifest.subjects:
            folders = [store.subject_key(subject.id, part) for part in ("checkpoints", "images")]
            found += [folder for folder in folders if storage.list(folder)]
    return found


def _is_over(record: "RunRecord", age_s: float) -> bool:
    return record.state != "running" and time.time() - (record.finished or record.created) >= age_s
