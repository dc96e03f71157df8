"""What a manifest leaves to its base, and what has no meaning on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.families import write_family
from tests.tiny import tiny_images
from training.base.files.outline import outline
from training.errors import UserError
from training.manifest.defaults import filled
from training.manifest.manifest import Manifest, parse_manifest
from training.run.submission import read_manifest


def manifest(base: Path | str, **subject: Any) -> str:
    entry = {"id": "a", "images": "x", "class": "dog", **subject}
    return yaml.safe_dump({"version": 1, "name": "t", "base": str(base), "subjects": [entry]})


def read(folder: Path, base: Path | str, **subject: Any) -> Manifest:
    tiny_images(folder / "x", 5)
    (folder / "m.yaml").write_text(manifest(base, **subject))
    return read_manifest(folder / "m.yaml")[0]


@pytest.fixture(scope="module")
def flow_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("z-image", tmp_path_factory.mktemp("flow"))


def test_targets_are_the_familys_where_none_are_named(flow_base: Path, tmp_path: Path) -> None:
    (one,) = read(tmp_path, flow_base).subjects
    assert one.lora.targets == ("to_q", "to_k", "to_v", "to_out.0")
    assert one.lora.text_encoder_targets == () and not one.lora.text_encoder
    (other,) = read(tmp_path, flow_base, lora={"targets": ["feed_forward.w1"]}).subjects
    assert other.lora.targets == ("feed_forward.w1",)


def test_a_stable_diffusion_subject_reads_as_if_it_had_named_them(tiny_folder: Path) -> None:
    """So what identifies a training does not depend on whether usual settings are written down."""
    facts = outline(str(tiny_folder)).facts
    bare = filled(parse_manifest(manifest(tiny_folder)), facts)
    named = {"targets": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": True}
    named["text_encoder_targets"] = ["q_proj", "k_proj", "v_proj", "out_proj"]
    whole = parse_manifest(manifest(tiny_folder, lora=named, train={"timesteps": {"density": "uniform"}}))
    assert bare == whole and bare.model_dump_json() == whole.model_dump_json()
    assert "timesteps" not in json.loads(bare.model_dump_json())["subjects"][0]["train"]
    assert filled(bare, facts) == bare


def test_timesteps_survive_being_written_down(flow_base: Path, tmp_path: Path) -> None:
    asked = {"density": "logit_normal", "mean": 0.5, "std": 0.8, "shift": "resolution"}
    made = read(tmp_path, flow_base, train={"timesteps": asked})
    again = Manifest.model_validate_json(made.model_dump_json(by_alias=True))
    assert again == made and again.subjects[0].train.timesteps.model_dump() == asked


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        ({"train": {"min_snr_gamma": 5}}, "'a': `train.min_snr_gamma` is 5, .* flow matching. Leave it out"),
        ({"lora": {"targets": ["cap_embedder.1"]}}, "'cap_embedder.1' is also the layer 'cap_embedder.1'"),
        ({"lora": {"targets": ["attn1.to_q"]}}, "no layer .* 'attn1.to_q'. Use names such as to_q"),
        (
            {"words": {"tokens": ["<s1>"]}, "instance_prompt": "a photo of <s1>"},
            "`words.tokens` names <s1>; the text encoder of this base takes no new words",
        ),
    ],
)
def test_what_has_no_meaning_on_a_flow_base_is_said(
    flow_base: Path, tmp_path: Path, subject: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, flow_base, **subject)


def test_a_negative_prompt_has_no_meaning_on_a_guidance_distilled_base(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`negative_prompt` is 'red', and this base draws without one"):
        read(tmp_path, write_family("flux", tmp_path), negative_prompt="red")


def test_timesteps_have_no_meaning_on_a_ddpm_base(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`train.timesteps` is for bases that are trained by flow matching"):
        read(tmp_path, tiny_folder, train={"timesteps": {"shift": 2}})
