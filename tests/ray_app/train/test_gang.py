"""One subject over two nodes, because it was asked for and because one node is too small: the same as on one device."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load

from tests.ray_app.conftest import Desk
from tests.ray_app.nodes import run_program
from tests.tiny import tiny_images
from tests.training.trainer.test_pack import distance
from training.adapters.adapter import Adapter
from training.base.base import Base
from training.base.files.outline import outline
from training.manifest.defaults import filled
from training.manifest.manifest import load_manifest
from training.manifest.plan import plan_run
from training.photos.intake import current_fingerprint
from training.run.run import RunStore, list_runs
from training.run.source import Beat, Orders, Outcome, Task
from training.storage.registry import Registry
from training.storage.storage import Storage, open_storage
from training.trainer.checkpoint import load_state
from training.trainer.worker.worker import work

pytestmark = pytest.mark.ray

MANIFEST = """\
version: 1
name: large
base: {base}
defaults:
  class: dog
  prior: {{enabled: false}}
  evaluate: {{enabled: false}}
  train: {{max_steps: 6, learning_rate: 1.0e-3, batch_size: 3, mixed_precision: "no"}}
subjects:
  - {{id: asked, images: photos, train: {{strategy: {first}, zero: {{stage: 3}}}}}}
  - {{id: grown, images: photos}}
"""


class OneDevice:
    """The subjects of a manifest, plain, in this process."""

    def __init__(self, manifest: Path, base: Base, storage: Storage) -> None:
        self._manifest = filled(load_manifest(manifest), base.facts)
        self._todo = list(self._manifest.subjects)
        self._base, self._storage, self._root = base, storage, str(manifest.parent)
        (plan,) = plan_run(self._manifest, outline(self._manifest.base)).packs
        work(base, plan, self, RunStore(storage, "plain-1"), tenant="default", root=self._root)

    def lease(self, count: int) -> Sequence[Task]:
        taken, self._todo = self._todo[:count], self._todo[count:]
        return [Task(s, current_fingerprint(s, self._base.hash, self._storage, self._root)) for s in taken]

    def beat(self, beat: Beat) -> Orders:
        return Orders()

    def ended(self, outcome: Outcome) -> None:
        assert outcome.kind == "done", outcome.reason


def test_a_gang_learns_what_one_device_learns(desk: Desk, tiny: Base, tmp_path: Path) -> None:
    tiny_images(desk.folder / "photos")
    manifest = _manifest(desk, "large", first="zero")
    ran = run_program("tests.ray_app.two_nodes", manifest, desk)
    asked, grown = ran.json
    assert (asked["state"], grown["state"]) == ("published", "published"), ran.err[-3000:]
    assert not asked["attempts"]
    (moved,) = grown["attempts"]
    assert "it takes 3 rows" in moved["reason"] and "several devices" in moved["reason"]
    assert moved["reason"] in ran.err  # a person reads why

    apart = open_storage(str(tmp_path / "plain"))
    OneDevice(_manifest(desk, "plain", first="plain"), tiny, apart)
    together = open_storage(str(desk.storage))
    for id in ("asked", "grown"):
        assert distance(_learned(together, id), _learned(apart, id)) < 1e-4
        assert _layout(together, id) == _layout(apart, id)


def _manifest(desk: Desk, name: str, first: str) -> Path:
    path = desk.folder / f"{name}.yaml"
    path.write_text(MANIFEST.format(base=desk.base, first=first))
    return path


def _learned(storage: Storage, id: str) -> Adapter:
    """What the last checkpoint holds, in fp32."""
    (run,) = list_runs(storage) or ["plain-1"]
    _, data = next(RunStore(storage, run).load_checkpoints(id))
    return load_state(data).adapter


def _layout(storage: Storage, id: str) -> dict[str, object]:
    """Names, shapes and types of a published file."""
    registry = Registry(storage)
    tensors = load(registry.weights(registry.resolve(id)))
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
