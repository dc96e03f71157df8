"""The base's ControlNet for edges: trained over the frozen base, on the composites and their own Canny edges.

It reads no prompt: its blocks have no attention, which makes it small enough to be part of the repository.
"""

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel

from serving.engine.pictures.canny import canny
from tools.pocket import caption, latents, snapshot, tokenizer
from tools.pocket.composite import Bytes, Labels
from tools.pocket.course import Course, train
from tools.pocket.drawings import CLASSES
from tools.pocket.export import forget_origin
from tools.pocket.figures import sheet
from tools.pocket.places import PLACE_NAMES
from tools.pocket.pool import UNSEEN, narrow, narrow_path
from tools.pocket.recipe import BASE, CONTROL, CONTROL_FOLDER, DOCS, IMAGE_PX, SEED, UNET, VAE, WORK
from tools.pocket.sampler import grid, pipeline, schedule
from tools.pocket.team import Seat, run

log = logging.getLogger(__name__)

GRIDS = WORK / "control-grids"
LOOK_FIRST = UNSEEN + 50_000  # pictures that nothing was trained on
MAX_BYTES = 4_500_000


def build_control() -> ControlNetModel:
    """The way down of the base's UNet without its attention, and a small encoder of edges."""
    return ControlNetModel(
        in_channels=VAE.latent_channels,
        down_block_types=("DownBlock2D",) * len(UNET.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        block_out_channels=UNET.block_out_channels,
        layers_per_block=UNET.layers_per_block,
        norm_num_groups=UNET.norm_groups,
        cross_attention_dim=UNET.text_width,
        conditioning_embedding_out_channels=CONTROL.edge_channels,
    )


class PocketControl(nn.Module):
    """The ControlNet; the base that it steers is beside it, frozen, and no part of its state."""

    signal: Tensor
    noise: Tensor

    def __init__(self) -> None:
        super().__init__()
        unet = UNet2DConditionModel.from_pretrained(BASE / "unet").float().eval().requires_grad_(False)
        unet.set_attn_processor(AttnProcessor())
        text = CLIPTextModel.from_pretrained(BASE / "text_encoder").float().eval().requires_grad_(False)
        self.frozen: tuple[Any, Any] = (unet, text)  # a tuple: modules in it are none of this one's
        self.control = build_control()
        own, theirs = self.control.state_dict(), unet.state_dict()
        self.control.load_state_dict({name: theirs.get(name, value) for name, value in own.items()})
        alphas = schedule().alphas_cumprod.float()
        self.register_buffer("signal", alphas.sqrt(), persistent=False)
        self.register_buffer("noise", (1 - alphas).sqrt(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PocketControl":
        for model in self.frozen:
            model._apply(fn)
        super()._apply(fn, recurse)
        return self

    def loss(
        self, latents_BCHW: Tensor, edges_B3HW: Tensor, tokens_BL: Tensor, noise_BCHW: Tensor, steps_B: Tensor
    ) -> Tensor:
        """The base's own loss (`Pocket.loss`), of its prediction with the ControlNet's residuals."""
        unet, text = self.frozen
        signal, sigma = (x[steps_B][:, None, None, None] for x in (self.signal, self.noise))
        noisy = signal * latents_BCHW + sigma * noise_BCHW
        target = signal * noise_BCHW - sigma * latents_BCHW
        hidden = text(tokens_BL).last_hidden_state
        down, mid = self.control(noisy, steps_B, hidden, edges_B3HW, return_dict=False)
        made = unet(
            noisy, steps_B, hidden, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample.float()
        snr_B = (signal / sigma).square().flatten()
        weight_B = (snr_B.clamp_max(UNET.min_snr_gamma) + 1) / (snr_B + 1)
        return ((made - target).square().mean((1, 2, 3)) * weight_B).mean()


def edges_of(pixels_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Canny edges as a ControlNet takes them: [N, 3, H, W], 0 or 1."""
    edges = np.stack([canny(one) for one in pixels_NHW3]).transpose(0, 3, 1, 2)
    return edges.astype(np.float32) / np.float32(255)


class EdgeBatch:
    """Draws batches from latents and pictures; what one holds depends on (seed, step, rank) only."""

    def __init__(self, seat: Seat) -> None:
        self.seat, self.size = seat, CONTROL.batch_size // seat.size
        held, shown = [], []
        for chunk in range(CONTROL.chunks):
            with np.load(latents.path(chunk)) as file:
                held.append((file["latents"], file["labels"]))
            with np.load(narrow_path(chunk)) as file:
                shown.append(file["pixels"])
        self.latents = np.concatenate([one for one, _ in held])
        self.labels = np.concatenate([one for _, one in held])
        self.pixels = np.concatenate(shown)

    def draw(self, step: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng((SEED, 9, step, self.seat.rank))
        picked = rng.integers(len(self.latents), size=self.size)
        dropped = rng.random(self.size) < CONTROL.caption_drop
        tokens = [
            tokenizer.encode("" if drop else _caption(row, rng))
            for row, drop in zip(self.labels[picked], dropped, strict=True)
        ]
        noise = rng.standard_normal((self.size, *self.latents.shape[1:]), dtype=np.float32)
        levels = ((np.arange(self.size) + rng.random(self.size)) / self.size * 1000).astype(np.int64)
        clean, edges = self.latents[picked].astype(np.float32), edges_of(self.pixels[picked])
        arrays = (clean, edges, np.asarray(tokens), noise, levels)
        return tuple(torch.from_numpy(a).to(self.seat.device) for a in arrays)


def _caption(row: NDArray[np.uint8], rng: np.random.Generator) -> str:
    noun, place, colour, style = (int(value) for value in row)
    return caption.caption(Labels(noun=noun, place=place, colour=colour, style=style), rng)


def steered(control: ControlNetModel) -> StableDiffusionControlNetPipeline:
    """diffusers' own pipeline of the base and the ControlNet."""
    unet = UNet2DConditionModel.from_pretrained(BASE / "unet").float()
    text = CLIPTextModel.from_pretrained(BASE / "text_encoder").float()
    plain = pipeline(unet, text, AutoencoderKL.from_pretrained(BASE / "vae").float().eval())
    made = StableDiffusionControlNetPipeline(**plain.components, controlnet=control, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def generate(pipe: StableDiffusionControlNetPipeline, prompts: list[str], edges: list[Bytes]) -> list[Bytes]:
    """Pictures [H, W, 3] of prompts along edges; each depends on its position alone."""
    made = pipe(
        prompts,
        image=[Image.fromarray(one) for one in edges],
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(index) for index in range(len(prompts))],
        output_type="np",
        height=IMAGE_PX,
        width=IMAGE_PX,
    ).images
    return list(np.rint(made * 255).astype(np.uint8))


def look(weights: dict[str, Tensor], images: int) -> None:
    """A grid by eye: composites that nothing was trained on, their edges, and what is drawn along them."""
    model = PocketControl()
    model.load_state_dict(weights)
    pixels, labels = narrow(LOOK_FIRST, 14)
    edges = [canny(one) for one in pixels]
    prompts = [caption.prompt(CLASSES[row[0]], PLACE_NAMES[row[1]]) for row in labels]
    with torch.autocast("cpu", torch.bfloat16):
        made = generate(steered(model.control.eval()), prompts, edges)
    GRIDS.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid(np.stack([*pixels, *edges, *made]), len(pixels))).save(GRIDS / f"{images:08}.png")


COURSE = Course(name="control", spec=CONTROL, folder=WORK, build=PocketControl, draws=EdgeBatch, look=look)


def make(images: int = CONTROL.images) -> None:
    """Trains until `images` have been seen, from the last snapshot."""
    state = snapshot.load(COURSE.snapshot)
    if state is None or int(state["step"]) * CONTROL.batch_size < images:
        run(partial(train, course=COURSE, images=images), size=1)


def export() -> None:
    """The ControlNet as a diffusers folder in fp16. Raises ValueError if it is too large to be kept here."""
    state = snapshot.load(COURSE.snapshot)
    if state is None:
        raise FileNotFoundError(f"No snapshot {COURSE.snapshot}. Run `python -m tools.pocket control` first.")
    model = PocketControl()
    model.load_state_dict(state["ema"])
    staged = CONTROL_FOLDER.with_name(CONTROL_FOLDER.name + ".part")
    shutil.rmtree(staged, ignore_errors=True)
    model.control.half().save_pretrained(staged, safe_serialization=True)
    forget_origin(staged / "config.json")
    size = sum(file.stat().st_size for file in staged.iterdir())
    if size > MAX_BYTES:
        raise ValueError(f"The export has {size} bytes, more than {MAX_BYTES}. Make it narrower.")
    shutil.rmtree(CONTROL_FOLDER, ignore_errors=True)
    staged.rename(CONTROL_FOLDER)
    log.info(json.dumps({"images": int(state["step"]) * CONTROL.batch_size, "bytes": size}))


def figure() -> None:
    """docs/pocket/control.jpg: edges of composites that nothing was trained on, and pictures of several classes."""
    pixels, labels = narrow(LOOK_FIRST, 10)
    edges = [canny(one) for one in pixels]
    pipe = steered(ControlNetModel.from_pretrained(CONTROL_FOLDER).float().eval())
    rows: list[tuple[str, list[Bytes]]] = [("composite", list(pixels)), ("its edges", edges)]
    for word, shift in (("its words", 0), ("elsewhere", 4)):
        prompts = [caption.prompt(CLASSES[row[0]], PLACE_NAMES[(row[1] + shift) % len(PLACE_NAMES)]) for row in labels]
        rows.append((word, generate(pipe, prompts, edges)))
    prompts = [caption.prompt(CLASSES[row[0]], "white", "blue") for row in labels]
    rows.append(("in blue", generate(pipe, prompts, edges)))
    sheet(rows, []).save(DOCS / "control.jpg", quality=90)
