"""An adapter fused into its base: a full model folder that needs no adapter, for programs that know none."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

from training.adapters.adapter import Adapter
from training.adapters.layout import find_sites
from training.adapters.merge import merge_adapters
from training.base.base import Base, load_base
from training.base.facts import DEFAULTS_FILE
from training.base.files.weights import find_weights
from training.errors import UserError
from training.storage.delivery import delivered


class Fused(NamedTuple):
    """How many layers were changed, and the tokens that stand for each word: diffusers puts in all for the first."""

    layers: int
    words: dict[str, list[str]]


def fuse_base(base_name: str, parts: Sequence[tuple[Adapter, float]], out: Path, *, root: str = ".") -> Fused:
    """Writes a diffusers folder of the base with every adapter, times its weight, added to its layers; fp16.

    Trained words become tokens of its tokenizer and text encoder, as they are, whatever the weight. Raises UserError,
    and writes nothing, if `out` holds something, a module has no layer, or a word is one of the base's or means two
    things.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"'{out}' is not empty. Name a new folder.")
    adapter = merge_adapters(parts) if parts else Adapter({})
    base = load_base(base_name, device="cpu", root=root)
    _add_deltas(base, adapter)
    variant = find_weights(base.folder, base.facts.denoiser).variant
    pipeline = DiffusionPipeline.from_pretrained(base.folder, variant=variant, **base.parts.models)
    words = {word: _add_word(pipeline, base, word, adapter.embeddings[word]) for word in sorted(adapter.embeddings)}
    with delivered(out) as folder:
        pipeline.to(torch.float16).save_pretrained(folder)
        if (base.folder / DEFAULTS_FILE).is_file():
            shutil.copy(base.folder / DEFAULTS_FILE, folder)
    return Fused(len(adapter.modules), words)


def _add_deltas(base: Base, adapter: Adapter) -> None:
    layers = {
        site.key: site.layer
        for component, model in base.models.items()
        for site in find_sites(component, model, [name for name, _ in model.named_modules() if name])
    }
    for key, low in adapter.modules.items():
        if key not in layers:
            raise UserError(f"Adapter module '{key}' has no layer in base '{base.name}'.")
        with torch.no_grad():
            layers[key].weight += low.delta().to(layers[key].weight)


def _add_word(pipeline: Any, base: Base, word: str, vectors: torch.Tensor) -> list[str]:
    """Adds a word of one or more vectors [V, D] to the tokenizer of each text encoder; returns its tokens."""
    vectors_VD = vectors.reshape(-1, vectors.shape[-1])
    width = base.facts.word_width
    if vectors_VD.shape[1] != width:
        raise UserError(f"Word {word} has vectors of width {vectors_VD.shape[1]}; this base needs {width}.")
    parts = vectors_VD.split(base.facts.word_widths, dim=1)
    tokens: list[str] = []
    for name, part_VD in zip(base.facts.text_encoders, parts, strict=True):
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        if not tokenizer.get_vocab().keys().isdisjoint((word, word.lower())):  # the tokenizer reads lower case
            raise UserError(f"Word {word} is one of the base's own. Fuse an adapter whose words are new, such as <s1>.")
        before = len(tokenizer)
        pipeline.load_textual_inversion(
            {word: part_VD.contiguous()}, token=word, tokenizer=tokenizer, text_encoder=getattr(pipeline, name)
        )
        tokens = tokenizer.convert_ids_to_tokens(range(before, len(tokenizer)))
    return tokens
