"""Every number of the pocket base in one place, and where its files lie.

Owns the sizes, budgets and paths that the stages share. Knows nothing about drawings, words or models.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "pocket"
BASE = ROOT / "training" / "bases" / "pocket"
DIT_WORK = ROOT / "out" / "pocket-dit"
DIT_BASE = ROOT / "training" / "bases" / "pocket-dit"
CONTROL_FOLDER = ROOT / "training" / "bases" / "controls" / "pocket-canny"
JUDGE = ROOT / "training" / "bases" / "pocket-judge"
DEMO_IMAGES = ROOT / "manifests" / "demo" / "images"
DOCS = ROOT / "docs" / "pocket"

IMAGE_PX = 64
PROMPT_TOKENS = 24
SEED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """How many composites a stage draws, in chunks that can each be made again from the seed alone."""

    chunks: int
    chunk_size: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeSpec:
    block_out_channels: tuple[int, ...] = (16, 32, 64)
    latent_channels: int = 8
    layers_per_block: int = 1
    norm_groups: int = 8
    batch_size: int = 16
    learning_rate: float = 2e-3
    images: int = 40_000
    ema: float = 0.998
    kl_weight: float = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSpec:
    """What every long training has."""

    batch_size: int
    learning_rate: float
    warmup_images: int
    ema_images: int
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnetSpec(LoopSpec):
    block_out_channels: tuple[int, ...] = (64, 128, 192)
    attends: tuple[bool, ...] = (False, True, True)
    layers_per_block: int = 1
    head_channels: int = 32
    norm_groups: int = 16
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_images: int = 6_400
    ema_images: int = 32_000
    min_snr_gamma: float = 5.0
    caption_drop: float = 0.1
    images: int = 400_000
    tight_images: int = 100_000
    cooldown_images: int = 25_600


@dataclass(frozen=True, slots=True, kw_only=True)
class DitSpec(LoopSpec):
    """`median` and `spread`: the noise levels are drawn logit-normal, so shapes are decided often enough."""

    width: int = 192
    layers: int = 10
    refiners: int = 1
    heads: int = 6
    axes: tuple[int, int, int] = (8, 12, 12)
    text_width: int = 128
    text_layers: int = 3  # the transformer reads the last but one
    text_heads: int = 4
    shift: float = 1.5
    median: float = 0.6
    spread: float = 1.0
    pairs: float = 0.2  # of the pictures show two things
    caption_drop: float = 0.1
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_images: int = 12_800
    ema_images: int = 64_000
    images: int = 2_000_000
    tight_images: int = 100_000
    cooldown_images: int = 51_200


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSpec(LoopSpec):
    """Of the ControlNet for edges; `edge_channels`: of the layers that bring edges to the latents' size."""

    edge_channels: tuple[int, ...] = (16, 24, 32)
    chunks: int = 8  # of the narrow pool
    caption_drop: float = 0.3  # so that it learns to draw from the edges alone
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_images: int = 1_600
    ema_images: int = 6_400
    images: int = 36_160


WIDE_POOL = PoolSpec(chunks=5)
NARROW_POOL = PoolSpec(chunks=12)
PAIR_POOL = PoolSpec(chunks=4)
TIGHT_CHUNKS = 4
VAE = VaeSpec()
UNET = UnetSpec()
DIT = DitSpec()
CONTROL = ControlSpec()
