"""`python -m training`: a run on one machine, through the same queue and submission as Ray's driver."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tiny import tiny_images
from training.__main__ import train_here
from training.errors import UserError
from training.photos import photos
from training.photos.photos import PhotoFile
from training.run.lead import Lead
from training.run.run import RunStore, list_runs
from training.storage.registry import Registry
from training.storage.storage import open_storage
from training.trainer.member import Member

FAST: dict[str, Any] = {
    "class": "dog",
    "prior": {"enabled": False},
    "samples": {"images": 0},
    "train": {"max_steps": 3, "checkpoint_every": 1, "learning_rate": 1e-2},
    "evaluate": {"enabled": False},
}


@pytest.fixture
def manifest(tmp_path: Path, tiny_folder: Path) -> Path:
    """Two subjects with photos, and one without."""
    for index, name in enumerate(("rusty", "tabby")):
        tiny_images(tmp_path / name, seed=index)
    (tmp_path / "nobody").mkdir()
    subjects = [{"id": name, "images": name} for name in ("rusty", "nobody", "tabby")]
    text = {"version": 1, "name": "pets", "base": str(tiny_folder), "defaults": FAST, "subjects": subjects}
    path = tmp_path / "pets.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


def test_a_run_is_like_any_other_and_the_same_again_trains_nothing(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = open_storage(str(tmp_path / "storage"))
    assert train_here(str(manifest), storage) == 1
    (run,) = list_runs(storage)
    store = RunStore(storage, run)
    states = {id: record.state for id in ("rusty", "nobody", "tabby") if (record := store.subject(id))}
    assert states == {"rusty": "published", "nobody": "failed", "tabby": "published"}
    assert store.record().state == "failed" and store.record().finished is not None
    first = {r.name: r.version for r in Registry(storage).list("default")}
    said = capsys.readouterr().out
    assert "rusty: published" in said and "nobody: failed" in said and "2 published, 1 failed" in said
    tiny_images(tmp_path / "nobody", seed=7)
    assert train_here(str(manifest), storage) == 0
    again = {r.name: r.version for r in Registry(storage).list("default")}
    assert first.items() <= again.items() and len(again) == 3
    said = capsys.readouterr().out
    assert "nobody: published" in said and "rusty: training" not in said


def test_a_subject_that_diverges_is_tried_once_more_with_lower_rates(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue's own rule, as under Ray."""
    finish, rates = Member.finish, list[float]()

    def diverging(member: Member, norm: float) -> Any:
        if member.spec.id == "rusty":
            rates.append(member.train.learning_rate)
            if len(rates) == 2:
                return finish(member, torch.nan)
        return finish(member, norm)

    monkeypatch.setattr(Member, "finish", diverging)
    storage = open_storage(str(tmp_path / "storage"))
    train_here(str(manifest), storage)
    record = RunStore(storage, list_runs(storage)[0]).subject("rusty")
    assert record is not None and record.state == "published"
    assert [attempt.kind for attempt in record.attempts] == ["diverged"]
    assert rates[-1] == pytest.approx(0.1 * rates[0])


def test_a_run_that_another_process_drives_is_left_alone(manifest: Path, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "storage"))
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.__main__.settle", lambda submission: 1 / 0)
        train_here(str(manifest), storage)
    (run,) = list_runs(storage)
    other = Lead(storage, RunStore(storage, run).driver_key)
    assert other.acquire() is None
    with pytest.raises(UserError, match="drives run"):
        train_here(str(manifest), storage)


def test_a_photo_is_read_once(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gives a subject its fingerprint is what it is trained on."""
    read, opened = photos._read_file, list[str]()

    def watched(path: Path) -> PhotoFile:
        opened.append(f"{path.parent.name}/{path.name}")
        return read(path)

    monkeypatch.setattr(photos, "_read_file", watched)
    train_here(str(manifest), open_storage(str(tmp_path / "storage")))
    assert opened and len(opened) == len(set(opened))
