"""`adapters merge`, `fuse` and `sweep`: what they make draws what it should."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from diffusers import StableDiffusionPipeline
from PIL import Image

from ray_app.cli.main import main
from tests.serving.company import random_adapter
from training.adapters.adapter import Adapter, load_adapter, save_adapter
from training.base.base import Base
from training.storage.registry import Registry
from training.storage.storage import open_storage


@pytest.fixture
def shelf(tmp_path: Path, tiny: Base) -> Path:
    """A storage with the adapters `one` and `two`."""
    for seed, name in enumerate(("one", "two")):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(save_adapter(random_adapter(tiny, seed, rank=2, text=False, size=0.2)))
        assert run("adapters", "import", name, str(file), "--base", str(tiny.folder), storage=tmp_path).exit_code == 0
    return tmp_path


def run(*arguments: str, storage: Path) -> Result:
    return CliRunner().invoke(main, [*arguments, "--storage", str(storage / "storage")])


def published(shelf: Path, id: str) -> Adapter:
    registry = Registry(open_storage(str(shelf / "storage")))
    return load_adapter(registry.weights(registry.resolve(id)))


def test_a_merged_adapter_is_the_weighted_sum(shelf: Path, tiny: Base) -> None:
    made = run(
        "adapters", "merge", "one:0.7", "two:-0.3", "--out", "both", "--json", "--base", str(tiny.folder), storage=shelf
    )
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["rank"] == 4
    one, two, both = (published(shelf, id) for id in ("one", "two", "both"))
    for key, low in both.modules.items():
        expected = 0.7 * one.modules[key].delta() - 0.3 * two.modules[key].delta()
        assert (low.delta() - expected).abs().max() < 2e-3


def test_a_merged_adapter_can_be_reduced_into_a_file(shelf: Path) -> None:
    out = shelf / "small.safetensors"
    made = run("adapters", "merge", "one", "two", "--rank", "1", "--out", str(out), storage=shelf)
    assert made.exit_code == 0, made.output
    assert load_adapter(out.read_bytes()).rank == 1


def test_a_fused_base_draws_what_the_adapter_draws(shelf: Path, tiny: Base) -> None:
    out = shelf / "fused"
    made = run("adapters", "fuse", "one:0.5", "--out", str(out), "--base", str(tiny.folder), storage=shelf)
    assert made.exit_code == 0, made.output
    fused = StableDiffusionPipeline.from_pretrained(out)
    delta = published(shelf, "one").modules
    before, after = tiny.denoiser.state_dict(), fused.denoiser.state_dict()
    for key, low in delta.items():
        name = f"{key.removeprefix('unet.')}.weight"
        assert (after[name] - before[name] - 0.5 * low.delta()).abs().max() < 2e-3, name
    again = run("adapters", "fuse", "one", "--out", str(out), "--base", str(tiny.folder), storage=shelf)
    assert again.exit_code == 2 and "not empty" in again.output


def test_a_sweep_starts_at_the_base_and_goes_to_the_adapter(shelf: Path, tiny: Base) -> None:
    out = shelf / "sweep.png"
    options = ["--weights", "0,0.5,1", "--prompt", "a dog", "--prompt", "a cat", "--steps", "2", "--out", str(out)]
    made = run("adapters", "sweep", "one", *options, "--base", str(tiny.folder), storage=shelf)
    assert made.exit_code == 0, made.output
    grid = Image.open(out)
    assert grid.size[0] == 3 * 128
    tiles = [grid.crop((128 * column, 18, 128 * (column + 1), 18 + 128)).tobytes() for column in range(3)]
    assert len(set(tiles)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "one:x", "--out", "b"], "is no weight"),
        (["merge", "nobody", "--out", "b"], "nobody"),
        (["sweep", "one", "--weights", "0;1"], "numbers with commas"),
    ],
)
def test_mistakes_are_told(shelf: Path, arguments: list[str], message: str) -> None:
    result = run("adapters", *arguments, storage=shelf)
    assert result.exit_code == 2
    assert message in result.output
