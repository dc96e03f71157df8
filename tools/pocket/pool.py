"""Pools: composites drawn once and kept in chunks.

Owns the chunk files of pixels and labels. A chunk that exists is never drawn again; a lost one comes out the same.
"""

import multiprocessing
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.pocket.composite import TIGHT, USUAL, classes_picture, wide_picture
from tools.pocket.recipe import NARROW_POOL, TIGHT_CHUNKS, WIDE_POOL, WORK

POOLS = WORK / "pools"
# Indices that no pool reaches: pictures that nothing was trained on.
UNSEEN = 10_000_000


def wide_path(chunk: int) -> Path:
    return POOLS / f"wide-{chunk:03}.npy"


def narrow_path(chunk: int) -> Path:
    return POOLS / f"narrow-{chunk:03}.npz"


def _replace(path: Path, **arrays: NDArray[np.uint8]) -> None:
    part = path.with_suffix(".part" + path.suffix)
    if path.suffix == ".npy":
        np.save(part, arrays["pixels"])
    else:
        np.savez(part, **arrays)  # type: ignore[arg-type]
    part.replace(path)


def draw_wide(chunk: int) -> None:
    size = WIDE_POOL.chunk_size
    _replace(wide_path(chunk), pixels=np.stack([wide_picture(i) for i in range(chunk * size, (chunk + 1) * size)]))


def narrow(first: int, count: int, tight: bool = False) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures [N, H, W, 3] and labels [N, 4] (noun, place, colour, style)."""
    drawn = [classes_picture(i, TIGHT if tight else USUAL) for i in range(first, first + count)]
    labels = np.asarray([(la.noun, la.place, la.colour, la.style) for _, la in drawn], np.uint8)
    return np.stack([picture for picture, _ in drawn]), labels


def draw_narrow(chunk: int) -> None:
    size = NARROW_POOL.chunk_size
    pixels, labels = narrow(chunk * size, size, tight=chunk < TIGHT_CHUNKS)
    _replace(narrow_path(chunk), pixels=pixels, labels=labels)


def _call(job: "partial[None]") -> None:
    job()


def draw() -> None:
    """Draws every chunk that is missing."""
    POOLS.mkdir(parents=True, exist_ok=True)
    jobs = [partial(draw_wide, c) for c in range(WIDE_POOL.chunks) if not wide_path(c).exists()]
    jobs += [partial(draw_narrow, c) for c in range(NARROW_POOL.chunks) if not narrow_path(c).exists()]
    with multiprocessing.get_context("spawn").Pool() as workers:
        workers.map(_call, jobs, chunksize=1)
