"""The command line's contract: exit status, messages, JSON on stdout alone; without training anything."""

import json
import subprocess
import sys

import pytest

from tests.ray_app.conftest import Desk, Result
from tests.tiny import tiny_images
from training.run.run import RunRecord, RunStore, SubjectRecord
from training.storage.storage import open_storage

COMMANDS = [
    "demo",
    "validate",
    "train",
    "tune",
    "status",
    "logs",
    "cancel",
    "retry",
    "serve",
    "generate",
    "adapters",
    "base",
    "keys",
    "up",
    "detect",
    "caption",
    "consent",
    "subject",
    "audit",
]


def refused(result: Result, *parts: str) -> None:
    """Exit 2, one clear message on stderr, nothing on stdout, no traceback."""
    assert result.status == 2, result
    assert "Traceback" not in result.err
    assert result.out == ""
    for part in parts:
        assert part in result.err


def test_help_names_every_command(desk: Desk) -> None:
    result = desk.run("--help")
    assert result.status == 0
    for command in COMMANDS:
        assert f"  {command} " in result.out
        assert desk.run(command, "--help").status == 0


def test_validate_and_help_import_neither_torch_nor_ray(desk: Desk) -> None:
    """What makes them start at once."""
    manifest = desk.manifest("rusty")
    code = (
        "import sys; from ray_app.cli.main import main; main(sys.argv[1:], standalone_mode=False);"
        "print([m for m in ('torch', 'ray', 'diffusers', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    for arguments in (["--help"], ["validate", str(manifest)]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_validate_prints_the_plan(desk: Desk) -> None:
    manifest = desk.manifest("rusty", "tabby", steps=30)
    result = desk.run("validate", manifest)
    assert result.status == 0
    assert "rusty, tabby" in result.out and "60 steps" in result.out
    plan = desk.run("validate", manifest, "--json").json
    assert plan["packs"][0]["subjects"] == ["rusty", "tabby"]
    assert set(plan["adapter_mb"]) == {"rusty", "tabby"}


def test_validate_names_the_flag_that_a_server_needs_for_a_high_rank(desk: Desk) -> None:
    manifest = desk.manifest("rusty", tail="  - {id: high, images: images/rusty, lora: {rank: 64}}\n")
    warnings = desk.run("validate", manifest, "--json").json["warnings"]
    assert any("--rank 64" in warning for warning in warnings["high"])
    assert not any("--rank" in warning for warning in warnings.get("rusty", []))


def test_unknown_key_bad_id_and_missing_folder(desk: Desk) -> None:
    manifest = desk.manifest("rusty", tail="  - {id: Bad Id, images: images/rusty, trian: {}}\n")
    for command in ("validate", "train"):
        refused(desk.run(command, manifest), "pets.yaml:12", "unknown key 'trian'", "Did you mean 'train'", "'Bad Id'")
    manifest = desk.manifest("rusty", tail="  - {id: ghost, images: images/ghost}\n")
    for command in ("validate", "train"):
        refused(desk.run(command, manifest), "subject 'ghost'", "images/ghost' does not exist")
    assert not desk.storage.exists()  # nothing was begun


def test_targets_that_no_layer_has(desk: Desk) -> None:
    manifest = desk.manifest("rusty", tail="  - {id: bolt, images: images/rusty, lora: {targets: [to_qq]}}\n")
    refused(desk.run("validate", manifest), "subject 'bolt'", "'to_qq'", "Use names such as")


def test_photos_that_cannot_be_trained_on_are_seen_by_validate(desk: Desk) -> None:
    words = "words: {tokens: [<s1>]}, instance_prompt: 'a photo of <s1>'"
    manifest = desk.manifest("rusty", "tabby", tail=f"  - {{id: bolt, images: images/bolt, {words}}}\n")
    (desk.folder / "images/tabby/0.png").write_bytes(b"no picture")
    tiny_images(desk.folder / "images/bolt")
    (desk.folder / "images/bolt/captions.txt").write_text("".join(f"{n}.png: a photo of a dog\n" for n in range(5)))
    result = desk.run("validate", manifest)
    assert result.status == 2 and "subject 'tabby'" in result.err and "0.png" in result.err
    assert "subject 'bolt'" in result.err and "'<s1>'" in result.err  # a word that no caption has


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "nowhere.yaml"], ["'nowhere.yaml' does not exist"]),
        (["train"], ["Missing argument 'MANIFEST'"]),
        (["status", "nothing-1"], ["Run 'nothing-1' is not in this storage"]),
        (["logs", "nothing-1"], ["Run 'nothing-1' is not in this storage"]),
        (["cancel", "nothing-1"], ["Run 'nothing-1' is not in this storage"]),
        (["retry", "nothing-1"], ["Run 'nothing-1' is not in this storage"]),
        (["status", "--storage", "ftp://x"], ["Unknown storage 'ftp://x'", "Use a folder"]),
        (["adapters", "show", "rusty"], ["Unknown adapter default/rusty"]),
        (["base", "nothing"], ["Base 'nothing' is not known"]),
        (["generate", "a dog", "--url", "http://127.0.0.1:9"], ["No server responds at http://127.0.0.1:9"]),
        (["generate", "a dog", "--adapter", "rusty:heavy"], ["weight 'heavy' is no number"]),
        (["serve", "--port", "70000"], ["70000"]),
        (["trian"], ["No such command 'trian'"]),
    ],
)
def test_bad_input_is_one_message_and_status_2(desk: Desk, arguments: list[str], parts: list[str]) -> None:
    refused(desk.run(*arguments), *parts)


