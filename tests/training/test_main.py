"""`python -m training`: a run like any other, in one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tiny import tiny_images
from training import __main__ as program
from training.photos import files
from training.photos.files import PhotoFile
from training.run.cancel import cancel_run
from training.run.lead import Lead
from training.run.log import read_log
from training.run.run import RunStore, SubjectRecord, list_runs
from training.run.subject_queue import CALMER
from training.storage.registry import Registry
from training.storage.storage import open_storage
from training.trainer.member import StepReport
from training.trainer.pack import Pack


class Desk:
    """A folder with a manifest of subjects, each with photos of its own, and a storage."""

    def __init__(self, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._base, self._monkeypatch = folder, base, monkeypatch
        self.storage = open_storage(str(folder / "storage"))

    def train(self, *subjects: dict[str, Any] | str, steps: int = 4) -> int:
        """Runs the command on these subjects; returns its exit status."""
        entries = [one if isinstance(one, dict) else {"id": one} for one in subjects]
        for seed, entry in enumerate(entries):
            entry.setdefault("images", entry["id"])
            if not (self.folder / entry["images"]).exists():
                tiny_images(self.folder / entry["images"], side=40, seed=seed)
        defaults = {
            "class": "dog",
            "prior": {"enabled": False},
            "evaluate": {"enabled": False},
            "samples": {"images": 0},
            "train": {"max_steps": steps, "checkpoint_every": 1, "learning_rate": 1e-2, "mixed_precision": "no"},
        }
        text = {"version": 1, "name": "pets", "base": str(self._base), "defaults": defaults, "subjects": entries}
        (self.folder / "pets.yaml").write_text(yaml.safe_dump(text))
        self._monkeypatch.setattr(
            "sys.argv", ["training", str(self.folder / "pets.yaml"), "--storage", str(self.folder / "storage")]
        )
        return program.main()

    @property
    def runs(self) -> list[RunStore]:
        """The runs of the storage, the earliest first."""
        found = [RunStore(self.storage, run) for run in list_runs(self.storage)]
        return sorted(found, key=lambda store: store.record().created)

    def subject(self, id: str, run: int = -1) -> SubjectRecord:
        """How a subject stands in the latest run, or another one."""
        record = self.runs[run].subject(id)
        assert record is not None
        return record


@pytest.fixture
def desk(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr("training.trainer.worker.worker.BEAT_SECONDS", 0.0)
    return Desk(tmp_path, tiny_folder, monkeypatch)


def on_step(monkeypatch: pytest.MonkeyPatch, deed: Callable[[Pack], None]) -> None:
    """Does something with the pack before each of its steps."""
    step = Pack.step

    def watched(pack: Pack) -> list[StepReport]:
        deed(pack)
        return step(pack)

    monkeypatch.setattr(Pack, "step", watched)


def test_the_same_command_again_trains_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.train("a", {"id": "file", "images": "a/0.png"}) == 2  # said before training
    assert "is a file, not a folder" in capsys.readouterr().err
    assert desk.train("a", "b") == 0
    first = desk.subject("a")
    assert (first.state, first.step, first.pack) == ("published", 4, 0) and first.loss is not None
    assert (first.version or "-")[:12] in capsys.readouterr().out
    assert any(text == "a: published at step 4/4" for _, text in read_log(desk.runs[-1]))
    monkeypatch.setattr(program, "train_pack", lambda run, pack: pytest.fail("nothing is to be trained"))
    assert desk.train("a", "b") == 0
    again = desk.subject("a")
    assert (again.state, again.version, len(desk.runs)) == ("reused", first.version, 2)
    assert desk.runs[-1].record().state == "done"
    assert "a: reused" in capsys.readouterr().out


def test_a_subject_that_diverges_is_tried_once_more_with_lower_rates(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def spoil(pack: Pack) -> None:
        for member in pack._in_order():
            if member.spec.id == "a":
                rates.append(member.train.learning_rate)
                if member.step == 2 and rates[-1] == 1e-2:
                    with torch.no_grad():
                        pack.bank.weights_SP[member.slot] = torch.nan

    on_step(monkeypatch, spoil)
    assert desk.train("a", "b") == 0
    (attempt,) = desk.subject("a").attempts
    assert attempt.kind == "diverged" and "once more from its checkpoint" in attempt.reason
    assert rates == [1e-2] * 3 + [pytest.approx(CALMER * 1e-2)] * 2  # it goes on at step 2
    assert not desk.subject("b").attempts


def test_a_photo_is_read_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gives a subject its fingerprint is what it is trained on."""
    read, opened = files._read_file, list[str]()

    def watched(path: Path) -> PhotoFile:
        opened.append(path.name)
        return read(path)

    monkeypatch.setattr(files, "_read_file", watched)
    assert desk.train("a") == 0
    assert sorted(opened) == [f"{index}.png" for index in range(5)]


