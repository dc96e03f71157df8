"""How long the demo's six subjects take on this machine, photos in and adapters out, as one pack on two threads.

Owns the clock. On a machine that does other work the wall time is longer, the CPU time hardly, so both are said.
"""

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tools.pocket.dreambooth import REFERENCE, STEPS, learn, learner, open_base
from tools.pocket.recipe import DEMO_IMAGES
from tools.pocket.subjects import SUBJECTS, Subject
from training.manifest.manifest import load_manifest

THREADS = 2


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds for so many subjects."""

    subjects: int
    class_images_s: float
    training_s: float
    cpu_s: float
    dtype: str

    @property
    def wall_s(self) -> float:
        return self.class_images_s + self.training_s


def demo_subjects() -> Sequence[Subject]:
    ids = [spec.id for spec in load_manifest(DEMO_IMAGES.parent / "manifest.yaml").subjects]
    return [subject for subject in SUBJECTS if subject.id in ids]


def measure(base_folder: Path) -> Duration:
    """In a process of its own, whose threads spin for a moment only, as those of `training` do."""
    os.environ |= {"OMP_NUM_THREADS": str(THREADS), "GOMP_SPINCOUNT": "1000"}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(clock, base_folder).result()


def clock(base_folder: Path) -> Duration:
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)
    base, subjects = open_base(base_folder), demo_subjects()
    begin, cpu = time.perf_counter(), time.process_time()
    with TemporaryDirectory() as fresh:
        found = [learner(base, subject, REFERENCE, Path(fresh)) for subject in subjects]
    made = time.perf_counter()
    learn(base, found, (STEPS,))
    end, dtype = time.perf_counter(), str(base.dtype).removeprefix("torch.")
    return Duration(len(subjects), made - begin, end - made, time.process_time() - cpu, dtype)
