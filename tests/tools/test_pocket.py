"""The pocket base's recipe: same seed, same picture; every caption's word one token; the judge reads its own world."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tools.pocket import caption, tokenizer
from tools.pocket.composite import COLOUR_NAMES, USUAL, Labels, lay, ramp
from tools.pocket.drawings import CLASSES, HELD_OUT, STYLES
from tools.pocket.export import MAX_BYTES
from tools.pocket.places import PLACE_NAMES, paint
from tools.pocket.recipe import BASE
from tools.pocket.sampler import generate
from tools.pocket.subjects import SUBJECTS
from tools.pocket.vae import build, fold
from training.evaluation.judges.pocket import JudgeConfig, JudgeNet, load_judge, save_judge


def sprite() -> np.ndarray:
    painted = np.zeros((40, 30, 4), np.float32)
    painted[5:35, 5:25] = (200, 120, 40, 255)
    return painted


def test_a_picture_depends_on_its_seed_alone() -> None:
    def made(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return lay(sprite(), paint("beach", rng), USUAL, rng)

    assert np.array_equal(made(3), made(3))
    assert not np.array_equal(made(3), made(4))


def test_recolouring_keeps_the_outline() -> None:
    assert np.array_equal(ramp(sprite(), (10, 20, 200))[:, :, 3], sprite()[:, :, 3])


@pytest.mark.parametrize("name", PLACE_NAMES)
def test_places_fill_the_picture(name: str) -> None:
    pixels = paint(name, np.random.default_rng(0))
    assert pixels.shape == (64, 64, 3)
    assert pixels.min() >= 0 and pixels.max() <= 255


def test_every_word_is_one_token() -> None:
    built = tokenizer.build()
    assert [word for word in caption.words() if len(built.tokenize(word)) != 1] == []


def test_captions_encode_as_the_tokenizer_does() -> None:
    built, rng = tokenizer.build(), np.random.default_rng(0)
    for _ in range(200):
        noun, place, colour, style = (
            int(rng.integers(n)) for n in (len(CLASSES), len(PLACE_NAMES), len(COLOUR_NAMES) + 1, len(STYLES))
        )
        text = caption.caption(Labels(noun=noun, place=place, colour=colour, style=style), rng)
        padded = built(text, padding="max_length", truncation=True).input_ids
        assert tokenizer.encode(text) == padded, text


def test_subjects_are_unseen_and_well_named() -> None:
    assert all(subject.drawing in HELD_OUT for subject in SUBJECTS)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", subject.id) for subject in SUBJECTS)
    assert len({subject.noun for subject in SUBJECTS}) >= 6


@torch.no_grad()
def test_folding_scales_latents_and_keeps_reconstructions() -> None:
    torch.manual_seed(0)
    vae, images = build().double(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    before = vae.encode(images).latent_dist.mean
    kept = vae.decode(before).sample
    mean, scale = torch.randn(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.5
    fold(vae, mean, scale)
    after = vae.encode(images).latent_dist.mean
    assert torch.allclose(after, (before - mean[:, None, None]) / scale[:, None, None])
    assert torch.allclose(vae.decode(after).sample, kept)


def test_the_shipped_base_draws_what_the_shipped_judge_reads() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(BASE)
    pictures = generate(pipe, ["a photo of sks apple in the snow"], steps=12)
    reading = load_judge().read([Image.fromarray(pictures[0])])[0]
    assert (reading.noun, reading.place) == ("apple", "snow")


def test_the_shipped_base_stays_small() -> None:
    assert sum(file.stat().st_size for file in BASE.rglob("*") if file.is_file()) <= MAX_BYTES


def test_a_judge_survives_its_file(tmp_path: Path) -> None:
    config = JudgeConfig(classes=("dog", "cat"), places=("grass",), colours=("red", "blue"), widths=(8, 8))
    judge = JudgeNet(config)
    save_judge(judge, tmp_path)
    held = load_judge(tmp_path)
    assert held.config == config
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    assert held.read([picture])[0].place == "grass"
    assert held.read([]) == []
