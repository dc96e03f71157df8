"""An adapter: the low-rank changes to a frozen base that one subject's training produces, and its one file.

Owns the form in memory, the canonical file and what makes an adapter acceptable. Knows nothing about other programs'
formats (`formats.py`) or where files are kept (`registry.py`).

Module keys are `<component>.<module path>`: `unet.down_blocks.0…attn1.to_q`,
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj` (`text_model.` always present, whatever transformers calls
it). Shapes: r rank, in/out features or channels, kh/kw kernel.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from training.adapters.tensor_file import TensorFileError, read_tensors, write_tensors
from training.errors import UserError
from training.storage.card import MAX_BYTES as MAX_BYTES
from training.storage.storage import content_id

# the file carries these and nothing else that is not a tensor; `word_widths` ("768,1280"): of the parts of a word's
# vectors, where several text encoders read one each
METADATA = ("base", "base_hash", "class", "trigger", "word_widths")
_PADDED = "dreamfleet.padded"
CANONICAL = "dreamfleet"  # the metadata key, with the version of the layout, that marks a canonical file
_FORMAT = {"format": "pt", CANONICAL: "1"}
_EMBEDDING = "lora_embeddings."  # diffusers refuses a file with a key that lacks `lora`, and ignores this prefix
_SUFFIXES = {
    "unet": (".lora.down.weight", ".lora.up.weight"),
    "transformer": (".lora_A.weight", ".lora_B.weight"),
    "text_encoder": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "text_encoder_2": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}
_TOKEN = re.compile(r"[^\s\x00-\x1f\x7f]{1,64}")


class AdapterError(UserError):
    """The adapter, or the file it should come from, cannot be used; the message names the modules."""


class LowRank(NamedTuple):
    """One module's change, `up @ down`; the usual scale alpha/rank is folded into `up`."""

    down: torch.Tensor  # [r, in], for a convolution [r, in, kh, kw]
    up: torch.Tensor  # [out, r], for a convolution [out, r, 1, 1]

    @property
    def rank(self) -> int:
        """r"""
        return self.down.shape[0]

    def delta(self) -> torch.Tensor:
        """The change of the weight, [out, in] or [out, in, kh, kw], in float32."""
        change = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return change.reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True, slots=True)
class Adapter:
    """All changes of one subject. Tensors keep the type and device they came with; nothing here modifies them."""

    modules: dict[str, LowRank]
    # textual-inversion token -> [dim] or [vectors, dim]
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The highest rank of any module; 0 without modules."""
        return max((low.rank for low in self.modules.values()), default=0)


def version_of(data: bytes) -> str:
    """The version that a file of these bytes is: their SHA-256 in hex."""
    return content_id(data)


def save_adapter(adapter: Adapter) -> bytes:
    """The canonical file: float16 safetensors with the keys that diffusers 0.30 to 0.42 loads as they are.

    Ranks that differ within a component are padded: diffusers before 0.42 scales all its modules by the first rank.
    Equal adapters give equal bytes. Metadata beyond `METADATA` is dropped. Raises AdapterError if a value is not finite
    in float16, a key belongs to no known component, or nothing is in it.
    """
    tensors = {}
    for name, low in padded(adapter.modules).items():
        down, up = _SUFFIXES[_component(name)]
        tensors[name + down], tensors[name + up] = low.down, low.up
    for token, vectors in adapter.embeddings.items():
        tensors[_EMBEDDING + check_token(token)] = vectors
    if not tensors:
        raise AdapterError("An adapter without any module cannot be saved. Train or import at least one.")
    halves = {key: tensor.detach().to("cpu", torch.float16) for key, tensor in tensors.items()}
    check_finite(halves)
    metadata = {key: adapter.metadata[key] for key in METADATA if adapter.metadata.get(key)}
    return write_tensors(halves, _FORMAT | metadata | padding_note(adapter.modules))


def load_adapter(data: bytes) -> Adapter:
    """The adapter in a canonical file: inverse of `save_adapter`. Raises AdapterError, also for non-finite values."""
    try:
        file = read_tensors(data, "The adapter file", MAX_BYTES)
    except TensorFileError as error:
        raise AdapterError(str(error)) from error
    check_finite(file.tensors)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    embeddings, unknown = {}, []
    for key, tensor in file.tensors.items():
        if key.startswith(_EMBEDDING):
            embeddings[check_token(key.removeprefix(_EMBEDDING))] = tensor
        elif split := _split(key):
            halves.setdefault(split[0], {})[split[1]] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise AdapterError(f"The adapter file has keys that are not canonical: {some(unknown)}. Import it instead.")
    modules = {name: pair(name, half) for name, half in sorted(halves.items())}
    metadata = {key: value for key, value in file.metadata.items() if key in METADATA}
    return Adapter(trimmed(modules, file.metadata), embeddings, metadata)


def check_adapter(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], max_rank: int) -> None:
    """Raises AdapterError unless `adapter` fits a base whose modules' weights have `shapes`.

    `shapes` maps canonical keys to [out, in] or [out, in, kh, kw].
    """
    if not adapter.modules and not adapter.embeddings:
        raise AdapterError("The adapter changes nothing: it holds no module.")
    unmatched = [name for name in adapter.modules if name not in shapes]
    if unmatched:
        count = f"{len(unmatched)} of {len(adapter.modules)}"
        raise AdapterError(f"{count} modules are not in this base: {some(unmatched)}. Was it trained on another base?")
    for name, low in adapter.modules.items():
        _check_form(name, low)
        made = (low.up.shape[0], *low.down.shape[1:])
        if made != tuple(shapes[name]):
            raise AdapterError(f"Module {name} has the shape {made}; this base needs {tuple(shapes[name])}.")
        if low.rank > max_rank:
            raise AdapterError(f"Module {name} has rank {low.rank}; at most {max_rank} is allowed. Reduce the rank.")
    check_finite(named_tensors(adapter))


def padded(modules: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The same changes with one rank for each component; the added components are zero."""
    ranks: dict[str, int] = {}
    for name, low in modules.items():
        _check_form(name, low)
        component = _component(name)
        ranks[component] = max(ranks.get(component, 0), low.rank)
    return {name: _pad(low, ranks[_component(name)]) for name, low in modules.items()}


