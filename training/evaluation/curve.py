"""The score curve of a subject as SVG: likeness, fidelity and their balance over steps, the chosen step marked.

Colours and fonts are the page's, so that it reads in light and in dark.
"""

from collections.abc import Mapping

from markupsafe import Markup

from training.evaluation.record import Record

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 34, 74, 12, 30
LINES = ("likeness", "fidelity", "balance")


def curve(record: Record) -> Markup:
    """The SVG of a record with two steps or more."""
    first, last = record.steps[0], record.steps[-1]

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    parts = [_grid(), _chosen(x(record.chosen), record.chosen)]
    lines: dict[str, Mapping[int, float]] = dict(
        zip(LINES, (record.likeness, record.fidelity, record.balance), strict=True)
    )
    label_y = _spread([_y(values[last]) for values in lines.values()])
    for (name, values), at in zip(lines.items(), label_y, strict=True):
        points = " ".join(f"{x(step):.1f},{_y(values[step]):.1f}" for step in record.steps)
        dots = "".join(f'<circle cx="{x(s):.1f}" cy="{_y(values[s]):.1f}" r="2.5"/>' for s in record.steps)
        label = f'<text x="{WIDTH - RIGHT + 8}" y="{at + 4:.1f}">{name}</text>'
        parts.append(f'<g class="{name}"><polyline points="{points}"/>{dots}{label}</g>')
    for step in record.steps:
        cross = ' class="rejected"' if step in record.rejected else ""
        parts.append(f'<text{cross} x="{x(step):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{step}</text>')
    title = f"likeness, fidelity and balance of {record.id} over steps; step {record.chosen} was chosen"
    inner = "".join(parts)
    return Markup(f'<svg class="curve" role="img" viewBox="0 0 {WIDTH} {HEIGHT}"><title>{title}</title>{inner}</svg>')


def _y(value: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(1.0, max(0.0, value)))


def _grid() -> str:
    lines = ""
    for value in (0, 0.5, 1):
        y = _y(value)
        lines += f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        lines += f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    return f'<g class="grid">{lines}</g>'


def _chosen(x: float, step: int) -> str:
    bar = f'<rect x="{x - 9:.1f}" y="{TOP - 6}" width="18" height="{HEIGHT - TOP - BOTTOM + 12}" rx="4"/>'
    return f'<g class="chosen">{bar}<title>step {step} was chosen</title></g>'


def _spread(wanted: list[float], gap: float = 14) -> list[float]:
    """Label heights at least `gap` apart, each near where it was wanted."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    for before, after in zip(order, order[1:], strict=False):
        placed[after] = max(placed[after], placed[before] + gap)
    over = max(placed) - (HEIGHT - BOTTOM)
    return [height - max(0.0, over) for height in placed]