def test_what_was_interrupted_goes_on_as_the_same_run(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = [3]

    def interrupt(pack: Pack) -> None:
        if interrupted and pack.state("a").step == interrupted[0]:
            interrupted.clear()
            raise KeyboardInterrupt

    on_step(monkeypatch, interrupt)
    assert desk.train("a") == 130
    stopped = desk.subject("a")
    assert (stopped.state, stopped.step, stopped.attempts) == ("queued", 3, ())
    assert desk.runs[0].record().state == "running"
    assert desk.train("a") == 0
    assert len(desk.runs) == 1 and desk.subject("a").state == "published"
    began = [text for _, text in read_log(desk.runs[0], "a") if ": preparing" in text]
    assert [text.split()[-1] for text in began] == ["0/4", "3/4"]


def test_photos_that_changed_between_two_calls_are_another_training(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert desk.train("a") == 0
    tiny_images(desk.folder / "a", side=40, seed=99)
    assert desk.train("a") == 0
    first, second = desk.subject("a", 0), desk.subject("a", 1)
    assert second.state == "published"
    assert (first.fingerprint, first.version) != (second.fingerprint, second.version)


def test_a_failure_and_a_gang_cost_the_others_nothing(desk: Desk) -> None:
    tiny_images(desk.folder / "torn")
    (desk.folder / "torn" / "0.png").write_bytes(b"no picture")
    gang = {"id": "large", "train": {"strategy": "zero", "batch_size": 2}}
    assert desk.train("a", "torn", gang) == 1
    assert desk.subject("a").state == "published"
    assert desk.subject("torn").state == "failed" and "0.png" in str(desk.subject("torn").reason)
    assert "takes several devices" in str(desk.subject("large").reason)
    assert desk.runs[-1].record().state == "failed"


def test_it_heeds_a_wish_to_cancel(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def wish(pack: Pack) -> None:
        if "a" in pack.ids and pack.state("a").step == 2:
            cancel_run(desk.runs[0], desk.runs[0].record(), ["a"], driven=True)

    on_step(monkeypatch, wish)
    assert desk.train("a", "b") == 1
    assert (desk.subject("a").state, desk.subject("b").state) == ("cancelled", "published")


def test_one_process_leads_a_run(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second one is refused; one that another has taken over from stops, and leaves the states to it."""
    taken: list[str] = []

    def take_over(pack: Pack) -> None:
        store = desk.runs[0]
        if not taken:
            taken.append(store.run)
            other = Lead(desk.storage, store.driver_key)
            assert other.acquire() is not None, "this process lives"
            leader = json.loads(desk.storage.get(store.driver_key))
            desk.storage.put(store.driver_key, json.dumps(leader | {"owner": "other", "token": 9}).encode())

    on_step(monkeypatch, take_over)
    monkeypatch.setattr("training.run.lead.RENEW_SECONDS", 0.0)
    assert desk.train("a") == 2
    assert "taken over by another process" in capsys.readouterr().err
    assert desk.subject("a").state in ("preparing", "training")
    assert desk.train("a") == 2
    assert "is driven by process" in capsys.readouterr().err
    assert not Registry(desk.storage).list()