def padding_note(modules: Mapping[str, LowRank]) -> dict[str, str]:
    """The metadata that makes `trimmed` take away what `padded` has added to `modules`."""
    changed = any(low.rank != modules[name].rank for name, low in padded(modules).items())
    return {_PADDED: "1"} if changed else {}


def trimmed(modules: Mapping[str, LowRank], metadata: Mapping[str, str]) -> dict[str, LowRank]:
    """Inverse of `padded` for a file with `metadata`; other files' modules stay as they are."""
    return {name: _trim(low) for name, low in modules.items()} if _PADDED in metadata else dict(modules)


def named_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """All tensors of `adapter` under names for messages: `<module>.down`, `<module>.up`, tokens."""
    halves = {f"{name}.{part}": t for name, low in adapter.modules.items() for part, t in low._asdict().items()}
    return halves | adapter.embeddings


def pair(name: str, half: Mapping[str, torch.Tensor]) -> LowRank:
    """The LowRank of module `name` from its `down` and `up`; raises AdapterError if one lacks or they do not fit."""
    missing = [part for part in ("down", "up") if part not in half]
    if missing:
        raise AdapterError(f"Module {name} has no {missing[0]!r} tensor. The file is incomplete.")
    low = LowRank(half["down"], half["up"])
    _check_form(name, low)
    return low


def check_token(token: str) -> str:
    """`token`, if it can name a textual-inversion embedding; raises AdapterError otherwise."""
    if not _TOKEN.fullmatch(token):
        raise AdapterError(f"Bad token {token!r}: use 1 to 64 characters without spaces, such as <s1>.")
    return token


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few of `names`, and how many there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({limit} of {len(names)} shown)"


def _component(name: str) -> str:
    component, _, path = name.partition(".")
    if component not in _SUFFIXES or not path:
        raise AdapterError(f"Module {name!r} belongs to no known component: {', '.join(_SUFFIXES)}.")
    if component.startswith("text_encoder") and not path.startswith("text_model.") and path != "text_projection":
        raise AdapterError(f"Module {name!r} is not canonical: expected {component}.text_model.{path}.")
    return component


def _pad(low: LowRank, rank: int) -> LowRank:
    more = rank - low.rank
    if not more:
        return low
    down = torch.cat([low.down, low.down.new_zeros(more, *low.down.shape[1:])])
    up = torch.cat([low.up, low.up.new_zeros(low.up.shape[0], more, *low.up.shape[2:])], dim=1)
    return LowRank(down, up)


def _trim(low: LowRank) -> LowRank:
    """`low` without the components at its end that are zero on both sides; one is always left."""
    used = low.down.flatten(1).any(1) | low.up.transpose(0, 1).flatten(1).any(1)
    rank = int(used.nonzero().max()) + 1 if used.any() else 1
    return LowRank(low.down[:rank].contiguous(), low.up[:, :rank].contiguous())


def _split(key: str) -> tuple[str, str] | None:
    """Module and part of a canonical tensor key."""
    down, up = _SUFFIXES.get(key.partition(".")[0], ("", ""))
    for suffix, part in ((down, "down"), (up, "up")):
        if suffix and key.endswith(suffix):
            return key.removesuffix(suffix), part
    return None


def _check_form(name: str, low: LowRank) -> None:
    down, up = low.down.shape, low.up.shape
    linear = len(down) == 2 and len(up) == 2
    convolution = len(down) == 4 and len(up) == 4 and tuple(up[2:]) == (1, 1)
    if not (linear or convolution) or down[0] != up[1] or down[0] == 0:
        raise AdapterError(
            f"Module {name} has down {tuple(down)} and up {tuple(up)}; expected [r, in] and [out, r], or "
            "[r, in, kh, kw] and [out, r, 1, 1]."
        )


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises AdapterError naming the tensors with NaN or infinite values."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise AdapterError(f"{len(bad)} tensors hold NaN or infinite values: {some(bad)}.")
