"""A base in one `.safetensors` checkpoint, as the original programs write it, turned into a diffusers folder once.

`python -m training.base.files.single_file FILE FOLDER` is how it is called, so that who only plans needs no torch. The
shapes of what is converted are in `released.py`; CLIP's tokenizer ships with the package. No network.
"""

import gzip
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from training.base.facts import DEFAULTS_FILE
from training.base.files.folder import EMBEDDED
from training.base.files.released import Configs, configs
from training.base.files.weights import checkpoint_version, read_header
from training.errors import UserError

_TEXT = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}


def convert(file: Path, folder: Path, described: Configs | None = None) -> None:
    """Writes the diffusers folder of a checkpoint; it is there as a whole or not at all.

    `described`: component configs, by default those of the version that the file's keys tell, completed by
    `<file>.json` beside it (`prediction_type`, `resolution`), if there. Raises UserError for any other family.
    """
    import diffusers
    import torch

    described = described or _describe(file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        config, made = Path(scratch, "config"), Path(scratch, "made")
        index = write_configs(config, described)
        kind = getattr(diffusers, index["_class_name"])
        absent = {name: None for name in ("safety_checker",) if name in index}
        pipeline = kind.from_single_file(
            str(file), config=str(config), local_files_only=True, torch_dtype=torch.float16, **absent
        )
        pipeline.save_pretrained(made)
        if folder.exists():
            return  # somebody else was first; the same
        shutil.move(made, folder)


def convert_transformer(file: Path, folder: Path, rest: Path) -> None:
    """Writes the diffusers folder of a file that holds a transformer alone, in bf16; the rest is `rest`'s, linked.

    It is there as a whole or not at all. Raises UserError if the file lacks a part or has other shapes.
    """
    import diffusers
    import torch

    kind = getattr(diffusers, checkpoint_version(file))
    try:
        model = kind.from_single_file(
            str(file), config=str(rest), subfolder="transformer", local_files_only=True, torch_dtype=torch.bfloat16
        )
    except NotImplementedError:  # of a part that is still on the meta device
        raise UserError("it lacks parts of the transformer, or holds another one. Download it again.") from None
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"it does not fit '{rest / 'transformer' / 'config.json'}': {error}") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        others = shutil.ignore_patterns("transformer", ".git*", DEFAULTS_FILE)
        shutil.copytree(rest, made, ignore=others, copy_function=_link)
        model.save_pretrained(made / "transformer")
        if not folder.exists():
            shutil.move(made, folder)


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none; what a link of the hub's cache points at."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def write_configs(folder: Path, described: Configs) -> dict[str, Any]:
    """A diffusers folder without weights: configs and CLIP's tokenizers. Returns its `model_index.json`."""
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }
    if "text_encoder_2" in described:
        index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    index |= {
        "scheduler": ["diffusers", described["scheduler"]["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for component, config in described.items():
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (folder / component).mkdir(parents=True, exist_ok=True)
        (folder / component / name).write_text(json.dumps(config, indent=1))
        if component in _TEXT:
            tokenizer = component.replace("text_encoder", "tokenizer")
            index |= {component: ["transformers", _TEXT[component]], tokenizer: ["transformers", "CLIPTokenizer"]}
            write_tokenizer(folder / tokenizer, pad_first=config["pad_token_id"] == 0)
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return index


def write_tokenizer(folder: Path, *, pad_first: bool = False) -> None:
    """CLIP's tokenizer: 49,408 tokens from its merges. `pad_first`: pads with token 0, as 2.x and bigG do."""
    merges = gzip.decompress((EMBEDDED / "clip-tokenizer" / "merges.txt.gz").read_bytes()).decode().splitlines()
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "!" if pad_first else "<|endoftext|>",
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _byte_letters() -> list[str]:
    """The printable stand-ins of all bytes, in the order that byte-pair vocabularies use."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _describe(file: Path) -> Configs:
    version, header = checkpoint_version(file), read_header(file)
    beside = file.with_suffix(".json")
    said = json.loads(beside.read_text()) if beside.is_file() else {}
    # the large 2.x predicts v at 768 px, which its file does not say; XL's that predict v have a key that says so
    defaults = {"1": ("epsilon", 512), "2": ("v_prediction", 768), "xl": ("epsilon", 1024)}[version]
    prediction_type = "v_prediction" if "v_pred" in header else defaults[0]
    return configs(
        version,
        said.get("prediction_type", prediction_type),
        said.get("resolution", defaults[1]),
        zero_snr="ztsnr" in header,
    )


if __name__ == "__main__":
    try:
        if len(sys.argv) > 3:
            convert_transformer(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
        else:
            convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(str(error))
