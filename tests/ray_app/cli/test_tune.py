"""`dreamfleet tune` as a user runs it."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from ray_app.cli.main import main
from tests.ray_app.conftest import Desk
from training.manifest.manifest import load_manifest


def run(desk: Desk, *arguments: str | Path) -> Result:
    where = ("--storage", str(desk.storage), "--out", str(desk.folder / "out"))
    return CliRunner().invoke(main, ["tune", *map(str, arguments), *where])


def judged(desk: Desk, **settings: object) -> Path:
    """A manifest of one subject that is judged, in no time."""
    path = desk.manifest("rusty", steps=2)
    raw = yaml.safe_load(path.read_text())
    evaluate = {"steps": 1, "likeness_model": "base", "fidelity_model": "base", "prompts": ["a photo of sks dog"]}
    raw["defaults"]["evaluate"] = evaluate | settings
    path.write_text(yaml.safe_dump(raw))
    return path


def test_it_ends_with_a_table_a_plot_and_a_manifest(desk: Desk) -> None:
    made = run(desk, judged(desk), "--variants", "2", "--vary", "learning_rate,rank", "--json")
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    best = said["best"]
    assert {one["variant"] for one in said["variants"]} == {0, 1}
    assert best["state"] == "finished" and set(best["settings"]) == {"train.learning_rate", "lora.rank"}
    (subject,) = load_manifest(said["manifest"]).subjects
    assert subject.lora.rank == best["settings"]["lora.rank"]
    assert subject.train.learning_rate == best["settings"]["train.learning_rate"]
    for shown in (
        "learning",
        "likeness",
        "variant 0: the manifest's own settings",
        "tuned.yaml has these settings",
    ):
        assert shown in made.stderr
    assert Path(said["plot"]).read_bytes().startswith(b"\x89PNG")
    kept = json.loads((desk.folder / "out/variants.json").read_text())["variants"]
    assert kept == said["variants"]
    assert run_validate(desk, said["manifest"]).exit_code == 0


def run_validate(desk: Desk, manifest: str) -> Result:
    return CliRunner().invoke(main, ["validate", manifest])


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, ["--vary", "lerning_rate"], "Did you mean 'learning_rate'?"),
        ({}, ["--vary", ","], "--vary is ','; name settings"),
        ({"enabled": False}, [], "`evaluate.enabled` of subject 'rusty' is false"),
    ],
)
def test_bad_input_is_one_message(desk: Desk, settings: dict[str, object], arguments: list[str], message: str) -> None:
    made = run(desk, judged(desk, **settings), *arguments)
    assert made.exit_code == 2 and made.stdout == ""
    assert message in made.stderr and "Traceback" not in made.stderr
