"""The weight files of a base, as their headers describe them: which files a component has, and what is in them.

Weights are safetensors, whole or in shards, also as a variant (`diffusion_pytorch_model.fp16.safetensors`). Pickles
(`.bin`, `.ckpt`, `.pt`) are never opened: they can run any code. Knows no torch.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from training.errors import UserError

MAX_HEADER_BYTES = 100 * 2**20
_SHARD = re.compile(r"-\d+-of-\d+$")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# by these keys the original programs' checkpoints are told apart
_VERSION_KEYS = {
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": "1",
    "cond_stage_model.model.token_embedding.weight": "2",
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": "xl",
}
# by these, with or without ComfyUI's prefix, files that hold a transformer alone; the later are in the earlier's, too
TRANSFORMERS = {
    "double_stream_modulation_img.lin.weight": "Flux2Transformer2DModel",
    "double_blocks.0.img_attn.qkv.weight": "FluxTransformer2DModel",
    "x_pad_token": "ZImageTransformer2DModel",
}
TITLES = {
    "Flux2Transformer2DModel": "FLUX.2",
    "FluxTransformer2DModel": "FLUX.1",
    "ZImageTransformer2DModel": "Z-Image",
}
_NATIVE = "model.diffusion_model."
_SCALES = (".scale_weight", ".weight_scale", ".scale_input", "scaled_fp8")  # of ComfyUI's quantised files
_FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
_OTHER_FAMILIES = {
    "conditioner.embedders.": "a refiner of Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "lora_": "an adapter, not a base",
}


class Weights(NamedTuple):
    """The files of one component, and the name of their variant (None: the plain files)."""

    files: tuple[Path, ...]
    variant: str | None


def find_weights(folder: Path, component: str) -> Weights:
    """The weights of a component: the plain files, else the variant `fp16`, else whichever there is.

    Raises UserError if there are none, saying whether it has pickles instead.
    """
    place, stem = folder / component, _stem(component)
    for variant in (None, "fp16", *_variants(place, stem)):
        files = _files(place, stem, variant)
        if files:
            return Weights(files, variant)
    pickles = sorted(path.name for path in place.glob("*") if path.suffix in _PICKLES)
    if pickles:
        raise UserError(
            f"Base folder '{folder}': {component}/ has its weights as a pickle ({pickles[0]}), which is not opened: it "
            "could run any code. Take the base as .safetensors, or convert it where you trust it: "
            "`DiffusionPipeline.from_pretrained(folder).save_pretrained(new_folder)` of diffusers."
        )
    raise UserError(
        f"Base folder '{folder}': {component}/ has no weights. It needs {stem}.safetensors, or a variant such as "
        f"{stem}.fp16.safetensors."
    )


def load_model(
    kind: Any, folder: Path, component: str, dtype: Any, quantized: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """A component of class `kind` from its safetensors files, whichever variant they are; never from a pickle.

    `quantized`: diffusers' configs of components whose linear layers are kept in fewer bits.
    """
    more = {"quantization_config": quantized[component]} if component in quantized else {}
    variant = find_weights(folder, component).variant
    return kind.from_pretrained(folder / component, torch_dtype=dtype, variant=variant, use_safetensors=True, **more)


def read_header(file: Path) -> dict[str, Any]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file. Raises UserError if it is none or torn."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise _unreadable(file, size)
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise _unreadable(file, size) from None
    if 8 + length + end > size:
        raise UserError(
            f"Base file '{file}' is cut short: it has {size:,} bytes of {8 + length + end:,}. Download it again."
        )
    return header


def checkpoint_version(file: Path) -> str:
    """What a checkpoint in one file is: a Stable Diffusion "1", "2" or "xl", or the class of the transformer in it.

    Raises UserError for others, for inpainting, and for quantised weights.
    """
    header = read_header(file)
    if scale := next((key for key in header if key.endswith(_SCALES)), None):
        raise UserError(
            f"Base '{file.name}' has quantised weights with scales of their own ('{scale}'), which are not read. Take "
            "its file of 16 bit, and set `base_quantization`."
        )
    for mark, kind in TRANSFORMERS.items():
        if mark in header or _NATIVE + mark in header:
            return kind
    version = next((found for key, found in _VERSION_KEYS.items() if key in header), None)
    if version is None:
        other = next(
            (name for start, name in _OTHER_FAMILIES.items() if any(key.startswith(start) for key in header)), ""
        )
        said = f": it is {other}" if other else ""
        keys = sorted(header)
        like = ", ".join(f"'{key}'" for key in keys[:: max(1, len(keys) // 3)][:3])
        raise UserError(
            f"Base '{file.name}' has not the keys of a Stable Diffusion 1.x, 2.x or XL checkpoint, nor of a "
            f"transformer of {', '.join(TITLES.values())}{said}. Its keys are like {like}. Give one of these or a "
            "diffusers folder."
        )
    channels = header.get(_FIRST_LAYER, {}).get("shape", (0, 4))[1]
    check_channels(file.name, channels, 4)
    return version


def check_channels(name: str, channels: int, latents: int) -> None:
    """Raises UserError for a denoiser that takes more than noisy latents."""
    if channels != latents:
        kinds = {2 * latents + 1: "an inpainting model", 2 * latents: "a model that edits pictures"}
        kind = kinds.get(channels, "a model that takes more than text")
        raise UserError(
            f"Base '{name}' is {kind}: its UNet takes {channels} channels, not the {latents} of the latents alone, and "
            "cannot be trained on photos. Take the text-to-image model that it was made from."
        )


def _stem(component: str) -> str:
    """What the files of a component begin with: transformers' way, or diffusers'."""
    return "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"


def _variants(place: Path, stem: str) -> list[str]:
    """The variants among a component's files: `non_ema` of `model.non_ema.safetensors`, whole or in shards."""
    names = [path.name.removesuffix(".safetensors") for path in place.glob(f"{stem}.*.safetensors")]
    return sorted({_SHARD.sub("", name.removeprefix(f"{stem}.")) for name in names})


def _files(place: Path, stem: str, variant: str | None) -> tuple[Path, ...]:
    """The one file of a variant, or the shards that its index names; empty if it is not there."""
    dotted = f".{variant}" if variant else ""
    whole = place / f"{stem}{dotted}.safetensors"
    if whole.is_file():
        return (whole,)
    index = place / f"{stem}.safetensors.index{dotted}.json"
    if not index.is_file():
        return ()
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"Base file '{index}' is no index of shards. Download it again.") from None
    missing = [name for name in names if not (place / name).is_file()]
    if missing:
        raise UserError(f"Base file '{index}' names '{missing[0]}', which is not there. Download it again.")
    return tuple(place / name for name in names)


def _unreadable(file: Path, size: int) -> UserError:
    with file.open("rb") as stream:
        pointer = stream.read(40).startswith(b"version https://git-lfs")
    hint = "It is a pointer of Git LFS: run `git lfs pull` in its folder." if pointer else "Download it again."
    return UserError(f"Base file '{file}' ({size:,} bytes) is no safetensors file. {hint}")
