"""`adapters import` and `export`: everything that is given is taken, everything that is asked for is written."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from ray_app.cli.main import main
from tests.serving.company import random_adapter
from tests.training.adapters.test_adapter import assert_equal
from training.adapters.adapter import Adapter, load_adapter, save_adapter
from training.base.base import Base
from training.storage.delivery import delivered
from training.storage.registry import Registry
from training.storage.storage import StorageError, open_storage

FORMATS = ["diffusers", "kohya", "lora_diffusion", "peft"]
WORDS = {"<s1>": torch.arange(32.0), "<s-2>": torch.ones(2, 32)}


def run(*arguments: str | Path, storage: Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--storage", str(storage / "storage")])


def published(folder: Path, id: str) -> Adapter:
    registry = Registry(open_storage(str(folder / "storage")))
    return load_adapter(registry.weights(registry.resolve(id)))


def publish(folder: Path, base: Base, adapter: Adapter, id: str = "rusty") -> Adapter:
    (folder / "in.safetensors").write_bytes(save_adapter(adapter))
    made = run("adapters", "import", id, folder / "in.safetensors", "--base", base.folder, storage=folder)
    assert made.exit_code == 0, made.output
    return published(folder, id)


def full(base: Base) -> Adapter:
    """What every format can hold, words among it."""
    return Adapter(random_adapter(base, 1, rank=2, text=False).modules, WORDS)


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_with_words_is_imported_as_its_folder(tmp_path: Path, tiny: Base, format: str) -> None:
    adapter = publish(tmp_path, tiny, full(tiny))
    out = tmp_path / "new" / format
    made = run(
        "adapters",
        "export",
        "rusty",
        "--format",
        format,
        "--out",
        out,
        "--json",
        "--base",
        tiny.folder,
        storage=tmp_path,
    )
    assert made.exit_code == 0, made.output
    files = json.loads(made.stdout)["files"]
    assert sorted(files) == sorted(str(path) for path in out.rglob("*") if path.is_file())
    assert str(out / "embeddings" / "s1.safetensors") in files
    (out / "README.md").write_text("an adapter")
    again = run("adapters", "import", "again", out, "--base", tiny.folder, storage=tmp_path)
    assert again.exit_code == 0, again.output
    assert_equal(published(tmp_path, "again"), adapter)


def test_files_of_the_same_name_are_both_taken(tmp_path: Path, tiny: Base) -> None:
    adapter = random_adapter(tiny, 1, rank=2)
    halves = {
        folder: Adapter({name: low for name, low in adapter.modules.items() if name.startswith(start)})
        for folder, start in (("unet", "unet."), ("te", "text_encoder."))
    }
    files = []
    for folder, half in halves.items():
        assert half.modules
        files.append(tmp_path / folder / "x.safetensors")
        files[-1].parent.mkdir()
        files[-1].write_bytes(save_adapter(half))
    made = run("adapters", "import", "both", *files, "--base", tiny.folder, storage=tmp_path)
    assert made.exit_code == 0, made.output
    assert published(tmp_path, "both").modules.keys() == adapter.modules.keys()


def test_a_folder_with_weights_that_cannot_be_read_is_refused_whole(tmp_path: Path, tiny: Base) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "unet" / "x.safetensors").write_bytes(save_adapter(full(tiny)))
    (tmp_path / "text_encoder" / "adapter_model.bin").write_bytes(b"PK\x03\x04 a pickle")
    made = run("adapters", "import", "half", tmp_path, "--base", tiny.folder, storage=tmp_path)
    assert made.exit_code == 2
    assert "text_encoder/adapter_model.bin" in made.output and "never pickles" in made.output


@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_fails_leaves_what_was_there(tmp_path: Path, tiny: Base, there: bool) -> None:
    publish(tmp_path, tiny, full(tiny))
    out = tmp_path / "in.safetensors" / "below"
    if there:
        out = tmp_path / "out"
        (out / "pytorch_lora_weights.safetensors").mkdir(parents=True)  # no file can take its place
    before = sorted(tmp_path.rglob("*"))
    made = run("adapters", "export", "rusty", "--out", out, storage=tmp_path)
    assert made.exit_code == 2 and f"write {out}" in made.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_delivery_into_a_folder_that_is_there_replaces_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("other")
    with pytest.raises(RuntimeError), delivered(tmp_path) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "other"}
    with delivered(tmp_path) as folder:
        (folder / "a").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "other"}
    with pytest.raises(StorageError, match="write"), delivered(tmp_path / "a" / "below"):
        pass


@pytest.mark.parametrize(
    "command",
    [
        ["export", "rusty", "--format", "kohya"],
        ["export", "rusty", "--format", "lora_diffusion"],
        ["merge", "rusty", "--out", "sum"],
        ["resize", "rusty", "--rank", "1", "--out", "small"],
        ["fuse", "rusty"],
        ["sweep", "rusty"],
    ],
)
def test_a_base_that_is_not_found_by_its_name_is_asked_for(tmp_path: Path, tiny: Base, command: list[str]) -> None:
    publish(tmp_path, tiny, full(tiny))
    out = [] if "--out" in command else ["--out", str(tmp_path / "out")]
    made = run("adapters", *command, *out, storage=tmp_path)
    assert made.exit_code == 2
    assert "--base FOLDER" in made.output and tiny.folder.name in made.output and "default/rusty" in made.output


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_formats_that_do_not_count_the_bases_modules_need_no_base(tmp_path: Path, tiny: Base, format: str) -> None:
    publish(tmp_path, tiny, full(tiny))
    made = run("adapters", "export", "rusty", "--format", format, "--out", tmp_path / "out", storage=tmp_path)
    assert made.exit_code == 0, made.output
