"""`tune`: searches the settings of subjects in one fused pack; ends with a table, a plot and a manifest."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ray_app.cli import options
from ray_app.cli.train import manifest_path
from training.errors import UserError
from training.storage.storage import open_storage

if TYPE_CHECKING:
    from training.tuning.search import Reached
    from training.tuning.tune import Tuned
    from training.tuning.variant import Variant


@click.command()
@manifest_path
@click.option("--subject", "subjects", multiple=True, help="whose settings; more than once: settings that suit several")
@click.option("--vary", help="settings to search, such as learning_rate,rank; default: all that may differ in a pack")
@click.option("--variants", type=click.IntRange(2, 512), default=8, show_default=True, help="how many are tried")
@click.option("--at-once", type=click.IntRange(1), help="variants in the pack; default: as many as fit")
@click.option("--max-rank", type=click.IntRange(1), help="highest rank tried; default: twice the subject's own")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="of what is tried")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="out/tune",
    show_default=True,
    help="folder for tuned.yaml, scores.png and variants.json",
)
@options.storage
@options.as_json
def tune(
    manifest: Path,
    subjects: tuple[str, ...],
    vary: str | None,
    variants: int,
    at_once: int | None,
    max_rank: int | None,
    seed: int,
    out: Path,
    storage: str,
    as_json: bool,
) -> None:
    """Search the settings of a subject of MANIFEST: variants train together, the worse half leaves at each rung."""
    # as `python -m training` has it; torch's OpenMP reads this once
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from training.tuning.report import MANIFEST, PLOT, VARIANTS, write_found, write_variants
    from training.tuning.tune import Tuning, tune

    console = options.console(as_json)
    settings = tuple(name.strip() for name in vary.split(",") if name.strip()) if vary is not None else ()
    if vary is not None and not settings:
        raise UserError(f"--vary is '{vary}'; name settings, such as learning_rate,rank, or leave it out.")
    asked = Tuning(subjects, settings, variants, at_once, max_rank, seed)
    with _bar(console, lambda found: write_variants(out, found)) as (tell, watch):
        tuned = tune(manifest, open_storage(storage), asked, tell=tell, watch=watch)
    written = write_found(manifest, out, tuned)
    for note in tuned.notes:
        console.print(note)
    console.print(_table(tuned))
    for remark in _remarks(tuned.variants):
        console.print(remark)
    if as_json:
        options.print_json(_json(tuned, out, written))
    if written is None:
        console.print(f"No variant was trained to its end: {out / VARIANTS} has the reasons. Lower `learning_rate`.")
        sys.exit(1)
    console.print(_outcome(tuned))
    console.print(f"{out / MANIFEST} has these settings; look at {out / PLOT}")


@contextmanager
def _bar(
    console: Console, keep: Callable[[Sequence["Variant"]], None]
) -> Iterator[tuple[Callable[[str], None], Callable[["Reached"], None]]]:
    """A progress bar: yields what is to be told of preparation and of the search. `keep` writes scores down."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("preparing", total=None)

        def tell(text: str) -> None:
            progress.update(task, description=text)

        def watch(reached: "Reached") -> None:
            if reached.scored:
                keep(reached.variants)
                if not console.is_terminal:
                    console.print(_standing(reached.variants))
            progress.update(
                task, description=_standing(reached.variants), completed=reached.steps, total=reached.planned
            )

        yield tell, watch


def _standing(variants: Sequence["Variant"]) -> str:
    """`8 variants: 4 training, 4 dropped; best score 0.62`."""
    counts = {state: sum(one.state == state for one in variants) for state in ("training", *_ENDS)}
    scores = [one.rungs[-1].score for one in variants if one.rungs]
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{len(variants)} variants: {told}" + (f"; best score {max(scores):.2f}" if scores else "")


_ENDS = ("dropped", "finished", "failed")


def _table(tuned: "Tuned") -> Table:
    """Every variant, the best first. It fits into 80 columns with all settings that are searched."""
    lines = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    lines.add_column("#", justify="right", no_wrap=True)
    for name in tuned.space.axes:
        lines.add_column(name.split(".")[1].replace("_", "\n"), justify="right")
    lines.add_column("step", justify="right")
    lines.add_column("score", justify="right", no_wrap=True)
    lines.add_column("likeness,\nfidelity, drift", justify="right")
    for one in tuned.variants:
        settings = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in one.settings.values()]
        last = one.rungs[-1] if one.rungs else None
        step = "failed" if one.state == "failed" else str(last.step if last else "-")
        score = f"{last.score:.2f}" if last else "-"
        parts = f"{last.likeness:.2f} {last.fidelity:.2f} {last.drift:.2f}" if last else "-"
        lines.add_row(str(one.number), *settings, step, score, parts)
    return lines


def _remarks(variants: Sequence["Variant"]) -> Iterator[str]:
    """What is to be said of variants beside their numbers: whose settings, why it failed, what speaks against it."""
    for one in variants:
        alarms = one.rungs[-1].alarms if one.rungs else ()
        own = "the manifest's own settings" if one.number == 0 else ""
        said = [text for text in (own, one.reason, *alarms) if text]
        if said:
            yield f"variant {one.number}: {'; '.join(said)}"


def _outcome(tuned: "Tuned") -> str:
    """What was found, beside the manifest's own settings."""
    from training.evaluation.choose import TIE

    best = tuned.best
    assert best is not None
    own = next(one for one in tuned.variants if one.number == 0)
    said = f"best is variant {best.number}, score {best.rungs[-1].score:.2f}"
    if best is own:
        said += ": the manifest's own settings"
    elif own.rungs:
        gain = max((rung.score for rung in best.rungs if rung.step == own.rungs[-1].step), default=0.0)
        said += (
            f"; at step {own.rungs[-1].step} {gain:.2f}, the manifest's own settings {own.rungs[-1].score:.2f} there"
        )
    said += f" ({tuned.steps} steps of {len(tuned.variants)} variants in {tuned.seconds:.0f} s)"
    return f"{said}. Scores within {TIE} of each other are no different."


def _json(tuned: "Tuned", out: Path, written: Path | None) -> dict[str, object]:
    from training.tuning.report import PLOT, variant_json

    return {
        "subjects": [spec.id for spec in tuned.specs],
        "best": variant_json(tuned.best) if tuned.best else None,
        "variants": [variant_json(one) for one in tuned.variants],
        "manifest": str(written) if written else None,
        "plot": str(out / PLOT),
        "steps": tuned.steps,
        "seconds": round(tuned.seconds, 1),
        "notes": list(tuned.notes),
    }
