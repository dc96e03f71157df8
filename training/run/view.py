"""How a subject queue stands, as drivers, terminals and metrics see it."""

from collections.abc import Sequence

from training.run.run import ENDED, SubjectRecord
from training.run.source import Doing, Phase
from training.storage.closed import Closed


class LaneView(Closed):
    """What a lane is doing."""

    lane: int
    profile: int
    held: tuple[str, ...]
    phases: dict[str, Doing]
    images_per_second: float


class RunView(Closed):
    """What changed since `since`, and how everything stands. `notes` are what lanes had to say since then.

    `keys` are what the queue calls those that changed: their ids, after their runs where it serves several.
    """

    seq: int
    changed: tuple[SubjectRecord, ...]
    keys: tuple[str, ...] = ()
    lanes: tuple[LaneView, ...]
    waiting: dict[int, int]
    unfinished: int
    notes: tuple[str, ...]

    @classmethod
    def of_records(cls, records: Sequence[SubjectRecord]) -> "RunView":
        """A view made of records alone, without a queue: a lane for every pack that holds subjects."""
        packs: dict[int, list[SubjectRecord]] = {}
        for record in records:
            if record.state not in ENDED and record.state not in ("queued", "paused") and record.pack is not None:
                packs.setdefault(record.pack, []).append(record)
        lanes = tuple(
            LaneView(
                lane=pack,
                profile=0,
                held=tuple(record.id for record in held),
                phases={record.id: Doing(Phase(record.state)) for record in held},
                images_per_second=0.0,
            )
            for pack, held in sorted(packs.items())
        )
        unfinished = sum(record.state not in ENDED for record in records)
        return cls(seq=0, changed=tuple(records), lanes=lanes, waiting={}, unfinished=unfinished, notes=())
