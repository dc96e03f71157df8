"""The `lora_diffusion` package's format (cloneofsimo): keys are positions, `unet:{i}:up`, `text_encoder:{i}:down`.

Position i counts the adapted linear layers in the order in which that package walks the model that diffusers has made:
blocks down, up, mid; in a transformer block attn1, attn2, ff; in a CLIP attention k, v, q, out. The diffusers of its
time had attn1, ff, attn2. Both are read: a GEGLU projection has eight times as many outputs as inputs, so its place
tells them apart. The first is written: the package reads it with any diffusers of today. Trained tokens are tensors
named by the token.
"""

import json
import re
from collections.abc import Collection, Sequence

import torch

from training.adapters.adapter import Adapter, AdapterError, check_token, some
from training.adapters.formats.parts import ImportedFile, ImportedParts, halves, own_metadata
from training.adapters.tensor_file import write_tensors

_KEY = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_EMBED = "<embed>"
_ATTENTION = ["Attention", "CrossAttention"]
_BLOCK = re.compile(
    r"unet\.(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.(.+)"
)
_LAYER = re.compile(r"text_encoder\.text_model\.encoder\.layers\.(\d+)\.self_attn\.(\w+)")
_BLOCKS = ("down_blocks", "up_blocks", "mid_block")
_GEGLU = "ff.net.0.proj"
_FIRST, _SECOND = (tuple(f"{n}.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")) for n in ("attn1", "attn2"))
_LINEARS = (*_FIRST, *_SECOND, _GEGLU)
_LINEARS_THEN = (*_FIRST, _GEGLU, *_SECOND)  # in files made with diffusers of early 2023
_CLIP_LINEARS = ("k_proj", "v_proj", "q_proj", "out_proj")


def is_lora_diffusion(keys: Sequence[str]) -> bool:
    """Whether a file with `keys` is in this format."""
    return any(_KEY.fullmatch(key) for key in keys)


def write_lora_diffusion(adapter: Adapter, modules: Collection[str]) -> dict[str, bytes]:
    """`lora_weight.safetensors`, which that package reads and which holds everything; beside it the text encoder alone.

    Raises AdapterError if the adapter changes what the format has no position for, or leaves a position empty.
    """
    if not modules:
        raise AdapterError("Format lora_diffusion counts the base's modules: say for which base to export.")
    wide = any(name.endswith(_GEGLU) for name in adapter.modules)
    orders = {"unet": unet_order(modules, wide), "text_encoder": text_encoder_order(modules)}
    orders = {component: order for component, order in orders.items() if not set(order).isdisjoint(adapter.modules)}
    _check_positions(adapter, [name for order in orders.values() for name in order])
    classes = {"unet": [*_ATTENTION, *(["GEGLU"] if wide else [])], "text_encoder": ["CLIPAttention"]}
    tokens = {check_token(token): vectors for token, vectors in adapter.embeddings.items()}
    tensors, metadata = halves(tokens), own_metadata(adapter) | dict.fromkeys(tokens, _EMBED)
    files = {}
    for component, order in orders.items():
        part, notes = _numbered(component, adapter, order)
        notes[component] = json.dumps(classes[component])
        tensors |= part
        metadata |= notes
        if component == "text_encoder":
            files["lora_weight.text_encoder.safetensors"] = write_tensors(part, notes)
    return files | {"lora_weight.safetensors": write_tensors(tensors, metadata)}


def read_lora_diffusion(source: ImportedFile, modules: Collection[str], parts: ImportedParts) -> None:
    """Adds what `source` holds to `parts`; raises AdapterError if its positions are not those of this base."""
    counts = dict[str, set[int]]()
    for key in source.tensors:
        if match := _KEY.fullmatch(key):
            counts.setdefault(match[1], set()).add(int(match[2]))
    orders = {name: _order_of(source, name, seen, modules) for name, seen in counts.items()}
    for key, tensor in source.tensors.items():
        if match := _KEY.fullmatch(key):
            parts.add(orders[match[1]][int(match[2])], match[3], tensor)
        elif source.metadata.get(key) == _EMBED:
            parts.embed(check_token(key), tensor)
        else:
            parts.unused.append(key)


def unet_order(modules: Collection[str], wide: bool, then: bool = False) -> list[str]:
    """The UNet's adapted linear layers by position; `wide` with the GEGLU projections, `then` as diffusers had them."""
    linears = [name for name in (_LINEARS_THEN if then else _LINEARS) if wide or name != _GEGLU]
    found = {}
    for name in modules:
        if (match := _BLOCK.fullmatch(name)) and match[5] in linears:
            numbers = (int(match[2] or 0), int(match[3]), int(match[4]))
            found[(_BLOCKS.index(match[1]), *numbers, linears.index(match[5]))] = name
    return [found[position] for position in sorted(found)]


def text_encoder_order(modules: Collection[str]) -> list[str]:
    """The text encoder's adapted linear layers by position."""
    found = {}
    for name in modules:
        if (match := _LAYER.fullmatch(name)) and match[2] in _CLIP_LINEARS:
            found[(int(match[1]), _CLIP_LINEARS.index(match[2]))] = name
    return [found[position] for position in sorted(found)]


def _order_of(source: ImportedFile, component: str, seen: set[int], modules: Collection[str]) -> list[str]:
    """The modules behind the positions `seen` of a component: by their count, and by where its GEGLU shapes are."""
    if component == "text_encoder":
        orders = [text_encoder_order(modules)]
    else:
        orders = [unet_order(modules, wide=False), *(unet_order(modules, True, then) for then in (False, True))]
    for order in orders:
        if seen == set(range(len(order))) and _has_its_shapes(source, component, order):
            return order
    allowed = " or ".join(dict.fromkeys(str(len(order)) for order in orders))
    raise AdapterError(
        f"{source.name} changes {len(seen)} modules of the {component}, this base has {allowed} for the format "
        "lora_diffusion, in another order or of other shapes. Was it trained on another base?"
    )


def _has_its_shapes(source: ImportedFile, component: str, order: Sequence[str]) -> bool:
    """Whether the GEGLU projections of `order`, and no queries, have more outputs than inputs."""
    for index, name in enumerate(order):
        down, up = (source.tensors.get(f"{component}:{index}:{part}") for part in ("down", "up"))
        if down is None or up is None or down.ndim != 2 or up.ndim != 2:
            continue  # told when the halves are joined
        if name.endswith((_GEGLU, ".to_q")) and (up.shape[0] > down.shape[1]) != name.endswith(_GEGLU):
            return False
    return True


def _check_positions(adapter: Adapter, order: Sequence[str]) -> None:
    for problem, names in (
        ("has no place for", sorted(set(adapter.modules) - set(order))),
        ("needs a change of", sorted(set(order) - set(adapter.modules))),
    ):
        if names:
            raise AdapterError(
                f"Format lora_diffusion {problem} {len(names)} modules: {some(names)}. Use diffusers, kohya or peft."
            )


def _numbered(component: str, adapter: Adapter, order: Sequence[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A component's tensors by position, and the ranks that go into the metadata."""
    tensors, ranks = dict[str, torch.Tensor](), dict[str, str]()
    for index, name in enumerate(order):
        low = adapter.modules[name]
        tensors[f"{component}:{index}:down"], tensors[f"{component}:{index}:up"] = low.down, low.up
        ranks[f"{component}:{index}:rank"] = str(low.rank)
    return halves(tensors), ranks
