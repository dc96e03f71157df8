"""The training loop: it keeps a pack full and yields what happened. It saves nothing and reports nothing.

The caller decides what to print, store and publish, and may take a subject out at any step border.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from training.run.fault import apart, kind_of, reason_of
from training.run.source import EndKind
from training.trainer.member import StepReport, Subject
from training.trainer.pack import Pack


@dataclass(frozen=True)
class Ended:
    """A subject that ends: finished (`reason` None), or failed with its reason.

    `kind`: done, diverged, out of memory; anything else could not join, so it has no slot.
    """

    id: str
    reason: str | None = None
    kind: EndKind = "done"


@dataclass(frozen=True)
class Progress:
    """One fused step. `rows` images went through the denoiser in `seconds`.

    Those that `ended`, unless they could not join, are still in their slots while this is being looked at: ask the pack
    for their state, adapter or samples. They leave when the iteration goes on.
    """

    seconds: float = 0.0
    rows: int = 0
    joined: tuple[str, ...] = ()
    reports: tuple[StepReport, ...] = ()
    ended: tuple[Ended, ...] = ()
    notes: tuple[str, ...] = field(default=())


Feed = Callable[[int], Sequence[Subject]]


def train(pack: Pack, feed: Feed, *, limit: int | None = None) -> Iterator[Progress]:
    """Trains until `feed` has nothing more. `feed(n)` returns up to n subjects to join now; it may return fewer.

    Subjects join and leave at step borders. One that finishes, diverges or does not fit leaves alone; the others go on.
    `limit`: subjects at once, the pack's slots by default; out of memory halves it. For one subject alone the rows of a
    forward are halved instead.
    """
    limit = limit or pack.bank.slots
    waiting: deque[Subject] = deque()
    while True:
        room = limit - len(pack.ids)
        if room > len(waiting):
            waiting.extend(feed(room - len(waiting)))
        joined, ended = _join(pack, waiting, room)
        if ended:
            yield from _part(pack, Progress(joined=joined, ended=tuple(ended)))
            continue
        if not pack.ids:
            return
        started, rows = time.perf_counter(), sum(pack.rows(id) for id in pack.ids)
        try:
            reports = pack.step()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            limit, ended, how = _give_way(pack, waiting)
            note = f"out of memory with {rows} rows: {how}"
            yield from _part(pack, Progress(joined=joined, ended=tuple(ended), notes=(note,)))
            continue
        ended = [found for report in reports if (found := _end(pack, report))]
        progress = Progress(time.perf_counter() - started, rows, joined, tuple(reports), tuple(ended))
        yield from _part(pack, progress)


def _part(pack: Pack, progress: Progress) -> Iterator[Progress]:
    """Yields, then takes those that ended out of the pack (the caller may have taken them out already)."""
    yield progress
    for ended in progress.ended:
        if ended.id in pack.ids:
            pack.leave(ended.id)


def _join(pack: Pack, waiting: deque[Subject], room: int) -> tuple[tuple[str, ...], list[Ended]]:
    joined: list[str] = []
    ended: list[Ended] = []

    def refused(id: str, error: Exception) -> None:
        ended.append(Ended(id, reason_of(error), kind_of(error)))

    while waiting and len(joined) < room:
        subject = waiting.popleft()
        id = subject.id
        if not apart([id], partial(_take_in, pack, subject), refused):
            continue
        joined.append(id)
        if subject.state is not None and subject.state.step >= subject.spec.train.max_steps:
            ended.append(Ended(id))  # its last checkpoint is that of its last step
    return tuple(joined), ended


def _take_in(pack: Pack, subject: Subject, id: str) -> None:
    pack.join(subject)


def _end(pack: Pack, report: StepReport) -> Ended | None:
    if report.failure is not None:
        return Ended(report.id, report.failure, "diverged")
    return Ended(report.id) if report.step >= pack.max_steps(report.id) else None


def _give_way(pack: Pack, waiting: deque[Subject]) -> tuple[int, list[Ended], str]:
    """Takes half of the subjects out to wait; one alone goes through in parts, and fails if even one row does not fit.

    Returns how many subjects may train at once from now on, who ended, and what was done in words.
    """
    ids = pack.ids
    pack.restart_step()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(ids) > 1:
        keep = len(ids) // 2
        waiting.extendleft(pack.leave(id) for id in reversed(ids[keep:]))
        return keep, [], f"the pack goes on with at most {keep} subjects at once"
    if pack.halve_rows():
        return 1, [], f"{ids[0]} goes on with at most {pack.most_rows} of its rows at once"
    reason = "out of memory with one row of this subject; try a smaller resolution or rank"
    return 1, [Ended(ids[0], reason, "out of memory")], f"{ids[0]} does not fit"


# what the allocator of the CPU, oneDNN (whose scratch memory it cannot have) and cuBLAS say; each a RuntimeError
_NO_MEMORY = ("can't allocate memory", "could not create a primitive", "CUBLAS_STATUS_ALLOC_FAILED")


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY)
