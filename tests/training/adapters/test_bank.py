"""The bank: law 1, and that a row wears exactly what its route says."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor

from tests.tiny import clip
from training.adapters.adapter import Adapter, LowRank
from training.adapters.bank import Bank
from training.adapters.layout import Layout, Site, find_sites
from training.base.base import Base
from training.errors import UserError

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
EVERYTHING = (*TARGETS, "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj", "ff.net.0.proj", "ff.net.2", "conv")


def make_bank(base: Base, targets: tuple[str, ...] = TARGETS, slots: int = 4, rank: int = 4) -> Bank:
    sites = {
        "unet": find_sites("unet", base.denoiser, targets),
        "text_encoder": find_sites("text_encoder", clip(base), ("q_proj", "v_proj")),
    }
    return Bank(sites, slots=slots, rank=rank, dtype=base.dtype)


def random_adapter(bank: Bank, rank: int, seed: int, only: str = "") -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for found in bank.sites.values():
        for site in found:
            if only in site.key:
                down = torch.randn(rank, *site.down, generator=generator, dtype=torch.float64) * 0.2
                up = torch.randn(site.out, rank, *(1,) * (len(site.down) - 1), generator=generator, dtype=torch.float64)
                modules[site.key] = LowRank(down, up * 0.2)
    return Adapter(modules=modules)


def inputs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 4, 8, 8, generator=generator, dtype=torch.float64)
    embeddings = torch.randn(rows, 16, 32, generator=generator, dtype=torch.float64)
    return latents, torch.randint(0, 1000, (rows,), generator=generator), embeddings


def forward(base: Base, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    latents, timesteps, embeddings = rows
    with torch.no_grad():
        return base.denoiser(latents, timesteps, encoder_hidden_states=embeddings).sample


@pytest.fixture
def bank(tiny64: Base) -> Iterator[Bank]:
    made = make_bank(tiny64, EVERYTHING)
    made.inject()
    yield made
    made.eject()


def test_inject_then_eject_leaves_the_base_bit_exact(tiny64: Base) -> None:
    rows = inputs(3)
    before, weights = forward(tiny64, rows), copy.deepcopy(tiny64.denoiser.state_dict())
    bank = make_bank(tiny64, EVERYTHING)
    bank.inject()
    bank.put(0, bank.pack(random_adapter(bank, 4, seed=1)))
    with bank.using(bank.route("unet", torch.zeros(3, 1, dtype=torch.int64))):
        assert not torch.equal(forward(tiny64, rows), before)
    assert torch.equal(forward(tiny64, rows), before)
    bank.eject()
    assert torch.equal(forward(tiny64, rows), before)
    assert all(not module._forward_hooks for module in tiny64.denoiser.modules())
    after = tiny64.denoiser.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_each_row_wears_its_own_adapter_and_no_other(tiny64: Base, bank: Bank) -> None:
    for slot in range(3):
        bank.put(slot, bank.pack(random_adapter(bank, slot + 2, seed=slot)))
    rows = inputs(4)
    worn = torch.tensor([[2], [0], [-1], [1]])
    with bank.using(bank.route("unet", worn)):
        together = forward(tiny64, rows)
    for row, slot in enumerate(worn[:, 0].tolist()):
        alone = (rows[0][row : row + 1], rows[1][row : row + 1], rows[2][row : row + 1])
        with bank.using(bank.route("unet", torch.tensor([[slot]]))):
            expected = forward(tiny64, alone)
        assert (together[row] - expected[0]).abs().max() < 1e-10
    assert (together[2] - forward(tiny64, rows)[2]).abs().max() < 1e-10
    assert (together[0] - forward(tiny64, rows)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("worn", [[0, 0, 1, 1, 2, 2, 3, 3], [2, 2, 2, 1, 1, 1], [1, 1, 1], [-1, -1, 0, 0], [3, 3, 0]])
def test_neighbouring_rows_that_wear_the_same_share_a_delta(tiny64: Base, bank: Bank, worn: list[int]) -> None:
    for slot in range(4):
        bank.put(slot, bank.pack(random_adapter(bank, 4, seed=slot)))
    rows = inputs(len(worn))
    with bank.using(bank.route("unet", torch.tensor(worn)[:, None])):
        together = forward(tiny64, rows)
    for row, slot in enumerate(worn):
        alone = (rows[0][row : row + 1], rows[1][row : row + 1], rows[2][row : row + 1])
        with bank.using(bank.route("unet", torch.tensor([[slot]]))):
            assert (together[row] - forward(tiny64, alone)[0]).abs().max() < 1e-10


def test_a_row_can_mix_adapters_with_weights(tiny64: Base, bank: Bank) -> None:
    first, second = random_adapter(bank, 3, seed=1), random_adapter(bank, 2, seed=2)
    bank.put(0, bank.pack(first))
    bank.put(1, bank.pack(second))
    mixed = {}
    for key, low in first.modules.items():
        other = second.modules[key]
        mixed[key] = LowRank(torch.cat([low.down, other.down]), torch.cat([0.7 * low.up, -0.3 * other.up], dim=1))
    wide = make_bank(tiny64, EVERYTHING, slots=1, rank=5)
    rows = inputs(1)
    with bank.using(bank.route("unet", torch.tensor([[0, 1]]), torch.tensor([[0.7, -0.3]], dtype=torch.float64))):
        together = forward(tiny64, rows)
    wide.inject()
    wide.put(0, wide.pack(Adapter(modules=mixed)))
    with wide.using(wide.route("unet", torch.tensor([[0]]))):
        expected = forward(tiny64, rows)
    wide.eject()
    assert (together - expected).abs().max() < 1e-10


def test_a_slot_equals_peft(tiny64: Base) -> None:
    """PEFT's own layers, with the same numbers, give the same output: the bank's semantics are the field's."""
    unet = copy.deepcopy(tiny64.denoiser)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=[*TARGETS, "conv1", "proj_in"], init_lora_weights=False)
    inject_adapter_in_model(config, unet)
    state = get_peft_model_state_dict(unet)
    adapter = Adapter(
        modules={
            f"unet.{name.removesuffix('.lora_A.weight')}": LowRank(down, state[name.replace("lora_A", "lora_B")] * 1.5)
            for name, down in state.items()
            if name.endswith("lora_A.weight")
        }
    )
    bank = make_bank(tiny64, (*TARGETS, "conv1", "proj_in"))
    bank.inject()
    bank.put(1, bank.pack(adapter))
    rows = inputs(2)
    with bank.using(bank.route("unet", torch.tensor([[1], [1]]))), torch.no_grad():
        ours = forward(tiny64, rows)
        theirs = unet(rows[0], rows[1], encoder_hidden_states=rows[2]).sample
    bank.eject()
    assert (ours - theirs).abs().max() < 1e-10


