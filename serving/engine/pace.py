"""How long a step takes, learned from the steps taken: seconds = a + b x rows, for each kind of row separately.

The scheduler asks how much longer a step gets by more rows. On a device that is not full they are nearly free;
on a full one each costs its share. Knows no tensors.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

FADES = 0.95  # the weight of earlier steps beside the newest
REMEMBERED = 256  # kinds at most: clients choose the sizes


@dataclass(slots=True)
class _Line:
    """Weighted sums over the steps of one kind, enough for a least-squares line."""

    weight: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    rows_rows: float = 0.0
    rows_seconds: float = 0.0

    def add(self, rows: int, seconds: float) -> None:
        sums = (1.0, rows, seconds, rows * rows, rows * seconds)
        for name, value in zip(self.__slots__, sums, strict=True):
            setattr(self, name, FADES * getattr(self, name) + value)

    def at(self, rows: int) -> float:
        """Seconds of a step of `rows`: never less with more rows, and never negative."""
        mean_rows, mean_seconds = self.rows / self.weight, self.seconds / self.weight
        spread = self.rows_rows / self.weight - mean_rows**2
        steepest = mean_seconds / mean_rows
        slope = steepest
        if spread > 0.25:  # steps of nearly equal rows say nothing about a slope
            slope = (self.rows_seconds / self.weight - mean_rows * mean_seconds) / spread
        return mean_seconds + min(max(slope, 0.0), steepest) * (rows - mean_rows)


class Pace:
    """What steps have taken so far; a kind without steps is assumed to take time in proportion to its rows."""

    def __init__(self) -> None:
        self._lines: OrderedDict[Hashable, _Line] = OrderedDict()

    def saw(self, kind: Hashable, rows: int, seconds: float) -> None:
        """Records that a step of `rows` rows of a kind took so many seconds."""
        self._lines.setdefault(kind, _Line()).add(rows, seconds)
        self._lines.move_to_end(kind)
        if len(self._lines) > REMEMBERED:
            self._lines.popitem(last=False)

    def stretch(self, kind: Hashable, rows: int, than: int) -> float:
        """How many times longer a step of `rows` is than one of `than` rows."""
        line = self._lines.get(kind)
        if line is None or line.at(than) <= 0:
            return rows / than
        return line.at(rows) / line.at(than)
