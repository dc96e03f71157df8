"""The export: the base as a complete diffusers folder in fp16, with its model card.

Owns what users read; the folder appears under its final name only when it is complete.
"""

import json
import logging
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tools.pocket import score, tokenizer, train
from tools.pocket.card import card
from tools.pocket.recipe import BASE
from training.base.facts import DEFAULTS_FILE

log = logging.getLogger(__name__)

MAX_BYTES = 25_000_000
RECOMMENDED = {"steps": 20, "guidance_scale": 3.0, "sampler": "ddim", "judge": "pocket-judge"}


def newest() -> Path:
    """The cooled fork where there is one, else the run itself."""
    return train.COOLED if train.COOLED.exists() else train.SNAPSHOT


def prefix_text_keys(folder: Path) -> None:
    """Older readers expect `text_model.` before a CLIP text encoder's keys; newer ones accept it."""
    file = folder / "model.safetensors"
    named = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})


def load_as_float(folder: Path) -> None:
    """transformers takes the dtype from the config: fp16 beside diffusers' fp32 default would not run."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def forget_origin(file: Path) -> None:
    """diffusers notes in a config where a part was loaded from: a path of this machine."""
    config = json.loads(file.read_text())
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write(source: Path, folder: Path) -> int:
    """Writes the folder and returns how many images the weights have seen."""
    pipe, images = score.average_of(source)
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    tokenizer.write(folder / "tokenizer")
    prefix_text_keys(folder / "text_encoder")
    load_as_float(folder / "text_encoder")
    for part in ("unet", "vae", "text_encoder"):
        forget_origin(folder / part / "config.json")
    (folder / DEFAULTS_FILE).write_text(json.dumps(RECOMMENDED) + "\n")
    return images


def check(folder: Path) -> None:
    """What an export must hold, as a plain reader sees it."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > MAX_BYTES:
        raise ValueError(f"The export has {size} bytes, more than {MAX_BYTES}. Make UNet or text encoder narrower.")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    expected = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    found = {key: pipe.scheduler.config[key] for key in expected}
    dtypes = {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)}
    if dtypes != {torch.float32}:
        raise ValueError(f"A plain reader gets {dtypes}; expected float32 for all.")
    if found != expected or pipe.vae.config.scaling_factor != 1.0:
        raise ValueError(
            f"The export reads {found}, scaling {pipe.vae.config.scaling_factor}; expected {expected}, 1.0."
        )


def make(source: Path | None = None, folder: Path = BASE, per_class: int = score.PER_CLASS) -> None:
    staged = folder.with_name(folder.name + ".part")
    shutil.rmtree(staged, ignore_errors=True)
    images = write(source or newest(), staged)
    check(staged)
    scores: dict[str, object] = {"images": images} | score.exported(staged, per_class)
    (staged / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    (staged / "README.md").write_text(card(scores))
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)
    log.info(f"exported {images} images: {scores}")
