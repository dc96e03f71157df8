"""Other programs' adapter files, in and out.

Owns what a user asks for by name (`diffusers`, `kohya`, `ai_toolkit`, `lora_diffusion`, `peft`), the recognition of a
file by its keys, and the rule that an import which attaches nothing, or leaves a key unused, is an error. The keys of
each format are in `named.py` (diffusers, PEFT, ai-toolkit and their ancestors), `peft.py` (PEFT's settings),
`kohya.py`, `ai_toolkit.py` and `lora_diffusion.py`; `fused.py` joins and splits layers. Canonical module keys and the
meaning of an adapter are in `adapter.py`.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Literal, get_args

import torch

from training.adapters.adapter import (
    CANONICAL,
    MAX_BYTES,
    METADATA,
    Adapter,
    AdapterError,
    LowRank,
    check_finite,
    check_token,
    named_tensors,
    pair,
    save_adapter,
    some,
    trimmed,
)
from training.adapters.formats.ai_toolkit import write_ai_toolkit
from training.adapters.formats.fused import split
from training.adapters.formats.kohya import Label, is_kohya, label_of, read_kohya, write_kohya
from training.adapters.formats.lora_diffusion import is_lora_diffusion, read_lora_diffusion, write_lora_diffusion
from training.adapters.formats.lycoris import RANK, as_lora, is_lycoris
from training.adapters.formats.named import is_named, read_named
from training.adapters.formats.parts import OWN, ImportedFile, ImportedParts
from training.adapters.formats.peft import CONFIG, peft_config, write_peft
from training.adapters.tensor_file import TensorFileError, read_tensors, write_tensors
from training.base.families import title_of_adapter
from training.base.originals import NO_NAMES, Names

__all__ = ["Format", "Label", "export_adapter", "import_adapter", "label_of", "recognise"]

Format = Literal["diffusers", "kohya", "ai_toolkit", "lora_diffusion", "peft"]
"""What can be written; all of them, and files of older diffusers, can be read."""

# what lies beside weights in the folders of other programs, and is none
_NO_WEIGHTS = (".json", ".md", ".txt", ".yaml", ".yml", ".png", ".jpg", ".jpeg", ".webp", ".gitattributes")
TWO_CLIPS = ("clip_l", "clip_g")  # keys of the vectors of Stable Diffusion XL's text encoders
TOKEN = "token"  # our metadata in such a file: what the file's name cannot hold
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


def export_adapter(
    adapter: Adapter,
    format: Format,
    modules: Collection[str] = (),
    label: Label | None = None,
    names: Names = NO_NAMES,
) -> dict[str, bytes]:
    """The files of `adapter` in `format`, by name: its weights in float16, and one file for each trained token.

    `modules` are the canonical keys of all modules of the base; lora_diffusion needs them, as its keys are positions.
    `names` are those of its layers in its family's own programs, which kohya and ai_toolkit use; `label` is what
    kohya's readers show. Raises AdapterError if the format cannot hold the adapter.
    """
    if format == "diffusers":
        files = {"pytorch_lora_weights.safetensors": save_adapter(adapter)}
    elif format == "kohya":
        label = label or Label()
        files = {f"{_UNSAFE.sub('_', label.name)}.safetensors": write_kohya(adapter, label, names)}
    elif format == "ai_toolkit":
        stem = _UNSAFE.sub("_", label.name if label else "adapter")
        files = {f"{stem}.safetensors": write_ai_toolkit(adapter, names)}
    elif format == "lora_diffusion":
        files = write_lora_diffusion(adapter, modules)
    elif format == "peft":
        files = write_peft(adapter)
    else:
        raise AdapterError(f"Unknown format {format!r}. Known: {', '.join(get_args(Format))}.")
    widths = [int(width) for width in adapter.metadata.get("word_widths", "").split(",") if width]
    for token, vectors in adapter.embeddings.items():
        files[_embedding_name(token, files)] = _write_embedding(token, vectors, widths)
    return files


def import_adapter(
    files: Mapping[str, bytes],
    modules: Collection[str],
    names: Names = NO_NAMES,
    *,
    rank: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Adapter:
    """The adapter in `files` (names to bytes), in any format that `recognise` knows, for a base with `modules`.

    `names` are those of the base's layers in its family's own programs. The files' names are paths: PEFT's settings
    hold for the files of their folder, and a folder may be named by its component.
    LoKr and LoHa files are converted to plain LoRA of `rank`, where there is somebody to `say` what that loses to.
    Values keep their type where no scale has to be folded in, and become float32 where one has. Raises AdapterError
    naming what does not fit.
    """
    parts, sources = ImportedParts(), [_plain(source, rank, say) for source in _sources(files)]
    for source in sources:
        _read(source, frozenset(modules) | names.originals.keys(), parts)
    if parts.unused:
        count = f"{len(parts.unused)} keys fit no module of this base: {some(sorted(parts.unused))}"
        raise AdapterError(f"{count}. {_whose(sources, names)}")
    adapter = Adapter(
        trimmed(_own_layers(parts, names, _whose(sources, names)), parts.notes),
        parts.embeddings,
        {key: parts.metadata[key] for key in METADATA if key in parts.metadata},
    )
    if not adapter.modules and not adapter.embeddings:
        raise AdapterError(f"The import attaches no module: {some(sorted(files))} hold no low-rank weights.")
    check_finite(named_tensors(adapter))
    return adapter


def _plain(source: ImportedFile, rank: int | None, say: Callable[[str], None] | None) -> ImportedFile:
    """A file as plain LoRA; raises AdapterError for one that would have to be converted with nobody to be told."""
    if not is_lycoris(list(source.tensors)):
        return source
    if say is None:
        raise AdapterError(
            f"{source.name} is a LoKr or LoHa file, not plain LoRA. `dreamfleet adapters import` converts it, and says "
            "what that loses."
        )
    made, error = as_lora(source, rank or RANK)
    say(f"{source.name}: converted to plain LoRA of rank {rank or RANK}; relative error {error:.1%}")
    return made


def recognise(files: Mapping[str, bytes]) -> tuple[str, ...]:
    """The formats found in `files`, each once; raises AdapterError for a file that is none."""
    return tuple(dict.fromkeys(_format_of(source) for source in _sources(files)))


def _sources(files: Mapping[str, bytes]) -> list[ImportedFile]:
    """The tensor files among `files`, each with the PEFT settings of its folder."""
    configs = {
        str(PurePosixPath(name).parent): peft_config(name, data)
        for name, data in files.items()
        if PurePosixPath(name).name == CONFIG
    }
    sources = []
    for name, data in sorted(files.items()):
        if name.lower().endswith(_NO_WEIGHTS):
            continue
        try:
            tensors, metadata = read_tensors(data, name, MAX_BYTES)
        except TensorFileError as error:
            raise AdapterError(str(error)) from error
        sources.append(ImportedFile(name, tensors, metadata, configs.get(str(PurePosixPath(name).parent))))
    if not sources:
        raise AdapterError("Nothing to import: no .safetensors file was given.")
    return sources


def _format_of(source: ImportedFile) -> str:
    keys = list(source.tensors)
    if is_lycoris(keys):
        return "lycoris"
    if is_lora_diffusion(keys):
        return "lora_diffusion"
    if is_kohya(keys):
        return "kohya"
    if named := is_named(keys):
        return named
    if set(keys) == set(TWO_CLIPS):
        return "embedding"
    if len(keys) == 1 and source.tensors[keys[0]].ndim in (1, 2) and "lora" not in keys[0]:
        return "embedding"
    raise AdapterError(
        f"{source.name} is in no known format; its keys are like {some(sorted(keys), 3)}. Readable are diffusers, "
        "kohya, ai-toolkit, lora_diffusion, PEFT and textual-inversion files."
    )


def _read(source: ImportedFile, modules: frozenset[str], parts: ImportedParts) -> None:
    format = _format_of(source)
    if format == "lora_diffusion":
        read_lora_diffusion(source, modules, parts)
    elif format == "kohya":
        read_kohya(source, modules, parts)
    elif format == "embedding":
        _read_embedding(source, parts)
    else:
        read_named(source, modules, parts)
    ours = CANONICAL in source.metadata
    for key, value in source.metadata.items():
        if key.startswith(OWN) or ours:
            parts.metadata[key.removeprefix(OWN)] = value
    parts.notes |= source.metadata


def _read_embedding(source: ImportedFile, parts: ImportedParts) -> None:
    """One token: its key is its name, or the file's where the keys say something else."""
    key, *others = source.tensors
    stem = source.metadata.get(OWN + TOKEN) or PurePosixPath(source.name).stem
    token = stem if others or key == "emb_params" else key
    vectors = [source.tensors[name] for name in (TWO_CLIPS if others else (key,))]
    if len({tensor.shape[:-1] for tensor in vectors}) > 1:
        raise AdapterError(f"{source.name} has not as many vectors for each text encoder: {' and '.join(TWO_CLIPS)}.")
    if others:
        parts.metadata["word_widths"] = ",".join(str(tensor.shape[-1]) for tensor in vectors)
    parts.embed(check_token(token), torch.cat(vectors, dim=-1))


