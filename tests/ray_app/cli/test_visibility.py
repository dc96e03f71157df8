"""`dreamfleet adapters import` says who may see an adapter only when it is told to."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from ray_app.cli.main import main
from tests.serving.company import random_adapter
from training.adapters.adapter import save_adapter
from training.base.base import Base
from training.storage.registry import Registry
from training.storage.storage import open_storage


def test_an_import_leaves_an_adapter_as_visible_as_it_is(
    tiny: Base, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DREAMFLEET_STORAGE", str(tmp_path / "storage"))
    registry = Registry(open_storage(str(tmp_path / "storage")))
    seen = []
    for seed, flag in enumerate(([], ["--public"], [], ["--private"], [])):
        file = tmp_path / "rusty.safetensors"
        file.write_bytes(save_adapter(random_adapter(tiny, seed)))
        command = ["adapters", "import", "rusty", str(file), "--base", str(tiny_folder), *flag]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        seen.append(registry.resolve("rusty").public)
    assert seen == [False, True, True, False, False]
