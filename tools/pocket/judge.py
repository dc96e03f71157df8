"""The judge's training, on real composites only, roughened so that soft or speckled pictures do not confuse it.

Knows nothing about the base: no generated or reconstructed picture is ever shown to it.
"""

import json
import logging
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tools.pocket.composite import COLOUR_NAMES, NO_COLOUR, USUAL, judge_picture
from tools.pocket.drawings import CLASSES
from tools.pocket.places import PLACE_NAMES
from tools.pocket.pool import UNSEEN
from tools.pocket.recipe import JUDGE, SEED
from tools.pocket.subjects import SUBJECTS, picture
from tools.pocket.vae import to_tensor
from training.evaluation.judges.pocket import JudgeConfig, JudgeNet, load_judge, save_judge

log = logging.getLogger(__name__)

PICTURES, HELD_OUT_PICTURES = 12_000, 1_000
STEPS, BATCH_SIZE, LEARNING_RATE = 1_800, 48, 2e-3


def drawn(first: int, count: int) -> tuple[NDArray[np.uint8], Tensor]:
    """Pictures [N, H, W, 3] and labels [N, 3]; colour is -100, which the loss ignores, where there is none."""
    made = [judge_picture(i, USUAL) for i in range(first, first + count)]
    labels = [(la.noun, la.place, -100 if la.colour == NO_COLOUR else la.colour) for _, la in made]
    return np.stack([p for p, _ in made]), torch.tensor(labels)


def bend(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture turned, stretched and shifted a little: a class is more than the few drawings of it."""
    count = len(images)
    turn, stretch_x, stretch_y = (torch.rand(3, count, generator=generator) - 0.5).unbind()
    angle, wide, high = 0.5 * turn, 1 + 0.4 * stretch_x, 1 + 0.4 * stretch_y
    rows = torch.stack((wide * angle.cos(), -high * angle.sin(), wide * angle.sin(), high * angle.cos()), 1)
    shift = 0.24 * (torch.rand(count, 2, 1, generator=generator) - 0.5)
    matrix = torch.cat((rows.view(count, 2, 2), shift), dim=2)
    where = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, where, padding_mode="reflection", align_corners=False)


def roughen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Bend, flip, light, blur and noise, each by chance."""
    draws = torch.rand(6, generator=generator).tolist()
    if draws[5] < 0.7:
        images = bend(images, generator)
    if draws[0] < 0.5:
        images = images.flip(-1)
    if draws[1] < 0.4:
        small = functional.interpolate(images, scale_factor=0.5, mode="area")
        images = functional.interpolate(small, scale_factor=2.0, mode="bilinear")
    if draws[2] < 0.5:
        images = images + 0.25 * draws[3] * torch.randn(images.shape, generator=generator)
    return (images * (0.9 + 0.2 * draws[4])).clamp(-1, 1)


def accuracy(judge: JudgeNet, images: Tensor, labels: Tensor) -> dict[str, float]:
    with torch.no_grad():
        heads = [torch.cat([judge(part)[head] for part in images.split(200)]) for head in range(3)]
    found = {}
    for name, logits, truth in zip(("class", "place", "colour"), heads, labels.T, strict=True):
        known = truth >= 0
        found[name] = round(float((logits.argmax(1) == truth)[known].float().mean()), 4)
    return found


def unseen_subjects(judge: JudgeNet) -> float:
    """How often the class of a two-coloured drawing that the judge never saw is read right."""
    images = np.stack([np.asarray(picture(s, place, 7)) for s in SUBJECTS for place in PLACE_NAMES])
    truth = torch.tensor([CLASSES.index(s.noun) for s in SUBJECTS for _ in PLACE_NAMES])
    with torch.no_grad():
        return round(float((judge(to_tensor(images))[0].argmax(1) == truth).float().mean()), 4)


def train() -> JudgeNet:
    torch.manual_seed(SEED)
    judge = JudgeNet(JudgeConfig(classes=CLASSES, places=PLACE_NAMES, colours=COLOUR_NAMES))
    pixels, labels = drawn(0, PICTURES)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = (
                LEARNING_RATE * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS)) + 1e-6
            )
        picked = torch.randint(len(pixels), (BATCH_SIZE,), generator=generator)
        outputs = judge(roughen(to_tensor(pixels[picked.numpy()]), generator))
        truths = labels[picked].T
        losses = [functional.cross_entropy(o, t, label_smoothing=0.05) for o, t in zip(outputs, truths, strict=True)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 250 == 0:
            log.info(f"judge {step + 1}/{STEPS} loss {float(loss.detach()):.3f}")
    return judge.eval()


def scores(judge: JudgeNet) -> dict[str, float]:
    pixels, labels = drawn(UNSEEN, HELD_OUT_PICTURES)
    return accuracy(judge, to_tensor(pixels), labels) | {"class_of_unseen_subjects": unseen_subjects(judge)}


def make() -> None:
    if (JUDGE / "model.safetensors").exists():
        return
    torch.set_num_threads(1)
    save_judge(train(), JUDGE)
    found = scores(load_judge(JUDGE))
    (JUDGE / "scores.json").write_text(json.dumps(found, indent=2) + "\n")
    log.info(f"judge on held-out composites: {found}")
