"""Every manifest that ships is valid, and its photos are there with their licences."""

import re
from pathlib import Path

import pytest

from training.base.files.outline import outline
from training.manifest.defaults import filled
from training.manifest.gate import EvaluateSpec
from training.manifest.manifest import load_manifest, parse_manifest
from training.manifest.plan import plan_run, unmatched_targets
from training.manifest.subject import LoraSpec, PriorSpec, SubjectSpec, TrainSpec, WordSpec, ZeroSpec
from training.photos.files import list_photo_files
from training.photos.photos import photos

MANIFESTS = Path(__file__).parents[1] / "manifests"
RUNS = [path for path in MANIFESTS.rglob("manifest*.yaml") if "images" not in path.parts]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_it_can_be_planned_and_its_photos_are_good(path: Path) -> None:
    manifest = load_manifest(path)
    base = outline(manifest.base, manifest.root)
    manifest = filled(manifest, base.facts)
    assert plan_run(manifest, base).packs
    for subject in manifest.subjects:
        assert not unmatched_targets(subject, base)
        found = photos(list_photo_files(Path(manifest.root, subject.images)), resolution=base.facts.resolution)
        assert len(found.good) >= 5
        assert not found.rejected


def test_the_demo_trains_at_least_six_subjects_in_one_pack_and_names_licences() -> None:
    base = outline("pocket")
    manifest = filled(load_manifest(MANIFESTS / "demo" / "manifest.yaml"), base.facts)
    plan = plan_run(manifest, base)
    assert len(manifest.subjects) >= 6
    assert len(plan.packs) == 1
    assert plan.packs[0].slots >= 6
    licences = (MANIFESTS / "demo" / "images" / "LICENSES.md").read_text(encoding="utf-8")
    for subject in manifest.subjects:
        assert subject.id in licences


def test_every_setting_is_documented() -> None:
    page = (MANIFESTS.parent / "docs" / "manifest.md").read_text(encoding="utf-8")
    parts = (SubjectSpec, LoraSpec, WordSpec, PriorSpec, TrainSpec, ZeroSpec, EvaluateSpec)
    named = {field.alias or name for part in parts for name, field in part.model_fields.items()}
    missing = sorted(name for name in named if name not in page)
    assert not missing
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        assert parse_manifest(block).subjects
