"""What a person sees of a run: bars in a terminal, plain lines elsewhere, a table at the end. Decides nothing."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from training.run.run import ENDED, SubjectRecord
from training.run.source import Doing, Phase
from training.run.view import LaneView, RunView

LINE_SECONDS = 10.0  # plain output: how often a lane that only trains is mentioned
MOST_SUBJECTS = 30  # lines shown at once in a terminal
COLOURS = {"published": "green", "reused": "green", "failed": "red", "cancelled": "yellow", "training": "cyan"}


class RunConsole:
    """Follows one run on `console`. Use as a context; `see` and `say` are what the driver calls."""

    def __init__(self, console: Console, run: str) -> None:
        self._console = console
        self._run = run
        self._started = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._states: dict[str, str] = {}
        self._said = 0.0
        self._first_steps: int | None = None
        self._first_at = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, markup=False, highlight=False)

    def see(self, view: RunView, records: Mapping[str, SubjectRecord]) -> None:
        """Shows how everything stands."""
        for note in view.notes:
            self.say(note)
        if self._live:
            self._live.update(self._picture(view, records))
        else:
            self._lines(view, records)

    # -- plain --

    def _lines(self, view: RunView, records: Mapping[str, SubjectRecord]) -> None:
        for record in view.changed:
            if self._states.get(record.id) != record.state:
                self._states[record.id] = record.state
                self.say(_line(record))
        if view.lanes and time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            self.say(self._summary(view, records))
            for lane in view.lanes:
                self.say(f"  pack {lane.lane}: {_doing(lane, records)}")

    # -- terminal --

    def _picture(self, view: RunView, records: Mapping[str, SubjectRecord]) -> RenderableType:
        lines: list[RenderableType] = [Text(self._summary(view, records), style="bold")]
        if not view.lanes and view.unfinished:
            lines.append(Text("starting: Ray's worker, then the base", style="dim"))
        shown = 0
        for lane in view.lanes:
            lines.append(self._bar(lane, records))
            for id in lane.held[: max(0, MOST_SUBJECTS - shown)]:
                lines.append(_subject_line(records[id], lane.phases.get(id)))
                shown += 1
        return Group(*lines)

    def _bar(self, lane: LaneView, records: Mapping[str, SubjectRecord]) -> RenderableType:
        mine = [record for record in records.values() if record.pack == lane.lane or record.id in lane.held]
        total = sum(record.max_steps for record in mine) or 1
        done = sum(record.max_steps if record.state in ENDED else record.step for record in mine)
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            f"pack {lane.lane}",
            ProgressBar(total=total, completed=done, width=40),
            f"{100 * done / total:3.0f} %",
            f"{len(lane.held)} subjects",
            f"{lane.images_per_second:.1f} images/s",
        )
        return grid

    def _summary(self, view: RunView, records: Mapping[str, SubjectRecord]) -> str:
        ended = sum(record.state in ENDED for record in records.values())
        failed = sum(record.state == "failed" for record in records.values())
        rate = sum(lane.images_per_second for lane in view.lanes)
        parts = [f"{self._run}: {ended} of {len(records)} subjects done"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{rate:.1f} images/s"] if rate else []
        parts += [f"{_clock(time.monotonic() - self._started)} so far"]
        left = self._left(records)
        parts += [f"about {_clock(left)} left"] if left is not None and view.unfinished else []
        return ", ".join(parts)

    def _left(self, records: Mapping[str, SubjectRecord]) -> float | None:
        """Seconds to go at the pace of the steps so far; None until there is a pace."""
        total = sum(record.max_steps for record in records.values())
        done = sum(record.max_steps if record.state in ENDED else record.step for record in records.values())
        if self._first_steps is None:
            self._first_steps = done
        if done == self._first_steps:
            self._first_at = time.monotonic()
            return None
        return (total - done) * (time.monotonic() - self._first_at) / (done - self._first_steps)


def result_table(records: Sequence[SubjectRecord]) -> Table:
    """How every subject ended."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("subject", "state", "version", "steps", "loss", "seconds", "pack", "reason"):
        table.add_column(column, justify="right" if column in ("steps", "loss", "seconds", "pack") else "left")
    for record in records:
        table.add_row(
            record.id,
            Text(record.state, style=COLOURS.get(record.state, "")),
            (record.version or "")[:12],
            f"{record.step}/{record.max_steps}",
            "" if record.loss is None else f"{record.loss:.4f}",
            f"{record.seconds:.1f}",
            "" if record.pack is None else str(record.pack),
            Text(record.reason or ""),
        )
    return table


def _line(record: SubjectRecord) -> str:
    """A change of state, as a plain line."""
    parts = [f"{record.id}: {record.state}"]
    parts += [f"at step {record.step}/{record.max_steps}"] if record.step else []
    parts += [(record.version or "")[:12]] if record.version else []
    return " ".join(parts) + (f": {record.reason}" if record.reason else "")


def _doing(lane: LaneView, records: Mapping[str, SubjectRecord]) -> str:
    return f"{lane.images_per_second:.1f} images/s; " + ", ".join(
        _stands(records[id], lane.phases.get(id)) for id in lane.held
    )


def _stands(record: SubjectRecord, doing: Doing | None) -> str:
    """How a leased subject stands: its step while it trains, else what is being done with it."""
    if doing is not None and doing.phase == Phase.TRAINING:
        return f"{record.id} {record.step}/{record.max_steps}"
    return f"{record.id} {doing or 'waiting'}"


def _subject_line(record: SubjectRecord, doing: Doing | None) -> RenderableType:
    loss = "" if record.loss is None else f"loss {record.loss:.4f}"
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=2)
    grid.add_column(width=24, no_wrap=True)
    grid.add_column(width=16)
    grid.add_row(
        "",
        record.id,
        ProgressBar(total=record.max_steps or 1, completed=record.step, width=16),
        f"{record.step}/{record.max_steps}",
        Text(str(doing or record.state), style=COLOURS.get(record.state, "dim")),
        loss,
    )
    return grid


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return (
        f"{whole // 60}:{whole % 60:02d}"
        if whole < 3600
        else f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    )
