"""Fixtures that every test may use: the tiny base, made once."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# several workers on few cores: one thread each is faster than many that wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.tiny import tiny_base
from training.base.base import Base, load_base

# a shell starts background jobs with Ctrl-C ignored, and what they start inherits it
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The diffusers folder of the tiny base (epsilon prediction)."""
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Base:
    """The tiny base in fp32 on the CPU. Shared: leave it as it is (eject what you inject)."""
    return load_base(str(tiny_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny64(tiny_folder: Path) -> Base:
    """The tiny base in fp64, where laws hold to 1e-5 without doubt."""
    return load_base(str(tiny_folder), device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A real browser. A module that uses it may not call `asyncio.run` on this thread."""
    from tests.browser import chromium

    with chromium() as running:
        yield running
