"""The manifest: merging, closedness, and messages that would fix the user's problem."""

import subprocess
import sys
from pathlib import Path

import pytest

from training.errors import UserError
from training.manifest.manifest import ManifestError, load_manifest, parse_manifest, parse_subject

GOOD = """\
version: 1
name: demo
defaults:
  class: dog
  lora: {rank: 4}
  train: {max_steps: 10, learning_rate: 1.0e-3}
subjects:
  - id: rusty
    images: images/rusty
  - id: tabby
    class: cat
    images: images/tabby
    train: {max_steps: 6}
"""


def test_subjects_override_defaults_key_by_key() -> None:
    rusty, tabby = parse_manifest(GOOD).subjects
    assert (rusty.class_, rusty.train.max_steps, rusty.train.learning_rate, rusty.lora.rank) == ("dog", 10, 1e-3, 4)
    assert (tabby.class_, tabby.train.max_steps, tabby.train.learning_rate, tabby.lora.rank) == ("cat", 6, 1e-3, 4)
    assert tabby.filled_instance_prompt == "a photo of sks cat"
    assert tabby.filled_class_prompt == "a photo of cat"


def test_it_survives_rays_border() -> None:
    manifest = parse_manifest(GOOD)
    assert type(manifest).model_validate(manifest.model_dump(by_alias=True)) == manifest


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("max_steps: 10", "max_stps: 10", 6, "unknown key 'train.max_stps'. Did you mean 'max_steps'?"),
        ("name: demo", "nam: demo", 2, "unknown key 'nam'. Did you mean 'name'?"),
        ("id: rusty", "id: Rusty!", 8, "'id' is 'Rusty!'; allowed is"),
        ("id: tabby", "id: rusty", 10, "'rusty' is taken by line 8"),
        ("max_steps: 6", "max_steps: 0", 13, "'train.max_steps' is 0: Input should be greater than or equal to 1"),
        ("max_steps: 6", "max_steps: many", 13, "'train.max_steps' is 'many'"),
        ("version: 1", "version: 2", 1, "'version' is 2"),
        ("    images: images/tabby\n", "", 10, "'images' is missing"),
        ("  class: dog\n", "", 7, "`class` is missing"),
        ("images: images/rusty", "images: a\n    images: b", 10, "key 'images' stands twice (first in line 9)"),
        ("class: cat", 'instance_prompt: "{klass}"', 10, "`{klass}`"),
        ("class: cat", "prior: {source: folder}", 11, "go together"),
        ("name: demo", "name: demo: x", 2, "not valid YAML"),
    ],
)
def test_a_mistake_is_named_with_its_line(old: str, new: str, line: int, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(GOOD.replace(old, new, 1), name="m.yaml")
    assert any(said.startswith(f"m.yaml:{line}: ") and message in said for said in str(caught.value).splitlines())


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(GOOD.replace("rank: 4", "rang: 4").replace("max_steps: 6", "max_steps: -1"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "subjects: 3"])
def test_what_is_no_manifest_says_so(text: str) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(text)


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_manifest(tmp_path / "none.yaml")


def test_the_words_import_no_torch() -> None:
    """`validate` ends within a second because nothing it needs imports torch."""
    code = (
        "import sys, training.manifest.plan, training.photos.intake, training.run.submission, training.run.fault; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{strategy: zero}", "`batch_size` >= `zero.workers` (2)"),
        ("{strategy: zero, batch_size: 2, zero: {workers: 3}}", "`batch_size` >= `zero.workers` (3)"),
        ("{strategy: zero, batch_size: 2, optimizer: prodigy}", "`optimizer: adamw`"),
        ("{strategy: zero, batch_size: 2, mixed_precision: fp16}", "`mixed_precision: bf16` or `no`"),
        ("{batch_size: 2, zero: {stage: 1}}", "stage"),
    ],
)
def test_what_cannot_be_spread_over_devices_says_why(settings: str, message: str) -> None:
    text = f"{{version: 1, name: t, subjects: [{{id: a, images: x, class: dog, train: {settings}}}]}}"
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text)
    assert message in str(caught.value)


def test_whether_it_can_be_spread_depends_on_defaults_and_overrides_together() -> None:
    text = "{version: 1, name: t, defaults: {class: dog, train: {strategy: zero}}, "
    text += "subjects: [{id: a, images: x, train: %s}]}"
    assert parse_manifest(text % "{batch_size: 2}").subjects[0].train.zero.workers == 2
    assert parse_manifest(text % "{strategy: auto}").subjects[0].train.against_zero is not None


@pytest.mark.parametrize(("resolution", "good"), [(64, True), (512, True), (100, False), (520, False)])
def test_aspect_buckets_need_a_resolution_of_whole_eighths(resolution: int, good: bool) -> None:
    train = f"{{resolution: {resolution}, crop: bucket}}"
    text = f"{{version: 1, name: t, subjects: [{{id: a, images: x, class: dog, train: {train}}}]}}"
    if good:
        assert parse_manifest(text).subjects[0].train.cropping == "bucket"
    else:
        with pytest.raises(ManifestError, match=f"multiple of 64, not {resolution}"):
            parse_manifest(text)


def test_a_preset_chooses_what_is_not_said() -> None:
    text = "{version: 1, name: t, defaults: {class: dog, preset: fast, train: {checkpoint_every: 7}}, subjects: "
    text += "[{id: a, images: x}, {id: b, images: x, preset: best, train: {max_steps: 9}, "
    text += "prior: {source: folder, folder: y}}]}"
    a, b = parse_manifest(text).subjects
    assert (a.train.max_steps, a.prior.source, a.prior.captions, a.train.checkpoint_every) == (
        350,
        "prediction",
        True,
        7,
    )
    assert (b.lora.rank, b.train.max_steps, b.prior.source, b.train.checkpoint_every) == (16, 9, "folder", 7)
    assert parse_subject({"id": "a", "class": "dog", "images": "x", "preset": "best"}).lora.rank == 16


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ManifestError, match="'fast', 'balanced' or 'best'"):
        parse_manifest("{version: 1, name: t, subjects: [{id: a, images: x, class: dog, preset: quick}]}")
