"""The long training of `pocket-dit`: the composites of `pocket`, and some of two things side by side."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ZImagePipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tools.pocket import caption, latents, snapshot, vae
from tools.pocket.composite import Labels
from tools.pocket.course import Cooldown, Course, train
from tools.pocket.dit import pairs, words
from tools.pocket.dit.model import PocketDit, schedule
from tools.pocket.drawings import CLASSES
from tools.pocket.recipe import DIT, DIT_WORK, IMAGE_PX, NARROW_POOL, PAIR_POOL, SEED, TIGHT_CHUNKS
from tools.pocket.sampler import grid
from tools.pocket.team import Seat, run
from tools.pocket.train import shown

GRIDS = DIT_WORK / "grids"
LONGEST = 32  # tokens: the transformer fills prompts up to a multiple of it
PAIRS_SHOWN = [("dog", "cat", "beach"), ("car", "house", "snow"), ("frog", "duck", "water"), ("apple", "cup", "brick")]


class Batch:
    """Draws batches from the latents; pictures, captions and noise depend on (seed, step, rank) only."""

    def __init__(self, seat: Seat) -> None:
        self.seat, self.size = seat, DIT.batch_size // seat.size
        self.latents, self.labels = _held([latents.path(chunk) for chunk in range(NARROW_POOL.chunks)])
        self.pair_latents, self.pair_labels = _held([pairs.path(chunk) for chunk in range(PAIR_POOL.chunks)])

    def draw(self, step: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng((SEED, 8, step, self.seat.rank))
        tight = step * DIT.batch_size < DIT.tight_images
        limit = TIGHT_CHUNKS * NARROW_POOL.chunk_size if tight else len(self.latents)
        two = round(DIT.pairs * self.size)
        singles = rng.integers(limit, size=self.size - two)
        doubles = rng.integers(len(self.pair_latents), size=two)
        captions = [self._single(row, rng) for row in self.labels[singles]]
        captions += [pairs.caption(pairs.unpack(row), rng) for row in self.pair_labels[doubles]]
        dropped = rng.random(self.size) < DIT.caption_drop
        ids = [words.encode("" if drop else text) for text, drop in zip(captions, dropped, strict=True)]
        pad = words.vocabulary()[words.PAD]
        tokens = np.asarray([row + [pad] * (LONGEST - len(row)) for row in ids])
        clean = np.concatenate((self.latents[singles], self.pair_latents[doubles])).astype(np.float32)
        noise = rng.standard_normal(clean.shape, dtype=np.float32)
        arrays = (clean, tokens, noise, self._levels(rng))
        return tuple(torch.from_numpy(a).to(self.seat.device) for a in arrays)

    def _levels(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Logit-normal, stratified: each batch covers all noise levels, which steadies the gradient."""
        shares = torch.from_numpy(rng.permutation((np.arange(self.size) + rng.random(self.size)) / self.size))
        logits = np.log(DIT.median / (1 - DIT.median)) + DIT.spread * torch.special.ndtri(shares).numpy()
        made: NDArray[np.float32] = (1 / (1 + np.exp(-logits))).astype(np.float32)
        return made

    def _single(self, row: NDArray[np.uint8], rng: np.random.Generator) -> str:
        noun, place, colour, style = (int(v) for v in row)
        return caption.caption(Labels(noun=noun, place=place, colour=colour, style=style), rng)


def _held(files: list[Path]) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    loaded = [np.load(file) for file in files]
    return np.concatenate([one["latents"] for one in loaded]), np.concatenate([one["labels"] for one in loaded])


def pipeline(pocket: PocketDit, frozen: AutoencoderKL) -> ZImagePipeline:
    """diffusers' own; its VAE is told a shift of zero, which the pipeline asks for."""
    frozen.register_to_config(shift_factor=0.0)
    made = ZImagePipeline(
        scheduler=schedule(),
        vae=frozen,
        text_encoder=pocket.text,
        tokenizer=words.build(),
        transformer=pocket.transformer,
    )
    made.set_progress_bar_config(disable=True)
    return made


def models_of(weights: dict[str, Tensor]) -> PocketDit:
    pocket = PocketDit()
    pocket.load_state_dict(weights)
    return pocket.eval()


@torch.no_grad()
def generate(pipe: ZImagePipeline, prompts: list[str], *, guidance: float = 3.0, steps: int = 20) -> NDArray[np.uint8]:
    """Pictures [N, H, W, 3]; `guidance` as everybody means it: 1 is off."""
    made = pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance - 1,
        generator=[torch.Generator().manual_seed(index) for index in range(len(prompts))],
        output_type="np",
        height=IMAGE_PX,
        width=IMAGE_PX,
        max_sequence_length=LONGEST,
    ).images
    return np.rint(made * 255).astype(np.uint8)


def look(weights: dict[str, Tensor], images: int) -> None:
    """A grid of all classes, each in two places, and a row of pairs, by eye."""
    prompts = [caption.prompt(noun, place) for noun, place in shown()]
    prompts += [pairs.prompt(*PAIRS_SHOWN[index % len(PAIRS_SHOWN)]) for index in range(len(CLASSES))]
    pipe = pipeline(models_of(weights), AutoencoderKL.from_pretrained(vae.FOLDER).eval())
    with torch.autocast("cpu", torch.bfloat16):
        made = generate(pipe, prompts)
    GRIDS.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid(made, len(CLASSES))).save(GRIDS / f"{images:08}.png")


COURSE = Course(name="dit", spec=DIT, folder=DIT_WORK, build=PocketDit, draws=Batch, look=look)


def make(images: int = DIT.images) -> None:
    """Trains until `images` have been seen, from the last snapshot."""
    state = snapshot.load(COURSE.snapshot)
    if state is None or int(state["step"]) * DIT.batch_size < images:
        run(partial(train, course=COURSE, images=images))


def cool(images: int = DIT.cooldown_images) -> None:
    """Forks the run's last snapshot; small steps at the end sharpen what large ones blur."""
    run(partial(train, course=COURSE, images=0, cooldown=Cooldown(images)))
