"""Textual-inversion words: they stand where they are written, they train, and they travel with the adapter."""

import pytest
import torch

from tests.tiny import clip, clip_tokenizer, states
from tests.training.subjects import subject
from tests.training.trainer.test_pack import run
from training.adapters.adapter import Adapter, load_adapter, save_adapter
from training.adapters.bank import Bank
from training.base.base import Base
from training.base.words import count_chunks, first_vector, tokenise
from training.errors import UserError
from training.sampling.render import adapter_bank
from training.sampling.sampler import sample

WORD = {"tokens": ["<s1>"], "learning_rate": 1e-2, "initial": "cat"}


def test_a_prompt_without_words_is_tokenised_as_ever(tiny: Base) -> None:
    prompts = ["a photo of sks dog", "", "a dog on the beach in the snow on the grass on the water in the snow"]
    expected = clip_tokenizer(tiny)(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    assert torch.equal(tokenise(clip_tokenizer(tiny), prompts, [{}] * 3).ids, expected.input_ids)


def test_a_word_that_is_a_known_words_vector_is_that_word(tiny: Base) -> None:
    """The strongest check of places: `<s1>` with the vector of `dog` draws what `dog` draws."""
    vector = first_vector(clip_tokenizer(tiny), clip(tiny).get_input_embeddings(), "dog")[None]
    with torch.no_grad():
        word = states(tiny, ["a photo of <s1> on the beach"], [{"<s1>": vector}])
        plain = states(tiny, ["a photo of dog on the beach"])
    assert torch.equal(word, plain)


def test_a_prompt_is_cut_into_chunks_and_nothing_is_lost(tiny: Base) -> None:
    """Each chunk has the marks of start and end; together they hold every token once, in order."""
    prompt = "a dog on the beach in the snow on the grass on the water in the snow of the red toy"
    tokenizer = clip_tokenizer(tiny)
    assert [count_chunks(tokenizer, text, {}) for text in ("", "dog " * 14, "dog " * 15, prompt)] == [1, 1, 2, 2]
    rows = [tokenise(tokenizer, [prompt], [{}], chunk).ids[0].tolist() for chunk in range(3)]
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in rows)
    content = [token for row in rows for token in row[1:-1] if token != tokenizer.eos_token_id]
    assert content == tokenizer(prompt, add_special_tokens=False).input_ids
    assert rows[2] == tokenizer("", padding="max_length").input_ids


def test_a_trained_word_is_not_split_over_chunks(tiny: Base) -> None:
    words = {"<s1>": torch.randn(3, 32)}
    for before, at in ((11, (0, 12)), (12, (1, 1)), (14, (1, 1))):
        prompt = "dog " * before + "<s1> cat"
        places = [tokenise(clip_tokenizer(tiny), [prompt], [words], chunk).places[0] for chunk in range(2)]
        chunk, first = at
        assert [place for place, _ in places[chunk]] == [first, first + 1, first + 2] and not places[1 - chunk]


def test_a_word_belongs_to_its_own_row(tiny: Base) -> None:
    one, two = torch.randn(2, 1, 32)
    with torch.no_grad():
        together = states(tiny, ["a <s1> dog", "a <s1> dog"], [{"<s1>": one}, {"<s1>": two}])
        alone = states(tiny, ["a <s1> dog"], [{"<s1>": two}])
    assert torch.allclose(together[1], alone[0], atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_a_word_trains_without_touching_the_base(tiny64: Base) -> None:
    before = clip(tiny64).get_input_embeddings().weight.clone()
    start = first_vector(clip_tokenizer(tiny64), clip(tiny64).get_input_embeddings(), "cat")
    one = subject("a", words=WORD, instance_prompt="a photo of <s1> dog", lora={"text_encoder": False})
    learned = run(tiny64, [one]).adapters["a"].embeddings["<s1>"]
    assert (learned[0] - start).abs().max() > 1e-3
    assert torch.equal(clip(tiny64).get_input_embeddings().weight, before)


def test_words_travel_in_the_adapters_file(tiny: Base) -> None:
    one = subject("a", words=WORD, instance_prompt="a photo of <s1> dog")
    adapter = run(tiny, [one]).adapters["a"]
    back = load_adapter(save_adapter(adapter))
    assert torch.allclose(back.embeddings["<s1>"], adapter.embeddings["<s1>"].half(), atol=0)


def test_too_many_words_are_refused(tiny: Base) -> None:
    bank = Bank({}, slots=1, rank=1, vectors=(1, 32))
    one = subject("a", words={"tokens": ["<s1>", "<s2>"]}, instance_prompt="<s1> <s2> dog")
    adapter = run(tiny, [one]).adapters["a"]
    adapter.modules.clear()
    with pytest.raises(UserError, match="2 vectors; here a slot holds 1"):
        bank.pack(adapter)


def test_words_are_worn_where_adapters_are_looked_at(tiny: Base) -> None:
    """A bank made for looking holds words of several vectors, and its pictures follow them."""
    one = subject("a", words=WORD, instance_prompt="a photo of <s1> dog")
    adapter = run(tiny, [one]).adapters["a"]
    loud = Adapter(adapter.modules, {"<s1>": torch.randn(2, 32) * 3})
    drawn = []
    for shown in (adapter, loud):
        bank = adapter_bank(tiny, [shown])
        bank.inject()
        drawn.append(sample(tiny, ["a photo of <s1> dog"], seeds=[1], steps=2, bank=bank, slots=[0], scales=[1.0]))
        bank.eject()
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4


def test_a_row_that_wears_nothing_has_nobodys_words(tiny: Base) -> None:
    """Slot -1 is no slot: the last slot's words are not read by the base's own rows."""
    one = subject("a", words=WORD, instance_prompt="a photo of <s1> dog")
    bank = adapter_bank(tiny, [run(tiny, [one]).adapters["a"]])
    plain = sample(tiny, ["a photo of <s1> dog"], seeds=[1], steps=1)
    bank.inject()
    bare = sample(tiny, ["a photo of <s1> dog"], seeds=[1], steps=1, bank=bank, slots=[-1], scales=[1.0])
    bank.eject()
    assert torch.equal(bare, plain)
