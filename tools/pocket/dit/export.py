"""The export of `pocket-dit`: a complete diffusers folder in fp16; it appears under its final name when it is whole."""

import json
import logging
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImagePipeline

from tools.pocket import snapshot, vae
from tools.pocket.dit import train
from tools.pocket.export import MAX_BYTES, forget_origin, load_as_float
from tools.pocket.recipe import DIT, DIT_BASE
from training.base.facts import DEFAULTS_FILE

log = logging.getLogger(__name__)

DEFAULTS = {"steps": 20, "guidance_scale": 3.0, "judge": "pocket-judge"}


def write(folder: Path) -> int:
    """Writes the folder from the newest averaged weights and returns how many images they have seen."""
    course = train.COURSE
    state = snapshot.load(course.cooled if course.cooled.exists() else course.snapshot)
    if state is None:
        raise FileNotFoundError(f"No snapshot {course.snapshot}. Run `python -m tools.pocket dit` first.")
    pipe = train.pipeline(train.models_of(state["ema"]), AutoencoderKL.from_pretrained(vae.FOLDER).eval())
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    load_as_float(folder / "text_encoder")
    for part in ("transformer", "vae", "text_encoder"):
        forget_origin(folder / part / "config.json")
    (folder / DEFAULTS_FILE).write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    return int(state["step"]) * DIT.batch_size


def check(folder: Path) -> None:
    """What an export must hold, as a plain reader sees it. Raises ValueError."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > MAX_BYTES:
        raise ValueError(f"The export has {size} bytes, more than {MAX_BYTES}. Make the transformer narrower.")
    pipe = ZImagePipeline.from_pretrained(folder)
    dtypes = {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)}
    if dtypes != {torch.float32}:
        raise ValueError(f"A plain reader gets {dtypes}; expected float32 for all.")


def make(folder: Path = DIT_BASE) -> None:
    """Exports the run's newest weights."""
    staged = folder.with_name(folder.name + ".part")
    shutil.rmtree(staged, ignore_errors=True)
    images = write(staged)
    check(staged)
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)
    log.info(f"exported pocket-dit after {images} images")
