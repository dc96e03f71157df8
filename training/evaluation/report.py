"""`runs/<run>/report.html`: the whole run on one page that needs nothing else, those that need a look first.

Reads what the run kept; knows no model and no adapter.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2
from PIL import Image

from training.evaluation.curve import curve
from training.evaluation.record import TILE_PX, Record, load_record
from training.manifest.axes import AXES
from training.run.run import RunStore, SubjectRecord
from training.storage.interface import NotFound

# pictures weigh 30 kB a subject; beyond this only those that need a look have them
MAX_PICTURED = 200
LOW_BALANCE = 0.5


@dataclass(frozen=True)
class ImageStrip:
    """A row of pictures: what it is, a data URI, how many tiles, and whether it was chosen or rejected."""

    label: str
    uri: str
    tiles: int
    mark: str = ""


@dataclass(frozen=True)
class Cell:
    """One axis of the table of all scores: its values by step, as text."""

    axis: str
    means: str
    model: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Story:
    """One subject on the page. `looks`: why it needs a look, the most urgent first; `urgency` sorts."""

    state: SubjectRecord
    record: Record | None
    looks: tuple[str, ...]
    urgency: float
    photos: ImageStrip | None
    rows: tuple[ImageStrip, ...]
    svg: str
    cells: tuple[Cell, ...]

    @property
    def landmarks(self) -> tuple[str, ...]:
        """The scores without a step: floors, ceilings and limits, in words."""
        scores = self.record.scores if self.record is not None else ()
        return tuple(f"{s.name.replace('_', ' ')} {s.value:.3f} ({s.model})" for s in scores if s.step is None)


def write_report(run: RunStore) -> str:
    """Writes the page beside the run and returns its key."""
    key = f"runs/{run.run}/report.html"
    run.storage.put(key, render_report(run).encode())
    return key


def render_report(run: RunStore) -> str:
    """The page, as HTML."""
    about = run.record()
    ids = [subject.id for subject in about.manifest.subjects]
    found = [(run.subject(id) or SubjectRecord(id=id), load_record(run, id)) for id in ids]
    ranked = sorted(found, key=lambda pair: (-needs_a_look(*pair)[0], pair[0].id))
    stories = [_story(run, state, record, place < MAX_PICTURED) for place, (state, record) in enumerate(ranked)]
    counts: dict[str, int] = {}
    for state, _ in found:
        counts[state.state] = counts.get(state.state, 0) + 1
    return _template().render(run=about, stories=stories, counts=counts, pictured=MAX_PICTURED)


def needs_a_look(state: SubjectRecord, record: Record | None) -> tuple[float, tuple[str, ...]]:
    """How urgently a person should look at a subject (0 not at all), and why in a few words."""
    urgency = 0.0
    why: list[str] = []
    if state.state in ("failed", "cancelled"):
        urgency += 100
        why.append(state.state)
    if record is None:
        return (urgency + min(5, len(state.warnings)), (*why, *_counted(len(state.warnings))))
    if record.chosen in record.rejected:
        urgency += 50
        why.append("every step has an alarm")
    elif record.rejected:
        urgency += 5
        why.append("alarms at other steps")
    balance = record.balance.get(record.chosen, 0.0)
    if balance < LOW_BALANCE:
        urgency += 20 * (1 - balance)
        why.append("not yet like the subject" if record.likeness[record.chosen] < LOW_BALANCE else "ignores prompts")
    urgency += min(5, len(record.warnings))
    return urgency, (*why, *_counted(len(record.warnings)))


def _counted(warnings: int) -> tuple[str, ...]:
    return () if not warnings else ("1 photo warning",) if warnings == 1 else (f"{warnings} photo warnings",)


def _story(run: RunStore, state: SubjectRecord, record: Record | None, with_pictures: bool) -> Story:
    urgency, looks = needs_a_look(state, record)
    photos: ImageStrip | None = None
    rows: tuple[ImageStrip, ...] = ()
    if record is not None and with_pictures:
        kept = _rows(run, state.id, "photos.webp", ["photos"], [len(record.photos) + len(record.held_out)])
        photos = kept[0] if kept else None
        labels = ["base alone", *(f"step {step}" for step in record.steps)]
        rows = _rows(run, state.id, "samples.webp", labels, [len(record.prompts)] * len(labels))
        rows = tuple(_marked(row, record) for row in rows)
    svg = curve(record) if record is not None and len(record.steps) > 1 else ""
    return Story(state, record, looks, urgency, photos, rows, svg, _cells(record))


def _rows(run: RunStore, id: str, name: str, labels: Sequence[str], tiles: Sequence[int]) -> tuple[ImageStrip, ...]:
    """A kept sheet, cut into its rows."""
    try:
        sheet = Image.open(io.BytesIO(run.storage.get(run.subject_key(id, "evaluation", name))))
    except NotFound:
        return ()
    found = []
    for place, (label, count) in enumerate(zip(labels, tiles, strict=True)):
        box = (0, place * TILE_PX, min(sheet.width, count * TILE_PX), (place + 1) * TILE_PX)
        buffer = io.BytesIO()
        sheet.crop(box).save(buffer, "WEBP", quality=80)
        uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        found.append(ImageStrip(label, uri, box[2] // TILE_PX))
    return tuple(found)


def _marked(row: ImageStrip, record: Record) -> ImageStrip:
    step = int(row.label.removeprefix("step ")) if row.label.startswith("step ") else -1
    mark = "chosen" if step == record.chosen else "rejected" if step in record.rejected else ""
    return ImageStrip(row.label, row.uri, row.tiles, mark)


def _cells(record: Record | None) -> tuple[Cell, ...]:
    if record is None:
        return ()
    values = {(score.name, score.step): score for score in record.scores}
    cells = []
    for axis in AXES.values():
        here = [values.get((axis.name, step)) for step in record.steps]
        known = [score for score in here if score is not None]
        if known:
            texts = tuple("" if score is None else f"{score.value:.3f}" for score in here)
            cells.append(Cell(axis.name.replace("_", " "), axis.means, known[0].model, texts))
    return tuple(cells)


@cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html")
