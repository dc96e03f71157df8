"""The transformer base's recipe: words are tokens, pairs depend on their seed, its attention is diffusers' own, and
what it exports is read by plain diffusers and by us."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

from tools.pocket import caption, snapshot, vae
from tools.pocket.composite import NO_COLOUR, Labels
from tools.pocket.dit import export, pairs, train, words
from tools.pocket.dit.model import PocketDit
from tools.pocket.drawings import CLASSES
from tools.pocket.places import PLACE_NAMES
from tools.pocket.recipe import BASE
from training.base.base import load_base
from training.base.stream import stream
from training.sampling.sampler import sample


def asked(text: str) -> list[int]:
    tokenizer = words.build()
    message = [{"role": "user", "content": text}]
    ids: list[int] = tokenizer(tokenizer.apply_chat_template(message, tokenize=False)).input_ids
    return ids


def pair(rng: np.random.Generator) -> pairs.Pair:
    place = int(rng.integers(len(PLACE_NAMES)))
    left, right = (
        Labels(noun=int(noun), place=place, colour=NO_COLOUR, style=0)
        for noun in rng.choice(len(CLASSES), 2, replace=False)
    )
    return pairs.Pair(left, right)


def test_every_word_is_one_token_and_captions_encode_as_the_tokenizer_does() -> None:
    tokenizer, rng = words.build(), np.random.default_rng(0)
    assert [word for word in caption.words() if len(tokenizer.tokenize(f" {word}")) != 1] == []
    texts = ["", *(pairs.caption(pair(rng), rng) for _ in range(100))]
    assert all(asked(text) == words.encode(text) for text in texts)
    assert max(len(words.encode(text)) for text in texts) <= train.LONGEST


def test_a_pair_is_named_from_left_to_right() -> None:
    made = pairs.Pair(*(Labels(noun=noun, place=0, colour=NO_COLOUR, style=0) for noun in (3, 5)))
    assert pairs.unpack(np.asarray(pairs._row(made), np.uint8)) == made
    for seed in range(20):
        text = pairs.caption(made, np.random.default_rng(seed))
        assert text.index(CLASSES[3]) < text.index(" and ") < text.index(CLASSES[5])


def test_the_plain_attention_is_diffusers_own() -> None:
    transformer = PocketDit().transformer.eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        x = [torch.randn(8, 1, 16, 16) for _ in range(2)]
        states = [torch.randn(length, 128) for length in (7, 40)]  # padded to 32 and 64 tokens: a mask is needed
        ours = transformer(x, torch.tensor([0.2, 0.7]), states).sample
        for module in transformer.modules():
            if hasattr(module, "to_q"):
                module.processor = ZSingleStreamAttnProcessor()
        theirs = transformer(x, torch.tensor([0.2, 0.7]), states).sample
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-5


def test_the_loss_is_that_of_the_velocity() -> None:
    """A model that says nothing, as at its start, is off by the velocity itself."""
    latents, noise = torch.randn(2, 3, 8, 16, 16).unbind()
    pad = words.vocabulary()[words.PAD]
    tokens = torch.tensor([(words.encode("a dog") + [pad] * train.LONGEST)[: train.LONGEST]] * 3)
    loss = PocketDit().loss(latents, tokens, noise, torch.tensor([0.1, 0.5, 0.9]))
    assert loss.item() == pytest.approx((noise - latents).square().mean().item(), rel=1e-5)


def test_what_is_exported_is_a_small_plain_pipeline_and_a_base_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae, "FOLDER", BASE / "vae")
    monkeypatch.setattr(train, "COURSE", dataclasses.replace(train.COURSE, folder=tmp_path / "work"))
    model = PocketDit()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    snapshot.save(train.COURSE.snapshot, {"ema": model.state_dict(), "step": 3})
    export.make(tmp_path / "base")
    pipe = ZImagePipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    base = load_base(str(tmp_path / "base"), device="cpu")
    assert (base.facts.family, base.facts.resolution, base.facts.steps) == ("z-image", 64, 20)
    prompt = "a photo of a dog and a cat on the beach"
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    noise = torch.randn(1, base.facts.channels, 16, 16, generator=stream(7, "sample"))
    expected = pipe(prompt, latents=noise, **settings).images
    drawn = sample(base, [prompt], seeds=[7], steps=2, guidance_scale=3.0)
    assert (drawn - expected).abs().max() < 1e-4
