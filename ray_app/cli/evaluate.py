"""`evaluate`: the scores of adapters, the comparison of their checkpoints, and published protocols."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from ray_app.cli import options
from training.errors import UserError
from training.manifest.axes import AXES
from training.storage.storage import open_storage

if TYPE_CHECKING:
    from ray_app.cli.scoring import Wish
    from training.evaluation.compare import Comparison
    from training.storage.card import Score
    from training.storage.registry import Registry
    from training.storage.version import Resolved

_folder = click.Path(path_type=Path, file_okay=False, exists=True)


@click.command()
@click.argument("adapters", nargs=-1)
@click.option("--protocol", help="a published protocol on the adapters of its subjects: dreambooth")
@click.option("--photos", type=_folder, help="real photos: FOLDER, or FOLDER/ID for several adapters")
@click.option("--fresh", is_flag=True, help="draw and score again, also for one adapter")
@click.option("--likeness-model", default="auto", show_default=True)
@click.option("--fidelity-model", default="auto", show_default=True)
@click.option("--models", type=_folder, envvar="DREAMFLEET_MODELS", help="the folder of configured weights")
@click.option("--base", help="the base's name or folder, if not the one the card names")
@click.option("--images", type=click.IntRange(1, 64), help="pictures a prompt")
@click.option(
    "--steps", type=click.IntRange(1, 1000), help="denoising steps a picture; what the base recommends by default"
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="out/evaluate", show_default=True)
@click.option("--address", help="spread a protocol's subjects over a cluster: local, auto, host:port, ray://host:10001")
@options.storage
@options.tenant
@options.as_json
def evaluate(
    adapters: tuple[str, ...],
    protocol: str | None,
    photos: Path | None,
    fresh: bool,
    likeness_model: str,
    fidelity_model: str,
    models: Path | None,
    base: str | None,
    images: int | None,
    steps: int | None,
    out: Path,
    address: str | None,
    storage: str,
    tenant: str,
    as_json: bool,
) -> None:
    """Score ADAPTERS ([TENANT/]ID[@VERSION]): one: the scores of its checkpoints; several: drawn side by side."""
    from ray_app.cli.scoring import Wish, compare_adapters, resolve_all
    from training.storage.registry import Registry

    registry = Registry(open_storage(storage))
    wish = Wish(tenant, base, photos, models, likeness_model, fidelity_model, images, steps, out, address)
    if protocol is not None:
        return _protocol(registry, protocol, adapters, wish, as_json)
    if not adapters:
        raise UserError("Name an adapter: [TENANT/]ID[@VERSION]. `dreamfleet adapters list` shows all.")
    if len(adapters) == 1 and not fresh and photos is None:
        (resolved,) = resolve_all(registry, adapters, tenant)
        if resolved.card.scores:
            return _show(resolved, as_json)
    _compared(compare_adapters(registry, adapters, wish), out, as_json)


def _show(resolved: "Resolved", as_json: bool) -> None:
    """The scores on an adapter's card, a column a step."""
    card = resolved.card
    name = f"{resolved.name}@{resolved.version[:12]}"
    if as_json:
        return options.print_json(
            {
                "adapter": resolved.name,
                "version": resolved.version,
                "chosen": card.chosen.model_dump() if card.chosen else None,
                "scores": [score.model_dump() for score in card.scores],
            }
        )
    steps = sorted({score.step for score in card.scores if score.step is not None})
    values = {(score.name, score.step): score for score in card.scores}
    lines = Table(box=None, pad_edge=False, header_style="bold")
    lines.add_column("score")
    for step in steps:
        mark = " (chosen)" if card.chosen and card.chosen.step == step else ""
        lines.add_column(f"step {step}{mark}", justify="right")
    lines.add_column("model", overflow="fold")
    for axis in AXES:
        found = [values.get((axis, step)) for step in steps]
        known = [score for score in found if score is not None]
        if known:
            lines.add_row(axis, *(f"{score.value:.3f}" if score else "" for score in found), known[0].model)
    console = options.console()
    console.print(f"{name} on {card.base}")
    console.print(lines)
    if card.chosen:
        console.print(f"step {card.chosen.step}: {card.chosen.reason}")


def _compared(made: "Comparison", out: Path, as_json: bool) -> None:
    picture = out / "comparison.png"
    if as_json:
        rows = [
            {"adapter": name, "scores": [score.model_dump() for score in found]}
            for name, found in zip(made.names, made.scores, strict=True)
        ]
        return options.print_json({"adapters": rows, "picture": str(picture)})
    names = list(dict.fromkeys(score.name for found in made.scores for score in found))
    lines = Table(box=None, pad_edge=False, header_style="bold")
    lines.add_column("adapter", overflow="fold")
    for name in names:
        lines.add_column(f"{name} ({_model_of(name, made.scores)})", justify="right", overflow="fold")
    for adapter, found in zip(made.names, made.scores, strict=True):
        values = {score.name: f"{score.value:.3f}" for score in found}
        lines.add_row(adapter, *(values.get(name, "") for name in names))
    console = options.console()
    console.print(lines)
    console.print(f"look at {picture}")


def _model_of(name: str, scores: "Sequence[Sequence[Score]]") -> str:
    return next(score.model for found in scores for score in found if score.name == name)


def _protocol(registry: "Registry", name: str, subjects: Sequence[str], wish: "Wish", as_json: bool) -> None:
    from ray_app.cli.scoring import evaluate_protocol
    from training.evaluation.judges.configured import Inception
    from training.evaluation.protocol import distances, table

    console = options.console(as_json)

    def alive(subject: str, done: int, wanted: int) -> None:
        console.print(f"{subject} {done}/{wanted}")

    protocol, judged, missing = evaluate_protocol(registry, name, subjects, wish, alive)
    lines, apart = table(protocol, judged), distances(judged, Inception.name)
    if as_json:
        return options.print_json(
            {"protocol": name, "table": lines, "distances": apart, "missing": missing, "out": str(wish.out)}
        )
    columns = list(dict.fromkeys(column for line in lines for column in line))
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for line in lines:
        shown.add_row(*(line.get(column, "") for column in columns))
    console.print(shown)
    for distance in apart:
        console.print(distance)
    if missing:
        console.print(f"without an adapter or photos here: {', '.join(missing)}")
    console.print(f"every row is in {wish.out / 'rows.parquet'}, the pictures beside it")
