"""Planning: who shares a pack, and sizes that hold to the byte."""

from pathlib import Path

import pytest
import yaml

from training.adapters.bank import Bank, find_sites
from training.base.base import Base
from training.manifest.manifest import Manifest, parse_manifest
from training.manifest.plan import BaseFacts, adapter_parameters, base_facts, plan_run, reserve, unmatched_targets

from .subjects import subject


@pytest.fixture(scope="module")
def facts(tiny_folder: Path) -> BaseFacts:
    return base_facts(str(tiny_folder))


def manifest(*subjects: dict[str, object]) -> Manifest:
    entries = [{"id": f"s{i}", "images": "x", "class": "dog", **entry} for i, entry in enumerate(subjects)]
    return parse_manifest(yaml.safe_dump({"version": 1, "name": "plan", "subjects": entries}))


def test_facts_come_from_headers_alone(facts: BaseFacts, tiny: Base) -> None:
    assert facts.resolution == tiny.resolution == 16
    assert facts.parameters == sum(p.numel() for m in (tiny.unet, tiny.text_encoder, tiny.vae) for p in m.parameters())


def test_memory_is_all_that_a_worker_holds(facts: BaseFacts) -> None:
    """With the sizes of SD 1.5 at 256 px in bf16 a worker of two subjects was measured to hold 5.03 GB."""
    sizes = {"parameters": 1_066_000_000, "width": 320, "vae_width": 128, "latent_side": 64, "resolution": 512}
    large = facts.model_copy(update=sizes)
    train = {"resolution": 256, "mixed_precision": "bf16"}
    (usual,) = plan_run(manifest({"train": train}, {"train": train}), large).packs
    assert usual.memory_mb == pytest.approx(5_030, rel=0.05)
    plain: dict[str, object] = {"evaluate": {"enabled": False}, "prior": {"enabled": False}, "samples": {"images": 0}}
    (bare,) = plan_run(manifest({"train": train, **plain}), large).packs
    assert 2 * 1_066 + bare.state_bytes / 1e6 < bare.memory_mb < usual.memory_mb - 500  # nothing is drawn
    (wide,) = plan_run(manifest({"train": train | {"mixed_precision": "no"}, **plain}), large).packs
    assert wide.memory_mb > bare.memory_mb + 2 * 1_066


def test_subjects_that_differ_only_in_their_own_settings_share_a_pack(facts: BaseFacts) -> None:
    plan = plan_run(manifest({}, {"lora": {"rank": 4}}, {"train": {"max_steps": 5, "batch_size": 2}}), facts)
    assert [pack.subjects for pack in plan.packs] == [("s0", "s1", "s2")]
    assert plan.packs[0].rank == 8
    assert plan.packs[0].slots == 3


def test_what_cannot_share_a_forward_does_not(facts: BaseFacts) -> None:
    plan = plan_run(manifest({}, {"train": {"resolution": 32}}, {"lora": {"targets": ["to_q"]}}), facts)
    assert len(plan.packs) == 3


def test_one_of_many_rows_takes_no_slots_from_those_of_few(facts: BaseFacts) -> None:
    few: list[dict[str, object]] = [{}, {"prior": {"enabled": False}}, {"train": {"batch_size": 2}}] * 4
    many: dict[str, object] = {"train": {"batch_size": 16}}
    plan = plan_run(manifest(*few, many, many), facts)
    assert [(len(pack.subjects), pack.slots, pack.rows) for pack in plan.packs] == [(12, 8, 4), (2, 1, 32)]


def test_lanes_split_a_group_evenly_and_slots_are_bounded(facts: BaseFacts) -> None:
    plan = plan_run(manifest(*[{}] * 50), facts, lanes=4, max_rows=16)
    assert sorted(len(pack.subjects) for pack in plan.packs) == [12, 12, 13, 13]
    assert {pack.slots for pack in plan.packs} == {8}


def test_the_adapters_size_is_known_beforehand(facts: BaseFacts, tiny: Base) -> None:
    one = subject("a", lora={"rank": 4})
    sites = {
        "unet": find_sites("unet", tiny.unet, one.spec.lora.targets),
        "text_encoder": find_sites("text_encoder", tiny.text_encoder, one.spec.lora.text_encoder_targets),
    }
    bank = Bank(sites, slots=1, rank=4)
    assert adapter_parameters(one.spec, facts) == bank.weights_SP.shape[1]
    assert len(sites["text_encoder"]) == 8


def test_a_target_that_no_layer_has_is_found(facts: BaseFacts) -> None:
    one = subject("a", lora={"targets": ["to_q", "to_kk"], "text_encoder": False})
    assert unmatched_targets(one.spec, facts) == ["to_kk"]


def test_a_subject_over_several_devices_has_a_pack_of_its_kind(facts: BaseFacts) -> None:
    zero = {"strategy": "zero", "batch_size": 4, "zero": {"workers": 4, "stage": 3}}
    plan = plan_run(manifest({"train": zero}, {}, {"train": zero}), facts)
    spread, plain = plan.packs
    assert (spread.subjects, spread.slots, spread.workers) == (("s0", "s2"), 1, 4)
    assert (plain.subjects, plain.workers) == (("s1",), 1)
    one = plan_run(manifest({"train": {"batch_size": 4}}), facts).packs[0]
    assert spread.memory_mb < one.memory_mb and spread.state_bytes == one.state_bytes


def test_what_may_be_spread_has_a_gang_in_reserve(facts: BaseFacts) -> None:
    found = manifest(
        {"train": {"batch_size": 2}},
        {},  # one row cannot be shared
        {"train": {"batch_size": 2, "strategy": "plain"}},
        {"train": {"batch_size": 2, "optimizer": "prodigy"}},
        {"train": {"batch_size": 6, "zero": {"workers": 3}}},
        {"train": {"batch_size": 5}, "lora": {"rank": 16}},
    )
    assert [pack.subjects for pack in plan_run(found, facts).packs] == [("s0", "s1", "s2", "s3"), ("s4", "s5")]
    two, three = reserve(found, facts)
    assert (two.subjects, two.workers, two.slots, two.rows, two.rank) == (("s0", "s5"), 2, 1, 10, 16)
    assert (three.subjects, three.workers) == (("s4",), 3)
