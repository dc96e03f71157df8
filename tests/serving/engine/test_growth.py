"""The engine's bank lies over the layers that adapters in slots change, and grows while others run."""

import pytest
import torch
from torch import Tensor

from serving.engine.engine import Engine
from serving.engine.job import Sample
from serving.errors import AdapterUnavailable
from tests.serving.company import ATTENTION, WIDE, Shelf, ask, finished, random_adapter, ref, run, small
from training.adapters.bank import Bank
from training.adapters.layout import find_sites
from training.base.base import Base


@pytest.fixture(scope="module")
def shelf(tiny: Base) -> Shelf:
    return Shelf(
        {
            ref("cat"): random_adapter(tiny, 1),
            ref("plain"): random_adapter(tiny, 2, text=False),
            ref("wide"): random_adapter(tiny, 3, rank=8, targets=WIDE),
        }
    )


def test_slots_are_as_wide_as_what_is_worn(tiny: Base, shelf: Shelf) -> None:
    facts, spec = tiny.facts, small()
    engine = Engine(tiny, spec, shelf)
    held: list[int] = []
    for name in (None, "plain", "cat", "wide", "plain"):
        finished(engine, [ask(*([name] if name else []))])
        held.append(int(engine.snapshot().gauges["slots_bytes"]))
    every = {"unet": find_sites("unet", tiny.denoiser, facts.layers)}
    every["text_encoder"] = find_sites("text_encoder", tiny.models["text_encoder"], facts.text_layers)
    words = (spec.words, facts.word_width)
    empty, whole = (Bank(sites, slots=spec.slots + 1, rank=spec.rank, vectors=words) for sites in ({}, every))
    attention = find_sites("unet", tiny.denoiser, ATTENTION)
    per_slot = sum(site.size(spec.rank) for site in attention) * tiny.dtype.itemsize
    assert held[0] == empty.weights_SP.nbytes
    assert held[1] == held[0] + (spec.slots + 1) * per_slot
    assert held[1] < held[2] < held[3] == held[4] < whole.weights_SP.nbytes
    assert held[1] < whole.weights_SP.nbytes / 4
    engine.close()


def latents(engine: Engine, late: str | None) -> tuple[Tensor, Tensor | None, list[int]]:
    """Of `cat`, and of `late`, which comes while `cat` runs; and the bank's bytes after each step."""
    first = engine.submit(ask("cat", steps=8, count=2))
    samples, held = list(first.samples), list[int]()
    joined: list[Sample] = []

    def join(step: int) -> None:
        held.append(engine.adapters.bank.weights_SP.nbytes)
        if late is not None and samples[0].step == 3 and not joined:
            joined.extend(engine.submit(ask(late)).samples)

    run(engine, [first], between=join)
    run(engine, [sample.job for sample in joined if not sample.job.over])
    ends = [torch.stack([s.latents for s in found if s.latents is not None]) for found in (samples, joined) if found]
    return ends[0], ends[1] if joined else None, held


@pytest.mark.parametrize("fixed_rows", [True, False])
def test_a_request_in_flight_is_not_changed_by_growth(tiny: Base, shelf: Shelf, fixed_rows: bool) -> None:
    """Law 4; where every forward has the same number of rows, bit for bit."""
    spec = small(fixed_rows=fixed_rows, max_rows=8)
    engine = Engine(tiny, spec, shelf)
    alone, _, _ = latents(engine, None)
    engine.close()
    engine = Engine(tiny, spec, shelf)
    (expected,) = finished(engine, [ask("wide")])
    engine.close()
    engine = Engine(tiny, spec, shelf)
    found, joined, held = latents(engine, "wide")
    engine.close()
    assert joined is not None and len(set(held)) == 3  # empty, for `cat`, for `wide`
    if fixed_rows:
        assert torch.equal(found, alone) and torch.equal(joined, expected)
    for one, other in ((found, alone), (joined, expected)):
        assert float((one - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max()))


def test_growth_without_memory_fails_only_who_asks_for_it(
    tiny: Base, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny, small(), shelf)
    (expected,) = finished(engine, [ask("cat", steps=6)])
    cover = engine.adapters.bank.cover

    def short(sites: object) -> bool:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(engine.adapters.bank, "cover", short)
    bad, good = engine.submit(ask("plain", "wide")), engine.submit(ask("cat", steps=6))
    samples = list(good.samples)
    end = run(engine, [bad, good])[bad]
    assert isinstance(end, AdapterUnavailable) and "no memory left" in str(end) and "--slots" in str(end)
    assert samples[0].latents is not None and float((samples[0].latents - expected[0]).abs().max()) <= 1e-5
    assert engine.adapters.slots.loaded() == (ref("cat"),) and engine.adapters.slots.pinned == 0
    monkeypatch.setattr(engine.adapters.bank, "cover", cover)
    finished(engine, [ask("wide")])  # nothing of the failure is remembered
    engine.close()
