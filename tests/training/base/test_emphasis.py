"""Weighted phrases: their tokens' states are multiplied and the mean restored; weight 1 is the plain prompt."""

import pytest
import torch
from torch import Tensor

from tests.families import write_family
from tests.tiny import clip, clip_tokenizer, states
from training.base.base import Base, load_base
from training.base.families.clip import NO_MEAN, emphasised
from training.base.wording import Phrase, Phrases
from training.base.words import count_chunks


def test_weights_multiply_and_the_mean_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    states_NLC = torch.randn(3, 5, 4, generator=generator) + torch.tensor([0.5, 0.5, 0.0]).view(3, 1, 1)
    states_NLC[2] -= states_NLC[2].mean()  # a mean of nothing
    weights_NL = torch.tensor([[1, 1.5, 1, 0.5, 1], [1.0] * 5, [1, 2.0, 1, 1, 1]])
    found = emphasised(states_NLC, weights_NL)
    times = states_NLC[0].double() * weights_NL[0].double()[:, None]
    expected = times * (states_NLC[0].double().mean() / times.mean())
    assert torch.allclose(found[0].double(), expected, atol=1e-6)
    assert float(found[0].mean()) == pytest.approx(float(states_NLC[0].mean()), abs=1e-6)
    assert torch.equal(found[1], states_NLC[1])
    assert torch.equal(found[2], states_NLC[2] * weights_NL[2][:, None]) and NO_MEAN > 0
    assert emphasised(states_NLC, None) is states_NLC


def test_a_weighted_phrase_is_that_calculation_on_the_plain_prompts_states(tiny: Base) -> None:
    """Positions are the plain prompt's: start, a, red, dog, on, the, beach."""
    with torch.no_grad():
        plain = states(tiny, ["a red dog on the beach"])
        weighted = states(tiny, [Phrases((Phrase("a "), Phrase("red dog", 1.5), Phrase(" on the beach")))])
        neighbour = states(tiny, ["a red dog on the beach", Phrases((Phrase("a cat", 0.5),))])
    weights_NL = torch.ones(1, plain.shape[1])
    weights_NL[0, 2:4] = 1.5
    assert torch.equal(weighted, emphasised(plain, weights_NL)) and not torch.equal(weighted, plain)
    assert torch.allclose(neighbour[0], plain[0], atol=1e-6)


def test_weight_one_is_the_plain_prompt_to_the_bit(tiny: Base) -> None:
    with torch.no_grad():
        cut = states(tiny, [Phrases((Phrase("a "), Phrase("red"), Phrase(" dog")))])
        assert torch.equal(cut, states(tiny, ["a red dog"]))


def test_a_phrase_that_opens_begins_a_chunk(tiny: Base) -> None:
    """Its chunk is what the phrase alone is encoded to."""
    broken = Phrases((Phrase("a red dog"), Phrase("in the snow", opens=True)))
    assert count_chunks(clip_tokenizer(tiny), broken, {}) == 2
    with torch.no_grad():
        (found,) = tiny.encode([broken], chunks=2)
        first, second = tiny.encode(["a red dog", "in the snow"])
    assert torch.allclose(found["states"], torch.cat([first["states"], second["states"]]), atol=1e-5)
    assert clip(tiny).config.hidden_size == found["states"].shape[1]


def test_each_encoder_of_sdxl_by_itself_and_pooled_without(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = load_base(str(write_family("sdxl", tmp_path_factory.mktemp("xl"))), device="cpu")
    with torch.no_grad():
        plain, weighted = base.encode(["a red dog", Phrases((Phrase("a "), Phrase("red", 1.3), Phrase(" dog")))])
    weights_NL = torch.ones(1, plain["states"].shape[0])
    weights_NL[0, 2] = 1.3
    widths = list(base.facts.word_widths)
    halves: list[Tensor] = [emphasised(part[None], weights_NL)[0] for part in plain["states"].split(widths, dim=1)]
    assert torch.allclose(weighted["states"], torch.cat(halves, dim=1), atol=1e-6)
    assert torch.allclose(weighted["pooled"], plain["pooled"], atol=1e-6)
