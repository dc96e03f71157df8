"""The bench's report: scores of every strip as CSV, tables as Markdown, pictures and the curve over steps.

Owns what docs/pocket.md shows of DreamBooth. Trains and draws nothing that is there already.
"""

import csv
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

from tools.pocket import dreambooth
from tools.pocket.composite import Bytes
from tools.pocket.dreambooth import (
    ASKS,
    BARE_CLASS,
    BASE_ALONE,
    NO_PRIOR,
    PHOTOGRAPHED,
    REFERENCE,
    SETTINGS,
    UNSEEN_PLACES,
    Ask,
    Setting,
)
from tools.pocket.duration import THREADS, Duration, measure
from tools.pocket.figures import sheet
from tools.pocket.likeness import Worth, weigh
from tools.pocket.recipe import BASE, DOCS
from tools.pocket.subjects import SUBJECTS, Subject, picture
from training.base.files.folder import hash_base
from training.evaluation.compare import standard_error

log = logging.getLogger(__name__)

COLUMNS = (
    "hues",
    "likeness",
    "unseen_places",
    "diversity",
    "class_drift",
    "class_read",
    "placed_class_drift",
    "placed_class_read",
)
BEST = REFERENCE
CURVES = (BEST, BARE_CLASS, NO_PRIOR)
CLASS_AT = (Ask("", 0, of_class=True), Ask("snow", 0, of_class=True))


@dataclass(frozen=True, slots=True)
class Row:
    subject: Subject
    setting: Setting
    step: int
    worth: Worth


class Strips:
    """The strips of a finished bench."""

    def __init__(self, base_hash: str) -> None:
        self.folders = {s.name: dreambooth.strips_folder(base_hash, s) for s in (BASE_ALONE, *SETTINGS)}

    def tiles(self, setting: Setting, subject: Subject, step: int | None = None) -> list[Bytes]:
        """After `step`, by default the last."""
        last = setting.steps[-1] if step is None else step
        return dreambooth.tiles(dreambooth.strip_path(self.folders[setting.name], subject, last))

    def tile(self, setting: Setting, subject: Subject, ask: Ask) -> Bytes:
        return self.tiles(setting, subject)[ASKS.index(ask)]


class Scores:
    """What every strip is worth; means are over subjects."""

    def __init__(self, strips: Strips) -> None:
        self.rows: list[Row] = []
        for subject in SUBJECTS:
            bare = strips.tiles(BASE_ALONE, subject)
            for setting in (BASE_ALONE, *SETTINGS):
                for step in setting.steps:
                    worth = weigh(subject, strips.tiles(setting, subject, step), bare)
                    self.rows.append(Row(subject, setting, step, worth))

    def of(self, setting: Setting, step: int | None = None) -> list[Worth]:
        """In the order of SUBJECTS."""
        last = setting.steps[-1] if step is None else step
        return [row.worth for row in self.rows if (row.setting, row.step) == (setting, last)]

    def column(self, name: str, setting: Setting, step: int | None = None) -> list[float]:
        return [getattr(worth, name) for worth in self.of(setting, step)]

    def mean(self, name: str, setting: Setting) -> float:
        return float(np.mean(self.column(name, setting)))