def test_pack_and_unpack_are_inverse(bank: Bank) -> None:
    adapter = random_adapter(bank, 3, seed=5, only="attn1")
    bank.put(2, bank.pack(adapter))
    back = bank.unpack(bank.take(2), rank=3)
    assert back.modules.keys() == adapter.modules.keys()
    for key, low in adapter.modules.items():
        assert torch.equal(back.modules[key].down, low.down)
        assert torch.equal(back.modules[key].up, low.up)


def test_a_cleared_slot_is_the_base(tiny64: Base, bank: Bank) -> None:
    bank.put(0, bank.pack(random_adapter(bank, 4, seed=1)))
    bank.clear(0)
    rows = inputs(1)
    with bank.using(bank.route("unet", torch.tensor([[0]]))):
        assert torch.equal(forward(tiny64, rows), forward(tiny64, rows))
    assert not bank.unpack(bank.take(0)).modules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.modules.update({"unet.nowhere": next(iter(a.modules.values()))}), "unet.nowhere"),
        (lambda a: a.modules.update({k: LowRank(v.down[:, :3], v.up) for k, v in a.modules.items()}), "has shapes"),
    ],
)
def test_what_does_not_fit_is_named(bank: Bank, change: Callable[[Adapter], None], message: str) -> None:
    adapter = random_adapter(bank, 2, seed=0, only="to_q")
    change(adapter)
    with pytest.raises(UserError, match=message):
        bank.pack(adapter)


def test_a_rank_above_the_banks_is_named(bank: Bank) -> None:
    with pytest.raises(UserError, match="rank <= 4"):
        bank.pack(random_adapter(bank, 5, seed=0))


