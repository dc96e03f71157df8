"""What fits is measured: how many subjects at once, and which of them this device cannot hold even alone."""

from typing import Any

import pytest

from tests.training.subjects import spec
from training.base.base import Base
from training.base.files.outline import outline
from training.errors import TooLarge, UserError
from training.manifest.manifest import parse_manifest
from training.manifest.plan import plan_run
from training.trainer import memory
from training.trainer.fitting import Opened, open_pack
from training.trainer.memory import SHARE, saved_bytes

ROOM = 10.5
ROW: dict[str, Any] = {"prior": {"enabled": False}, "lora": {"rank": 1}}


def opened(base: Base, monkeypatch: pytest.MonkeyPatch, count: int, rows: int, **train: Any) -> Opened:
    """The pack for `count` subjects of so many rows each, on a device with memory for the activations of ROOM rows."""
    one = spec("a", **ROW, train={"batch_size": rows, **train})
    manifest = parse_manifest("{version: 1, name: t, subjects: [{id: a, images: x, class: dog}]}")
    subjects = tuple(one.model_copy(update={"id": f"s{index}"}) for index in range(count))
    (plan,) = plan_run(manifest.model_copy(update={"subjects": subjects}), outline(str(base.folder))).packs
    monkeypatch.setattr(memory, "free_bytes", lambda device: (ROOM * saved_bytes(base) + plan.state_bytes) / SHARE)
    found = open_pack(base, plan)
    found.pack.close()
    return found


def test_what_fits_trains_at_once(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(tiny, monkeypatch, count=3, rows=2)
    assert (found.limit, found.notes) == (3, ())
    found.check(spec("a", **ROW, train={"batch_size": 2}))


def test_without_recomputing_fewer_train_at_once_and_the_largest_is_refused(
    tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(tiny, monkeypatch, count=5, rows=5, gradient_checkpointing=False)
    assert found.limit == 2
    with pytest.raises(TooLarge, match=r"it takes 30 rows, and 25 rows x \d+ MB of activations do not fit into \d+ MB"):
        found.check(spec("a", **ROW, train={"batch_size": 30}))


def test_a_subject_that_does_not_fit_goes_through_in_parts(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(tiny, monkeypatch, count=1, rows=16, gradient_checkpointing=False)
    assert (found.limit, found.pack.most_rows) == (1, 10)
    assert "do not fit" in found.notes[0]


def test_recomputing_is_told(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(tiny, monkeypatch, count=8, rows=2)
    assert found.fit.checkpointing and "recomputing them takes" in found.notes[0]


def test_several_devices_need_somebody_to_start_them(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="dreamfleet train"):
        opened(tiny, monkeypatch, count=1, rows=2, strategy="zero")
