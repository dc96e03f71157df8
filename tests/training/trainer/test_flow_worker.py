"""A worker on bases of the flow-matching families: photos in, published adapters out."""

from pathlib import Path

import pytest

from tests.families import write_family
from tests.tiny import tiny_images
from tests.training.trainer.test_worker import Fleet, entries
from training.adapters.adapter import load_adapter
from training.base.base import load_base
from training.storage.registry import Registry


@pytest.mark.parametrize("family", ["z-image", "klein", "flux"])
def test_subjects_are_published_with_the_familys_targets(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.trainer.worker.worker.BEAT_SECONDS", 0.0)
    base = load_base(str(write_family(family, tmp_path)), device="cpu")
    for seed, name in enumerate(("a", "b")):
        tiny_images(tmp_path / name, side=40, seed=seed)
    fleet = Fleet(tmp_path, base, entries("a", "b"))
    outcomes = fleet.work()
    assert {outcome.kind for outcome in outcomes.values()} == {"done"}
    registry = Registry(fleet.storage)
    resolved = registry.resolve("default/a")
    assert (resolved.card.targets, resolved.card.text_encoder_targets) == (base.facts.targets, ())
    adapter = load_adapter(registry.read(resolved, "adapter.safetensors"))
    assert adapter.modules and all(low.up.abs().max() > 0 for low in adapter.modules.values())
    assert {"samples/0.png", "card.json"} <= set(registry.files(resolved))
