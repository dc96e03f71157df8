"""Planning: who shares a pack, and sizes that hold to the byte."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from tests.tiny import clip
from tests.training.subjects import subject
from training.adapters.bank import Bank
from training.adapters.layout import find_sites
from training.base.base import Base
from training.base.files.outline import Outline, outline
from training.base.footprint import DRAWN_BYTES, PIXEL_BYTES, TRAINED_BYTES
from training.manifest.defaults import filled
from training.manifest.manifest import Manifest, parse_manifest
from training.manifest.plan import adapter_parameters, plan_run, reserve, unmatched_targets


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> Outline:
    return outline(str(tiny_folder))


def manifest(*subjects: dict[str, object]) -> Manifest:
    entries = [{"id": f"s{i}", "images": "x", "class": "dog", **entry} for i, entry in enumerate(subjects)]
    made = parse_manifest(yaml.safe_dump({"version": 1, "name": "plan", "subjects": entries}))
    return filled(made, outline("pocket").facts)


def test_facts_come_from_headers_alone(base: Outline, tiny: Base) -> None:
    assert base.facts.resolution == 16
    assert base.parameters == sum(p.numel() for model in tiny.parts.models.values() for p in model.parameters())


def test_memory_is_all_that_a_worker_holds(base: Outline) -> None:
    """With the sizes of SD 1.5 at 256 px in bf16 a worker of two subjects was measured to hold 5.03 GB."""
    facts = dataclasses.replace(
        base.facts,
        resolution=512,
        cell_px=8,
        trained_bytes=320 * TRAINED_BYTES,
        drawn_bytes=320 * DRAWN_BYTES,
        pixel_bytes=128 * PIXEL_BYTES,
    )
    large = dataclasses.replace(base, facts=facts, parameters=1_066_000_000)
    train = {"resolution": 256, "mixed_precision": "bf16"}
    (usual,) = plan_run(manifest({"train": train}, {"train": train}), large).packs
    assert usual.memory_mb == pytest.approx(5_030, rel=0.05)
    plain: dict[str, object] = {"evaluate": {"enabled": False}, "prior": {"enabled": False}, "samples": {"images": 0}}
    (bare,) = plan_run(manifest({"train": train, **plain}), large).packs
    assert 2 * 1_066 + bare.state_bytes / 1e6 < bare.memory_mb < usual.memory_mb - 500  # nothing is drawn
    (fp32,) = plan_run(manifest({"train": train | {"mixed_precision": "no"}, **plain}), large).packs
    assert fp32.memory_mb > bare.memory_mb + 2 * 1_066


def test_subjects_that_differ_only_in_their_own_settings_share_a_pack(base: Outline) -> None:
    plan = plan_run(manifest({}, {"lora": {"rank": 4}}, {"train": {"max_steps": 5, "batch_size": 2}}), base)
    assert [pack.subjects for pack in plan.packs] == [("s0", "s1", "s2")]
    assert plan.packs[0].rank == 8
    assert plan.packs[0].slots == 3


def test_what_cannot_share_a_forward_does_not(base: Outline) -> None:
    plan = plan_run(manifest({}, {"train": {"resolution": 32}}, {"lora": {"targets": ["to_q"]}}), base)
    assert len(plan.packs) == 3


def test_one_of_many_rows_takes_no_slots_from_those_of_few(base: Outline) -> None:
    few: list[dict[str, object]] = [{}, {"prior": {"enabled": False}}, {"train": {"batch_size": 2}}] * 4
    many: dict[str, object] = {"train": {"batch_size": 16}}
    plan = plan_run(manifest(*few, many, many), base)
    assert [(len(pack.subjects), pack.slots, pack.rows) for pack in plan.packs] == [(12, 8, 4), (2, 1, 32)]


def test_lanes_split_a_group_evenly_and_slots_are_bounded(base: Outline) -> None:
    plan = plan_run(manifest(*[{}] * 50), base, lanes=4, max_rows=16)
    assert sorted(len(pack.subjects) for pack in plan.packs) == [12, 12, 13, 13]
    assert {pack.slots for pack in plan.packs} == {8}


def test_the_adapters_size_is_known_beforehand(base: Outline, tiny: Base) -> None:
    one = subject("a", lora={"rank": 4})
    sites = {
        "unet": find_sites("unet", tiny.denoiser, one.spec.lora.targets),
        "text_encoder": find_sites("text_encoder", clip(tiny), one.spec.lora.text_encoder_targets),
    }
    bank = Bank(sites, slots=1, rank=4)
    assert adapter_parameters(one.spec, base) == bank.weights_SP.shape[1]
    assert len(sites["text_encoder"]) == 8


def test_a_target_that_no_layer_has_is_found(base: Outline) -> None:
    one = subject("a", lora={"targets": ["to_q", "to_kk"], "text_encoder": False})
    assert unmatched_targets(one.spec, base) == ["to_kk"]


def test_a_subject_over_several_devices_has_a_pack_of_its_kind(base: Outline) -> None:
    zero = {"strategy": "zero", "batch_size": 4, "zero": {"workers": 4, "stage": 3}}
    plan = plan_run(manifest({"train": zero}, {}, {"train": zero}), base)
    spread, plain = plan.packs
    assert (spread.subjects, spread.slots, spread.workers) == (("s0", "s2"), 1, 4)
    assert (plain.subjects, plain.workers) == (("s1",), 1)
    one = plan_run(manifest({"train": {"batch_size": 4}}), base).packs[0]
    assert spread.memory_mb < one.memory_mb and spread.state_bytes == one.state_bytes


def test_what_may_be_spread_has_a_gang_in_reserve(base: Outline) -> None:
    found = manifest(
        {"train": {"batch_size": 2}},
        {},  # one row cannot be shared
        {"train": {"batch_size": 2, "strategy": "plain"}},
        {"train": {"batch_size": 2, "optimizer": "prodigy"}},
        {"train": {"batch_size": 6, "zero": {"workers": 3}}},
        {"train": {"batch_size": 5}, "lora": {"rank": 16}},
    )
    assert [pack.subjects for pack in plan_run(found, base).packs] == [("s0", "s1", "s2", "s3"), ("s4", "s5")]
    two, three = reserve(found, base)
    assert (two.subjects, two.workers, two.slots, two.rows, two.rank) == (("s0", "s5"), 2, 1, 10, 16)
    assert (three.subjects, three.workers) == (("s4",), 3)
