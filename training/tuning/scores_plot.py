"""`scores.png`: the score of every variant over steps, and against each setting that was varied."""

import io
from collections.abc import Sequence
from math import ceil, sqrt

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.tuning.space import Between, OneOf, Space
from training.tuning.variant import Variant, best_of

COLUMNS = 3
BEST, ENDED, DROPPED = "tab:orange", "tab:blue", "0.6"


def plot_scores(variants: Sequence[Variant], space: Space, title: str) -> bytes:
    """PNG bytes. The best variant is orange, others trained to their end blue, dropped ones grey, alarms crosses."""
    rows = ceil(len(space.axes) / COLUMNS)
    figure = Figure(figsize=(11, 3.6 + 2.6 * rows), dpi=110)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + rows, COLUMNS, height_ratios=[1.4, *[1.0] * rows])
    colours = _colours(variants)
    _over_steps(figure.add_subplot(grid[0, :]), variants, colours, title)
    for place, name in enumerate(space.axes):
        axes = figure.add_subplot(grid[1 + place // COLUMNS, place % COLUMNS])
        _against(axes, name, space.axes[name], variants, colours)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _colours(variants: Sequence[Variant]) -> dict[int, str]:
    best = best_of(variants)
    colours = {one.number: ENDED if one.state == "finished" else DROPPED for one in variants}
    return colours | ({best.number: BEST} if best else {})


def _over_steps(axes: Axes, variants: Sequence[Variant], colours: dict[int, str], title: str) -> None:
    for one in variants:
        if not one.rungs:
            continue
        colour, last = colours[one.number], one.rungs[-1]
        axes.plot([rung.step for rung in one.rungs], [rung.score for rung in one.rungs], color=colour, marker="o")
        alarmed = [rung for rung in one.rungs if rung.alarms]
        axes.scatter([r.step for r in alarmed], [r.score for r in alarmed], marker="x", s=70, color=colour)
        if one.state == "finished":
            axes.annotate(str(one.number), (last.step, last.score), (6, -3), textcoords="offset points", fontsize=8)
    axes.set(title=title, xlabel="step", ylabel="score")
    axes.grid(alpha=0.3)


def _against(
    axes: Axes, name: str, axis: Between | OneOf, variants: Sequence[Variant], colours: dict[int, str]
) -> None:
    """The last score of each variant against one setting; larger dots came further."""
    scored = [one for one in variants if one.rungs]
    furthest = max((one.rungs[-1].step for one in scored), default=1)
    values = [one.settings[name] for one in scored]
    places = values if isinstance(axis, Between) else [axis.values.index(value) for value in values]
    sizes = [15 + 55 * one.rungs[-1].step / furthest for one in scored]
    axes.scatter(places, [one.rungs[-1].score for one in scored], s=sizes, c=[colours[one.number] for one in scored])
    if isinstance(axis, Between):
        axes.set_xscale("log")
        shown = (axis.low, sqrt(axis.low * axis.high), axis.high)
        axes.set_xticks(shown, [f"{value:.2g}" for value in shown])
        axes.minorticks_off()
    else:
        axes.set_xticks(range(len(axis.values)), [str(value) for value in axis.values])
    axes.set(xlabel=name)
    axes.grid(alpha=0.3)
