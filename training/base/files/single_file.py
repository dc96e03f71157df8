"""A base in one `.safetensors` checkpoint, as the original programs write it, turned into a diffusers folder once.

`python -m training.base.files.single_file FILE FOLDER` is how it is called, so that who only plans needs no torch. The
shapes of Stable Diffusion 1.x and 2.x are known here; CLIP's tokenizer ships with the package. No network.
"""

import gzip
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from training.base.files.folder import EMBEDDED
from training.base.files.weights import checkpoint_version
from training.errors import UserError

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def configs(version: str, prediction_type: str = "epsilon", resolution: int = 512) -> dict[str, dict[str, Any]]:
    """The component configs of Stable Diffusion 1.x (`version` "1") or 2.x ("2")."""
    first = version == "1"
    unet = {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": 8 if first else [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768 if first else 1024,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "sample_size": resolution // 8,
        "use_linear_projection": not first,
    }
    vae = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "sample_size": resolution,
        "scaling_factor": 0.18215,
    }
    text = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu" if first else "gelu",
        "hidden_size": 768 if first else 1024,
        "intermediate_size": 3072 if first else 4096,
        "num_attention_heads": 12 if first else 16,
        "num_hidden_layers": 12 if first else 23,  # 2.x reads the last layer but one of 24
        "projection_dim": 768 if first else 512,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407 if first else 0,
    }
    scheduler = {
        "_class_name": "DDIMScheduler",
        **_BETAS,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    return {"unet": unet, "vae": vae, "text_encoder": text, "scheduler": scheduler}


def convert(file: Path, folder: Path, described: dict[str, dict[str, Any]] | None = None) -> None:
    """Writes the diffusers folder of a checkpoint; it is there as a whole or not at all.

    `described`: component configs, by default those of the version that the file's keys tell, completed by
    `<file>.json` beside it (`prediction_type`, `resolution`), if there. Raises UserError for any other family.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    described = described or _describe(file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        config, made = Path(scratch, "config"), Path(scratch, "made")
        write_configs(config, described)
        pipeline = StableDiffusionPipeline.from_single_file(
            str(file), config=str(config), local_files_only=True, torch_dtype=torch.float16, safety_checker=None
        )
        pipeline.save_pretrained(made)
        if folder.exists():
            return  # somebody else was first; the same
        shutil.move(made, folder)


def write_configs(folder: Path, described: dict[str, dict[str, Any]]) -> None:
    """A diffusers folder without weights: configs and CLIP's tokenizer."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", described["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for component, config in described.items():
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (folder / component).mkdir(parents=True, exist_ok=True)
        (folder / component / name).write_text(json.dumps(config, indent=1))
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    write_tokenizer(folder / "tokenizer", pad_first=described["text_encoder"]["pad_token_id"] == 0)


def write_tokenizer(folder: Path, *, pad_first: bool = False) -> None:
    """CLIP's tokenizer: 49,408 tokens from its merges. `pad_first`: pads with token 0, as 2.x does."""
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


def _describe(file: Path) -> dict[str, dict[str, Any]]:
    version = checkpoint_version(file)
    beside = file.with_suffix(".json")
    said = json.loads(beside.read_text()) if beside.is_file() else {}
    # the large 2.x predicts v at 768 px; the file itself does not say
    defaults = ("epsilon", 512) if version == "1" else ("v_prediction", 768)
    return configs(version, said.get("prediction_type", defaults[0]), said.get("resolution", defaults[1]))


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(str(error))
