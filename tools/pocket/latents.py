"""Latents: the narrow pool through the frozen VAE, once."""

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from tools.pocket import vae
from tools.pocket.pool import POOLS, narrow_path
from tools.pocket.recipe import NARROW_POOL
from tools.pocket.team import Seat, run

log = logging.getLogger(__name__)


def path(chunk: int) -> Path:
    return POOLS / f"latents-{chunk:03}.npz"


def missing() -> list[int]:
    return [chunk for chunk in range(NARROW_POOL.chunks) if not path(chunk).exists()]


@torch.no_grad()
def encode(seat: Seat) -> None:
    frozen = AutoencoderKL.from_pretrained(vae.FOLDER).eval().to(seat.device)
    for chunk in missing():
        if chunk % seat.size != seat.rank:
            continue
        with np.load(narrow_path(chunk)) as pool:
            pixels, labels = pool["pixels"], pool["labels"]
        parts = [
            frozen.encode(vae.to_tensor(part).to(seat.device)).latent_dist.mean.cpu()
            for part in np.array_split(pixels, len(pixels) // 64)
        ]
        staged = path(chunk).with_suffix(".part.npz")
        np.savez(staged, latents=torch.cat(parts).half().numpy(), labels=labels)
        staged.replace(path(chunk))
        log.info(f"latents {chunk + 1}/{NARROW_POOL.chunks}")


def make() -> None:
    if missing():
        run(encode)