def test_an_address_that_means_nothing(desk: Desk) -> None:
    refused(desk.run("train", desk.manifest("rusty"), "--address", "moon"), "Address 'moon' is not known", "ray://")


def test_an_empty_storage_has_no_runs_and_no_adapters(desk: Desk) -> None:
    assert "no runs" in desk.run("status").out
    assert desk.run("status", "--json").json == {"runs": []}
    assert desk.run("adapters", "list", "--json").json == {"adapters": []}


def dead_run(desk: Desk) -> RunStore:
    """A run whose driver is dead: one subject published, one in the middle, one not begun."""
    from training.manifest.manifest import load_manifest

    manifest = load_manifest(desk.manifest("rusty", "tabby", "bolt"))
    store = RunStore(open_storage(str(desk.storage)), "pets-20260101-abcd")
    record = RunRecord(
        run=store.run, name="pets", tenant="default", base="b", base_hash="0" * 64, digest="d", manifest=manifest
    )
    store.create(record, "")
    store.save_subject(SubjectRecord(id="rusty", state="published", step=20, max_steps=20, version="ab" * 32))
    store.save_subject(SubjectRecord(id="tabby", state="training", step=7, max_steps=20))
    return store


def test_status_shows_a_dead_run_as_it_lies_there(desk: Desk) -> None:
    run = dead_run(desk).run
    assert run in desk.run("status").out
    result = desk.run("status", run, "--json")
    assert result.states() == {"rusty": "published", "tabby": "training", "bolt": "queued"}
    assert "7/20" in desk.run("status", run).out


def test_a_run_of_another_version_is_told_and_hides_no_other(desk: Desk) -> None:
    run = dead_run(desk).run
    other = desk.storage / "runs/pets-20260102-beef/run.json"
    other.parent.mkdir()
    text = (desk.storage / f"runs/{run}/run.json").read_text().replace(run, "pets-20260102-beef")
    other.write_text(text.replace('"optimizer": "adamw"', '"optimizer": "adamw-of-tomorrow"'))
    told = ("pets-20260102-beef", "optimizer", "cannot be read by this version")
    for command in ("status", "logs"):
        refused(desk.run(command, "pets-20260102-beef"), *told)
    listed = desk.run("status", "--json")
    assert [record["run"] for record in listed.json["runs"]] == [run]
    assert all(part in listed.err for part in told)
    assert desk.run("gc", "--json").status == 0


def test_cancelling_a_dead_run_ends_it_and_keeps_what_is_published(desk: Desk) -> None:
    run = dead_run(desk).run
    assert desk.run("cancel", run).status == 0
    result = desk.run("status", run, "--json")
    assert result.json["state"] == "cancelled"
    assert result.states() == {"rusty": "published", "tabby": "cancelled", "bolt": "cancelled"}
    refused(desk.run("cancel", run), "has ended already")


def test_cancelling_one_subject(desk: Desk) -> None:
    run = dead_run(desk).run
    refused(desk.run("cancel", run, "nobody"), "has no subject 'nobody'", "bolt")
    assert desk.run("cancel", run, "bolt").status == 0
    result = desk.run("status", run, "--json")
    assert result.json["state"] == "running"
    assert result.states() == {"rusty": "published", "tabby": "training", "bolt": "cancelled"}


def test_json_is_the_only_thing_on_stdout(desk: Desk) -> None:
    run = dead_run(desk).run
    for arguments in (["status"], ["status", run], ["logs", run], ["adapters", "list"]):
        json.loads(desk.run(*arguments, "--json").out)


def test_every_default_can_come_from_the_environment(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMFLEET_ADDRESS", "moon")
    refused(desk.run("train", desk.manifest("rusty")), "Address 'moon'")
    monkeypatch.setenv("DREAMFLEET_GENERATE_URL", "http://127.0.0.1:9")
    refused(desk.run("generate", "a dog"), "http://127.0.0.1:9")
