"""The VAE: its shape, its start, its training and the folding of its latents to unit scale.

Knows nothing about captions or the UNet. Writes a diffusers folder at the end; from then on it is frozen.
"""

import csv
import logging
import math
import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tools.pocket import snapshot
from tools.pocket.composite import wide_picture
from tools.pocket.pool import UNSEEN, narrow_path, wide_path
from tools.pocket.recipe import BASE, SEED, VAE, WIDE_POOL, WORK
from tools.pocket.subjects import SUBJECTS, picture
from tools.pocket.team import Seat, run

log = logging.getLogger(__name__)

FOLDER = WORK / "vae"
SNAPSHOT = WORK / "vae.pt"
CURVE = WORK / "vae.csv"


def build() -> AutoencoderKL:
    depth = len(VAE.block_out_channels)
    vae = AutoencoderKL(
        block_out_channels=VAE.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        layers_per_block=VAE.layers_per_block,
        latent_channels=VAE.latent_channels,
        norm_num_groups=VAE.norm_groups,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
        sample_size=64,
    )
    start_as_identity(vae)
    return vae


@torch.no_grad()
def start_as_identity(vae: AutoencoderKL) -> None:
    """Residual branches silent, quant convs identity, posterior narrow: worth about 5 dB in the first minutes."""
    for name, parameter in vae.named_parameters():
        if ".conv2." in name:
            parameter.zero_()
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.weight.shape[0])[:, :, None, None])
        conv.bias.zero_()
    vae.encoder.conv_out.weight[VAE.latent_channels :].zero_()
    vae.encoder.conv_out.bias[VAE.latent_channels :].fill_(-6.0)


def to_tensor(pixels_NHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1


def loss_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    posterior = vae.encode(images).latent_dist
    made = vae.decode(posterior.sample()).sample
    error = made - images
    edges = (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (error[..., 1:] - error[..., :-1]).abs().mean()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + VAE.kl_weight * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean over the pictures of each one's PSNR, from the posterior's mean, after rounding to bytes."""
    made = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in images.split(32)])
    pixels, reference = ((x.clamp(-1, 1) * 127.5 + 127.5).round() for x in (made, images))
    error = (pixels - reference).square().flatten(1).mean(1).clamp_min(1e-3)
    return float((10 * torch.log10(255**2 / error)).mean())


def unseen_composites(count: int = 128) -> Tensor:
    return to_tensor(np.stack([wide_picture(UNSEEN + i) for i in range(count)]))


def unseen_drawings() -> Tensor:
    places = ("snow", "night", "water", "desert")
    return to_tensor(np.stack([np.asarray(picture(s, p, 9)) for s in SUBJECTS for p in places]))


def learning_rate(step: int, steps: int) -> float:
    return VAE.learning_rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6


class Averaged:
    """An exponential average of a module's weights, slower to start than to follow."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def follow(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = module.state_dict()
        torch._foreach_lerp_(list(self.weights.values()), [current[k] for k in self.weights], 1 - decay)


def train(seat: Seat) -> None:
    torch.manual_seed(SEED)
    vae = build().to(seat.device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=VAE.learning_rate, betas=(0.9, 0.95), weight_decay=1e-3, fused=True
    )
    averaged, step = Averaged(vae, VAE.ema), 0
    if state := snapshot.load(SNAPSHOT):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        averaged.weights, step = {k: v.to(seat.device) for k, v in state["ema"].items()}, int(state["step"])
    pool = np.concatenate([np.load(wide_path(c), mmap_mode="r") for c in range(WIDE_POOL.chunks)])
    steps, each = VAE.images // VAE.batch_size, VAE.batch_size // seat.size
    started, first = time.monotonic(), step
    while step < steps:
        rng = np.random.default_rng((SEED, 4, step, seat.rank))
        images = to_tensor(pool[rng.integers(len(pool), size=each)]).to(seat.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(vae, images.flip(-1) if step % 2 else images)
        loss.backward()
        seat.average_gradients(list(vae.parameters()))
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if seat.leads:
            averaged.follow(vae, step)
            if step % 250 == 0 or step == steps:
                rate = (step - first) * VAE.batch_size / (time.monotonic() - started)
                _look(averaged, step, steps, float(loss.detach()), rate)
                state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "ema": averaged.weights}
                snapshot.save(SNAPSHOT, state | {"step": step})
    if seat.leads:
        finish(averaged)


def averaged_vae(averaged: Averaged) -> AutoencoderKL:
    vae = build()
    vae.load_state_dict(averaged.weights)
    return vae.eval()


def _look(averaged: Averaged, step: int, steps: int, loss: float, rate: float) -> None:
    vae = averaged_vae(averaged)
    composites, drawings = psnr(vae, unseen_composites()), psnr(vae, unseen_drawings())
    left = (steps - step) * VAE.batch_size / rate / 60
    log.info(
        f"vae {step}/{steps} loss {loss:.4f} psnr {composites:.2f} dB, unseen drawings {drawings:.2f} dB, "
        f"{rate:.0f} images/s, {left:.0f} min left"
    )
    fresh = not CURVE.exists()
    with CURVE.open("a", newline="") as file:
        rows = csv.writer(file)
        if fresh:
            rows.writerow(("images", "loss", "psnr_composites", "psnr_unseen_drawings"))
        rows.writerow((step * VAE.batch_size, f"{loss:.5f}", f"{composites:.3f}", f"{drawings:.3f}"))


@torch.no_grad()
def finish(averaged: Averaged) -> None:
    """Writes the averaged VAE with latents of unit scale: plain pipelines know one scalar factor, and it is 1."""
    vae = averaged_vae(averaged)
    images = to_tensor(np.load(narrow_path(5))["pixels"][:2048])
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    fold(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    vae.save_pretrained(FOLDER.with_suffix(".part"))
    FOLDER.with_suffix(".part").rename(FOLDER)


@torch.no_grad()
def fold(vae: AutoencoderKL, mean: Tensor, scale: Tensor) -> None:
    """Per-channel mean and scale of the latents, moved into the quant convs; reconstructions stay as they are."""
    quant, back, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / scale
    quant.bias[channels:] -= 2 * scale.log()
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= scale[None, :, None, None]


def make(warm: bool = False) -> None:
    """Trains the VAE once; `warm` takes the exported one, which exported weights of the UNet depend on."""
    if FOLDER.exists():
        return
    if warm:
        AutoencoderKL.from_pretrained(BASE / "vae").float().save_pretrained(FOLDER)
    else:
        run(train)
