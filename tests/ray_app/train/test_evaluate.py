"""`dreamfleet evaluate` from the command line, on the tiny base."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from click.testing import CliRunner, Result

from ray_app.cli.main import main
from tests.tiny import tiny_images
from training.adapters.adapter import Adapter, LowRank, save_adapter
from training.adapters.layout import find_sites
from training.base.base import Base
from training.base.stream import stream
from training.run.submission import submit
from training.storage.card import Card, Chosen, Score
from training.storage.interface import content_id
from training.storage.registry import Registry
from training.storage.storage import open_storage

SCORES = (
    Score(name="likeness", value=0.5, model="palette", step=100),
    Score(name="likeness", value=0.7, model="palette", step=200),
    Score(name="fidelity", value=0.9, model="words", step=200),
    Score(name="copying_limit", value=0.8, model="palette"),
)


def publish(storage: Path, base: Base, id: str, **changes: Any) -> None:
    modules = {}
    for site in find_sites("unet", base.denoiser, ("to_q",)):
        generator = stream(0, id, site.key)
        down, up = torch.randn(2, *site.down, generator=generator), torch.randn(site.out, 2, generator=generator)
        modules[site.key] = LowRank(down, up)
    data = save_adapter(Adapter(modules=modules))
    held: dict[str, Any] = {
        "sha256": content_id(data), "size": len(data), "created": "2026-01-01T00:00:00+00:00",
        "fingerprint": content_id(id.encode()), "base": "tiny", "base_hash": base.hash, "rank": 2, "alpha": 2,
        "targets": ("to_q",), "instance_prompt": "a photo of sks dog", "class_prompt": "a photo of dog", "class": "dog",
    }  # fmt: skip
    card = Card.model_validate(held | changes)
    Registry(open_storage(str(storage))).publish("default", id, data, card)


@pytest.fixture
def storage(tmp_path: Path, tiny: Base) -> Path:
    folder = tmp_path / "storage"
    chosen = Chosen(step=100, reason="best balance of likeness and fidelity")
    publish(folder, tiny, "dog", scores=SCORES, chosen=chosen)
    publish(folder, tiny, "cat")
    return folder


def ask(*args: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, args)])


def drawn(tiny: Base, *args: object) -> Result:
    models = ("--likeness-model", "base", "--fidelity-model", "base", "--steps", 1, "--base", tiny.folder)
    return ask(*args, *models)


def test_one_adapter_shows_how_its_checkpoints_did(storage: Path) -> None:
    said = ask("dog", "--storage", storage)
    assert said.exit_code == 0, said.output
    assert "step 100 (chosen)" in said.output and "best balance" in said.output
    assert "0.700" in said.output and "palette" in said.output
    as_json = json.loads(ask("dog", "--storage", storage, "--json").stdout)
    assert as_json["chosen"]["step"] == 100 and len(as_json["scores"]) == 4


def test_several_are_drawn_side_by_side(storage: Path, tiny: Base, tmp_path: Path) -> None:
    said = drawn(tiny, "dog", "cat", "--storage", storage, "--out", tmp_path / "out", "--images", 1)
    assert said.exit_code == 0, said.output
    assert "fidelity (base)" in said.output and "default/cat@" in said.output
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000


def test_the_protocol_runs_on_what_is_there(storage: Path, tiny: Base, tmp_path: Path) -> None:
    tiny_images(tmp_path / "photos" / "dog", 2, side=32)
    args = ("--protocol", "dreambooth", "--photos", tmp_path / "photos", "--storage", storage, "--images", 1)
    said = drawn(tiny, *args, "--out", tmp_path / "out", "--json")
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    assert "cat" in found["missing"] and "dog" not in found["missing"]
    assert found["table"][1]["method"] == "this base, 1 of 30 subjects"
    assert (tmp_path / "out" / "rows.parquet").exists() and (tmp_path / "out" / "dog.png").exists()


@pytest.mark.ray
def test_a_protocol_on_ray_finds_the_same(storage: Path, tiny: Base, tmp_path: Path) -> None:
    for seed, id in enumerate(("dog", "cat")):
        tiny_images(tmp_path / "photos" / id, 2, side=32, seed=seed)
    args = ("--protocol", "dreambooth", "--photos", tmp_path / "photos", "--storage", storage, "--images", 1)
    here = drawn(tiny, *args, "--out", tmp_path / "here", "--json")
    command = [sys.executable, "-m", "ray_app.cli.main", "evaluate", *args, "--out", tmp_path / "ray", "--json"]
    command += ["--likeness-model", "base", "--fidelity-model", "base", "--steps", 1, "--base", tiny.folder]
    command += ["--address", "local"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["missing"] == json.loads(here.stdout)["missing"]
    mine, theirs = (
        sorted(pyarrow.parquet.read_table(tmp_path / name / "rows.parquet").to_pylist(), key=str)
        for name in ("here", "ray")
    )
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine, theirs, strict=True):
        assert one["prompt"] == other["prompt"] and one["likeness"] == pytest.approx(other["likeness"], abs=1e-4)
    assert (tmp_path / "ray" / "cat.png").read_bytes() == (tmp_path / "here" / "cat.png").read_bytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Name an adapter"),
        (("fox",), "Unknown adapter default/fox"),
        (("--protocol", "dreambooth"), "A protocol needs real photos"),
    ],
)
def test_bad_usage_says_what_to_do(storage: Path, args: tuple[str, ...], message: str) -> None:
    said = ask(*args, "--storage", storage)
    assert said.exit_code == 2 and message in said.output


def test_adapters_of_different_bases_are_not_compared(storage: Path, tiny: Base) -> None:
    publish(storage, tiny, "fox", base_hash="other")
    said = ask("dog", "fox", "--storage", storage)
    assert said.exit_code == 2 and "belong to different bases" in said.output


def test_an_adapter_of_another_state_of_the_base_is_not_drawn(storage: Path, tiny: Base) -> None:
    publish(storage, tiny, "fox", base_hash="other")
    said = drawn(tiny, "fox", "--storage", storage)
    assert said.exit_code == 2 and "was trained on another 'tiny'" in said.output


def test_keep_last_is_said_of_every_subject(tiny_folder: Path, tmp_path: Path) -> None:
    tiny_images(tmp_path / "x", 5, side=32)
    text = f"version: 1\nname: t\nbase: {tiny_folder}\ndefaults: {{class: dog}}\nsubjects:\n  - {{id: a, images: x}}\n"
    (tmp_path / "m.yaml").write_text(text)
    storage = open_storage(str(tmp_path / "storage"))
    kept = submit(tmp_path / "m.yaml", storage, keep_last=True)
    assert kept.manifest.subjects[0].evaluate.keep_last
    assert submit(tmp_path / "m.yaml", storage).record.digest != kept.record.digest
