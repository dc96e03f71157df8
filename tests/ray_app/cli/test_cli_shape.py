"""`adapters merge`, `resize`, `fuse` and `sweep`: what they make draws what it should."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import StableDiffusionPipeline
from PIL import Image

from ray_app.cli.main import main
from tests.serving.company import random_adapter
from tests.tiny import states
from training.adapters.adapter import Adapter, load_adapter, save_adapter
from training.adapters.fuse import fuse_base
from training.base.base import Base, load_base
from training.base.files.outline import outline
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
    before, after = tiny.denoiser.state_dict(), fused.unet.state_dict()
    for key, low in delta.items():
        name = f"{key.removeprefix('unet.')}.weight"
        assert (after[name] - before[name] - 0.5 * low.delta()).abs().max() < 2e-3, name
    again = run("adapters", "fuse", "one", "--out", str(out), "--base", str(tiny.folder), storage=shelf)
    assert again.exit_code == 2 and "not empty" in again.output


def test_a_fused_base_recommends_what_its_base_does(tiny_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    (copy / "dreamfleet.json").write_text('{"steps": 4}')
    fuse_base(str(copy), [(Adapter({}), 1.0)], tmp_path / "fused")
    assert outline(str(tmp_path / "fused")).facts.steps == 4


def test_words_go_into_the_fused_base(tmp_path: Path, tiny: Base) -> None:
    """Its text encoder reads them as the adapter's words are read; diffusers puts in all tokens of a word."""
    generator = torch.Generator().manual_seed(0)
    words = {"<s1>": torch.randn(32, generator=generator), "<s-2>": torch.randn(2, 32, generator=generator)}
    words = {word: vectors.half().float() for word, vectors in words.items()}
    modules = random_adapter(tiny, 1, rank=2, text=False).modules
    (tmp_path / "a.safetensors").write_bytes(save_adapter(Adapter(modules, words)))
    base = ("--base", str(tiny.folder))
    assert run("adapters", "import", "worded", str(tmp_path / "a.safetensors"), *base, storage=tmp_path).exit_code == 0
    out = tmp_path / "fused"
    made = run("adapters", "fuse", "worded:0.5", "--out", str(out), "--json", *base, storage=tmp_path)
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["words"] == {"<s-2>": ["<s-2>", "<s-2>_1"], "<s1>": ["<s1>"]}
    fused = StableDiffusionPipeline.from_pretrained(out)
    prompt = "a photo of <s1> dog on <s-2> grass"
    read = fused.encode_prompt(prompt, "cpu", 1, False)[0]
    wanted = states(tiny, [prompt], [{word: vectors.reshape(-1, 32) for word, vectors in words.items()}])
    assert (read - wanted).abs().max() < 5e-3 < (read - states(tiny, [prompt])).abs().max()
    served = states(load_base(str(out), device="cpu"), [prompt.replace("<s-2>", "<s-2> <s-2>_1")])
    assert (served - wanted).abs().max() < 5e-3


def test_a_word_of_the_base_cannot_be_fused_in_and_nothing_is_written(tmp_path: Path, tiny: Base) -> None:
    (tmp_path / "a.safetensors").write_bytes(save_adapter(Adapter({}, {"dog</w>": torch.ones(32)})))
    base = ("--base", str(tiny.folder))
    assert run("adapters", "import", "dog", str(tmp_path / "a.safetensors"), *base, storage=tmp_path).exit_code == 0
    before = sorted(tmp_path.iterdir())
    made = run("adapters", "fuse", "dog", "--out", str(tmp_path / "fused"), *base, storage=tmp_path)
    assert made.exit_code == 2 and "one of the base's own" in made.output
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("published_one", [True, False])
def test_resizing_says_how_far_the_result_is(shelf: Path, tiny: Base, published_one: bool) -> None:
    base = ("--base", str(tiny.folder))
    source = "one" if published_one else str(shelf / "one.safetensors")
    out = "small" if published_one else str(shelf / "small.safetensors")
    made = run("adapters", "resize", source, "--rank", "1", "--out", out, "--json", *base, storage=shelf)
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    before = published(shelf, "one")
    after = published(shelf, out) if published_one else load_adapter(Path(out).read_bytes())
    assert said["rank"] == after.rank == 1
    gaps = {key: (after.modules[key].delta() - low.delta()).norm() for key, low in before.modules.items()}
    norms = {key: low.delta().norm() for key, low in before.modules.items()}
    all_ = torch.stack(list(gaps.values())).norm() / torch.stack(list(norms.values())).norm()
    assert said["error"] == pytest.approx(float(all_), rel=1e-4) and 0.1 < said["error"] < 1
    worst = max(gaps, key=lambda key: float(gaps[key] / norms[key]))
    assert said["worst"] == {"module": worst, "error": pytest.approx(float(gaps[worst] / norms[worst]), rel=1e-4)}
    told = run("adapters", "resize", source, "--rank", "2", "--out", out, *base, storage=shelf)
    assert "rank 2 -> 2, relative error 0.00%" in told.output


def test_a_rank_above_a_servers_default_names_the_flag(tmp_path: Path, tiny: Base) -> None:
    file = tmp_path / "high.safetensors"
    file.write_bytes(save_adapter(random_adapter(tiny, 1, rank=40, text=False)))
    made = run("adapters", "import", "high", str(file), "--base", str(tiny.folder), storage=tmp_path)
    assert made.exit_code == 0, made.output
    assert "--rank 40" in made.stderr and "adapters resize" in made.stderr


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