def write_csv(scores: Scores, docs: Path) -> None:
    with (docs / "dreambooth.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("subject", "class", "setting", "step", *(f.name for f in fields(Worth))))
        for row in scores.rows:
            values = (f"{value:.4f}" for value in asdict(row.worth).values())
            lines.writerow((row.subject.id, row.subject.noun, row.setting.name, row.step, *values))


def line(words: Sequence[str]) -> str:
    return "| " + " | ".join(words) + " |"


def header(words: Sequence[str]) -> list[str]:
    return [line([word.replace("_", " ") for word in words]), "|---" * len(words) + "|"]


def cell(found: Sequence[float]) -> str:
    return f"{np.mean(found):.2f} ± {standard_error(found):.2f}"


def against_goals(scores: Scores, duration: Duration) -> list[str]:
    """What the best setting was to reach, and what it did."""
    least = min(zip(scores.of(BEST), SUBJECTS, strict=True), key=lambda pair: pair[0].errors)

    def drift(name: str) -> str:
        return f"{scores.mean(name, BEST):.2f}, without {scores.mean(name, NO_PRIOR):.2f}"

    def read(name: str) -> str:
        return f"{scores.mean(name, BEST):.2f}, before {scores.mean(name, BASE_ALONE):.2f}"

    lines = [
        (
            "likeness clearly above the base's, for every subject",
            f"least: {least[1].id}, {least[0].likeness:.2f} of the way, {least[0].errors:.1f} standard errors",
        ),
        ("unseen places right: 0.80 and more", f"{scores.mean('unseen_places', BEST):.2f}"),
        ("class drift at most half of that without prior", drift("class_drift")),
        ("class read nearly as often as before", read("class_read")),
        ("both with the class in a place", f"{drift('placed_class_drift')}; {read('placed_class_read')}"),
        ("six subjects within 120 s on two idle cores", f"{duration.wall_s:.0f} s, {duration.cpu_s:.0f} s of CPU time"),
    ]
    return [*header((f"to reach, {BEST.name}", "reached")), *map(line, lines)]


def by_setting(scores: Scores) -> list[str]:
    lines = [
        line([setting.name, *(cell(scores.column(name, setting)) for name in COLUMNS)])
        for setting in (BASE_ALONE, *SETTINGS)
    ]
    return [*header(("setting", *COLUMNS)), *lines]


def by_step(scores: Scores, setting: Setting) -> list[str]:
    lines = [
        line([str(step), *(cell(scores.column(name, setting, step)) for name in COLUMNS)]) for step in setting.steps
    ]
    return [*header((f"steps, {setting.name}", *COLUMNS)), *lines]


def by_subject(scores: Scores) -> list[str]:
    """The best setting beside the base alone, and what the prior spares the class."""
    lines = []
    for subject, bare, best, loose in zip(
        SUBJECTS, *(scores.of(setting) for setting in (BASE_ALONE, BEST, NO_PRIOR)), strict=True
    ):
        lines.append(
            line(
                [
                    f"{subject.id} ({subject.noun})",
                    f"{bare.hues:.2f}, {best.hues:.2f}",
                    f"{bare.cosine:.3f}, {best.cosine:.3f}",
                    f"{best.errors:.1f}",
                    f"{best.likeness:.2f}",
                    f"{best.unseen_places:.2f}",
                    f"{loose.class_drift:.2f}, {best.class_drift:.2f}",
                    f"{bare.class_read:.2f}, {best.class_read:.2f}",
                    f"{loose.placed_class_drift:.2f}, {best.placed_class_drift:.2f}",
                    f"{bare.placed_class_read:.2f}, {best.placed_class_read:.2f}",
                ]
            )
        )
    head = [f"subject, {BEST.name}", "hues: base, adapter", "cosine: base, adapter", "gain in standard errors"]
    head += ["likeness", "unseen places", "class drift: no prior, this", "class read: base, this"]
    head += ["placed class drift: no prior, this", "placed class read: base, this"]
    return [*header(head), *lines]


def said(duration: Duration) -> str:
    return (
        f"The demo's {duration.subjects} subjects in one pack, photos in and adapters out, {duration.dtype}, "
        f"{THREADS} threads: {duration.wall_s:.0f} s, of which class images {duration.class_images_s:.0f} s; "
        f"{duration.cpu_s:.0f} s of CPU time."
    )


def write_tables(scores: Scores, duration: Duration, docs: Path) -> None:
    curves = [text for setting in CURVES for text in ("", *by_step(scores, setting))]
    text = ["# DreamBooth on ten unseen subjects: the tables", ""]
    text += ["Means over the subjects ± their standard error; what each score is, says [the page](../pocket.md).", ""]
    text += [f"Measured on {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores, torch {torch.__version__}.", ""]
    text += [*against_goals(scores, duration), "", said(duration), "", *by_setting(scores), "", *by_subject(scores)]
    (docs / "dreambooth.md").write_text("\n".join([*text, *curves]) + "\n")


def show_subjects(strips: Strips, docs: Path) -> None:
    """Two photos, the six unseen places, and the class before and after, by itself and in a place."""
    rows = []
    for subject in SUBJECTS:
        shown = [np.asarray(picture(subject, place, i)) for i, place in enumerate(PHOTOGRAPHED[:2])]
        shown += [strips.tile(BEST, subject, Ask(place, 0, of_class=False)) for place in UNSEEN_PLACES]
        shown += [strips.tile(setting, subject, ask) for ask in CLASS_AT for setting in (BASE_ALONE, BEST, NO_PRIOR)]
        rows.append((subject.id, shown))
    columns = ["photo", "photo", *UNSEEN_PLACES, "class: base", "with prior", "no prior"]
    columns += ["snow: base", "with prior", "no prior"]
    sheet(rows, columns).save(docs / "dreambooth.jpg", quality=90)


def show_settings(strips: Strips, docs: Path) -> None:
    """Every setting of every subject on one prompt and seed."""
    ask = Ask("snow", 1, of_class=False)
    rows = [(s.name, [strips.tile(s, subject, ask) for subject in SUBJECTS]) for s in (BASE_ALONE, *SETTINGS)]
    sheet(rows, [subject.id for subject in SUBJECTS]).save(docs / "dreambooth-settings.jpg", quality=90)


def show_steps(scores: Scores, docs: Path) -> None:
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    shown = {
        "likeness": "likeness, unseen places",
        "class_drift": "class drift",
        "placed_class_drift": "class drift in places",
        "placed_class_read": "class recognised in places",
    }
    for axis, (name, title) in zip(axes, shown.items(), strict=True):
        for setting in CURVES:
            found = [scores.column(name, setting, step) for step in setting.steps]
            errors = [standard_error(each) for each in found]
            axis.errorbar(
                setting.steps, [np.mean(each) for each in found], errors, marker=".", capsize=2, label=setting.name
            )
        axis.set(xlabel="steps", title=title, ylim=(-0.05, 1.05))
    axes[0].legend()
    figure.savefig(docs / "dreambooth-steps.png", dpi=90)
    pyplot.close(figure)


def make(base: Path = BASE, docs: Path = DOCS) -> None:
    """Benches the base in folder `base`; the report goes to `docs`."""
    torch.set_num_threads(1)
    base_hash = hash_base(base)
    dreambooth.run(base, base_hash)
    duration = measure(base)
    log.info(f"bench: {said(duration)}")
    strips = Strips(base_hash)
    scores = Scores(strips)
    docs.mkdir(parents=True, exist_ok=True)
    write_csv(scores, docs)
    write_tables(scores, duration, docs)
    show_subjects(strips, docs)
    show_settings(strips, docs)
    show_steps(scores, docs)