@pytest.mark.parametrize("slot", [-1, 4])
def test_a_slot_that_is_not_there_is_refused(bank: Bank, slot: int) -> None:
    row = bank.pack(random_adapter(bank, 4, seed=1))
    calls: list[Callable[[], object]] = [
        lambda: bank.words(slot),
        lambda: bank.take(slot),
        lambda: bank.clear(slot),
        lambda: bank.put(slot, row),
    ]
    for call in calls:
        with pytest.raises(IndexError, match=f"slot {slot} is none of this bank's, which are 0 to 3"):
            call()


# -- growth --


def wide_sites(base: Base) -> dict[str, tuple[Site, ...]]:
    """All layers of the base, the components' order turned round."""
    found = {name: find_sites(name, model, (*EVERYTHING, "q_proj", "fc1")) for name, model in base.models.items()}
    return dict(reversed(found.items()))


def test_a_bank_that_grows_keeps_what_is_worn_bit_for_bit(tiny64: Base) -> None:
    bank, rows, worn = make_bank(tiny64), inputs(2), torch.tensor([[0], [2]])
    bank.inject()
    low, high = random_adapter(bank, 2, seed=1), random_adapter(bank, 4, seed=2)
    bank.put(0, bank.pack(low))
    bank.put(2, bank.pack(high))
    route = bank.route("unet", worn)
    with bank.using(route):
        before = forward(tiny64, rows)
    narrow = bank.weights_SP.nbytes
    assert bank.cover(wide_sites(tiny64)) and bank.weights_SP.nbytes > narrow
    assert not bank.cover(wide_sites(tiny64))  # it covers them already
    for one in (route, bank.route("unet", worn)):
        with bank.using(one):
            assert torch.equal(forward(tiny64, rows), before)
    for slot, adapter in ((0, low), (2, high)):
        found = bank.unpack(bank.take(slot)).modules
        assert found.keys() == adapter.modules.keys()
        assert all(torch.equal(a, b) for key in found for a, b in zip(found[key], adapter.modules[key], strict=True))
    bank.eject()
    assert all(not module._forward_hooks for model in tiny64.models.values() for module in model.modules())


def test_a_grown_bank_equals_one_that_was_as_wide_from_the_start(tiny64: Base) -> None:
    wide, grown, rows = make_bank(tiny64, EVERYTHING), make_bank(tiny64), inputs(3)
    adapters = [random_adapter(grown, 3, seed=1), random_adapter(wide, 4, seed=2), random_adapter(wide, 2, seed=3)]
    old_row = grown.pack(adapters[0])
    grown.inject()
    grown.cover(wide_sites(tiny64))
    grown.put(1, grown.pack(adapters[2]))
    grown.put(1, old_row)  # of the older layout, over an adapter that wore more
    grown.put(0, wide.layout.pack(adapters[1], torch.float64))  # of another bank's layout, in another order
    own = wide.layout.only(adapters[2].modules.keys() - set(list(adapters[2].modules)[1::2]))  # every other layer
    adapters[2] = Adapter({key: low for key, low in adapters[2].modules.items() if key in places(own)})
    grown.put(2, own.pack(adapters[2], torch.float64))
    with grown.using(grown.route("unet", torch.tensor([[1], [0], [2]]))):
        found = forward(tiny64, rows)
    grown.eject()
    wide.inject()
    for slot, adapter in enumerate(adapters):
        wide.put(slot, wide.pack(adapter))
    with wide.using(wide.route("unet", torch.tensor([[0], [1], [2]]))):
        expected = forward(tiny64, rows)
    wide.eject()
    assert (found - expected).abs().max() < 1e-10
    assert all((expected[row] - forward(tiny64, rows)[row]).abs().max() > 1e-3 for row in range(3))


def places(layout: Layout) -> set[str]:
    return {site.key for found in layout.sites.values() for site in found}


def test_a_row_over_a_layer_that_the_bank_lacks_is_refused(tiny64: Base, bank: Bank) -> None:
    narrow = make_bank(tiny64)
    narrow.put(0, narrow.pack(random_adapter(narrow, 2, seed=1)))
    before = narrow.weights_SP.clone()
    with pytest.raises(KeyError, match="conv"):
        narrow.put(0, bank.pack(random_adapter(bank, 4, seed=2)))
    assert torch.equal(narrow.weights_SP, before)


def test_a_bank_that_is_trained_does_not_grow(tiny64: Base) -> None:
    bank = make_bank(tiny64)
    bank.weights_SP.requires_grad_(True)
    with pytest.raises(ValueError, match="trained"):
        bank.cover(wide_sites(tiny64))
