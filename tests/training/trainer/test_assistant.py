"""A training adapter: worn by every row of the steps, by no picture, and off the base afterwards."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.serving.company import random_adapter
from tests.tiny import tiny_images
from tests.training.subjects import subject
from tests.training.trainer.test_pack import TIGHT, distance, run
from training.__main__ import main
from training.adapters.adapter import Adapter, load_adapter, save_adapter
from training.adapters.fuse import fuse_base
from training.base.base import Base, load_base
from training.errors import UserError
from training.manifest.manifest import load_manifest
from training.manifest.plan import reserve
from training.run.submission import read_manifest
from training.sampling.sampler import sample
from training.storage.registry import Registry
from training.storage.storage import open_storage
from training.trainer.assistant import Assistant, read_training_adapter


def assistant_of(base: Base) -> Adapter:
    return load_adapter(save_adapter(random_adapter(base, 7, text=False, size=0.2)))


@torch.no_grad()
def test_it_is_worn_inside_alone_and_leaves_the_base_as_it_was(tiny: Base) -> None:
    x, times, conds = torch.randn(3, 4, 8, 8), torch.tensor([100.0, 500.0, 900.0]), tiny.encode(["a", "dog", "cat"])
    before = tiny.predict(x, times, conds)
    assistant = Assistant(tiny, assistant_of(tiny))
    assert torch.equal(tiny.predict(x, times, conds), before)
    with assistant.worn(3):
        assert (tiny.predict(x, times, conds) - before).abs().amax((1, 2, 3)).min() > 1e-3
    assistant.close()
    assert torch.equal(tiny.predict(x, times, conds), before)


def test_training_beside_it_is_training_on_a_base_that_it_is_fused_into(tiny: Base, tmp_path: Path) -> None:
    """What a subject learns is the same; what it draws is without."""
    adapter = assistant_of(tiny)
    fused_folder = tmp_path / "fused"
    fuse_base(str(tiny.folder), [(adapter, 1.0)], fused_folder)
    plain, fused = (load_base(str(f), device="cpu", dtype=torch.float64) for f in (tiny.folder, fused_folder))
    with torch.no_grad():  # the folder holds fp16: the same sums, exactly
        for (key, mine), theirs in zip(fused.denoiser.named_parameters(), plain.denoiser.parameters(), strict=True):
            low = adapter.modules.get(f"unet.{key.removesuffix('.weight')}")
            mine.copy_(theirs if low is None else theirs + low.up.double() @ low.down.double())
        fused.parts.models["text_encoder"].load_state_dict(plain.parts.models["text_encoder"].state_dict())
    ones = [subject("a", 1), subject("b", 2, prior={"source": "prediction"}), subject("c", 3, train={"crop": "bucket"})]
    worn = run(plain, copy.deepcopy(ones), slots=2, training_adapter=adapter)
    expected = run(fused, ones, slots=2)
    assert all(distance(worn.adapters[id], expected.adapters[id]) <= TIGHT for id in ("a", "b", "c"))
    recomputed = run(plain, ones, slots=2, training_adapter=adapter, gradient_checkpointing=True)
    assert all(distance(worn.adapters[id], recomputed.adapters[id]) <= TIGHT for id in ("a", "b", "c"))
    assert distance(worn.adapters["a"], run(plain, ones, slots=2).adapters["a"]) > 1e-4
    drawn = sample(plain, ["a dog"], seeds=[1], steps=2)
    assert torch.equal(
        drawn, sample(load_base(str(tiny.folder), device="cpu", dtype=torch.float64), ["a dog"], seeds=[1], steps=2)
    )


def manifest(tmp_path: Path, base: Base, adapter: str | None, **subject: Any) -> Path:
    tiny_images(tmp_path / "rusty", side=40)
    entry = {
        "id": "rusty", "images": "rusty", "class": "dog", "prior": {"source": "prediction"},
        "train": {"max_steps": 2, "learning_rate": 1e-2, "mixed_precision": "no"}, "evaluate": {"enabled": False},
        "samples": {"images": 1, "steps": 2}, **subject,
    }  # fmt: skip
    text = {"version": 1, "name": "pets", "base": str(base.folder), "subjects": [entry]}
    (tmp_path / "pets.yaml").write_text(yaml.safe_dump(text | ({"training_adapter": adapter} if adapter else {})))
    return tmp_path / "pets.yaml"


def test_a_manifest_names_it_and_its_content_identifies_the_training(
    tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worn.safetensors").write_bytes(save_adapter(assistant_of(tiny)))
    storage, cards, learned = str(tmp_path / "storage"), [], []
    for name in (None, "worn.safetensors", "worn.safetensors"):
        path = manifest(tmp_path, tiny, name)
        monkeypatch.setattr("sys.argv", ["training", str(path), "--storage", storage])
        assert main() == 0
        registry = Registry(open_storage(storage))
        resolved = registry.resolve("default/rusty")
        cards.append(resolved.card)
        learned.append(load_adapter(registry.weights(resolved)))
    assert cards[0].fingerprint != cards[1].fingerprint == cards[2].fingerprint
    assert distance(learned[0], learned[1]) > 1e-5 and cards[1].sha256 == cards[2].sha256


def test_what_does_not_fit_is_said(tiny: Base, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training_adapter 'no.safetensors': there is no file"):
        read_manifest(manifest(tmp_path, tiny, "no.safetensors"))
    (tmp_path / "worn.safetensors").write_bytes(save_adapter(random_adapter(tiny, 1)))
    with pytest.raises(UserError, match="`evaluate.early_stop` knows no `training_adapter`"):
        read_manifest(manifest(tmp_path, tiny, "worn.safetensors", evaluate={"early_stop": True}))
    path = manifest(tmp_path, tiny, "worn.safetensors")
    checked, outlined = read_manifest(path)
    assert load_manifest(path).training_adapter == "worn.safetensors" and reserve(checked, outlined) == ()
    with pytest.raises(UserError, match="changes text encoders or words"):
        read_training_adapter(tiny, "worn.safetensors", str(tmp_path), "")
    with pytest.raises(UserError, match="is not the file that the run began with"):
        read_training_adapter(tiny, "worn.safetensors", str(tmp_path), "0" * 64)
    with pytest.raises(UserError, match="Put it on every node"):
        read_training_adapter(tiny, "other.safetensors", str(tmp_path), "")