def _own_layers(parts: ImportedParts, names: Names, whose: str) -> dict[str, LowRank]:
    """The changes of the base's own layers; those of layers that the original fuses are split."""
    made: dict[str, LowRank] = {}
    for name, half in sorted(parts.modules.items()):
        whole, fused = _low_rank(name, half), names.originals.get(name)
        if fused is not None and whole.up.shape[0] != sum(fused.rows):
            raise AdapterError(
                f"Module {name} has {whole.up.shape[0]} outputs; this base's has {sum(fused.rows)}. {whose}"
            )
        for key, low in split(name, whole, names.originals).items():
            if key in made:
                raise AdapterError(f"Module {key} occurs twice: by itself, and in a layer such as {name}.")
            made[key] = low
    return dict(sorted(made.items()))


def _whose(sources: Sequence[ImportedFile], names: Names) -> str:
    """A sentence on the family that a file which does not fit is made for, where that can be told."""
    title = title_of_adapter({key: tuple(part.shape) for one in sources for key, part in one.tensors.items()})
    if names.title and title and title != names.title:
        return f"The file is an adapter of {title}; this base is {names.title}. Import it for one of those."
    return "Was it trained on another base, or with a method other than plain LoRA?"


def _low_rank(name: str, half: Mapping[str, torch.Tensor]) -> LowRank:
    """The module's change with alpha / rank folded in; no alpha means alpha = rank."""
    low = pair(name, half)
    if "alpha" in half and half["alpha"].numel() != 1:
        raise AdapterError(f"Module {name} has an alpha of shape {tuple(half['alpha'].shape)}; expected one number.")
    scale = half["alpha"].item() / low.rank if "alpha" in half else 1.0
    return low if scale == 1.0 else LowRank(low.down, low.up.float() * scale)


def _embedding_name(token: str, taken: Collection[str]) -> str:
    """A file name that no other file of the export has; the token itself is the key inside."""
    stem = _UNSAFE.sub("", token) or "token"
    names = [f"embeddings/{stem}{number}.safetensors" for number in ("", *range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def _write_embedding(token: str, vectors: torch.Tensor, widths: Sequence[int]) -> bytes:
    """The usual embedding file, as A1111, ComfyUI and diffusers read it: one tensor named by its token.

    For two text encoders it is one tensor of each, and the file's name is the token's.
    """
    halves = vectors.detach().to("cpu", torch.float16)
    if len(widths) != len(TWO_CLIPS):
        return write_tensors({check_token(token): halves}, {"format": "pt"})
    parts = zip(TWO_CLIPS, halves.split(tuple(widths), dim=-1), strict=True)
    return write_tensors({name: part.contiguous() for name, part in parts}, {"format": "pt", OWN + TOKEN: token})
