"""How a family's own programs name and fuse the layers of its denoiser: what other programs' adapter files go by.

A path has no component: `double_blocks.0.img_attn.qkv` of the original is made of `transformer_blocks.0.attn.to_q`,
`to_k` and `to_v` of diffusers. Knows no torch.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple


class Original(NamedTuple):
    """One layer of the original: the diffusers layers whose outputs, in this order, are its outputs.

    `swapped`: both halves of its outputs stand the other way round in diffusers.
    """

    layers: tuple[str, ...]
    swapped: bool = False


class FusedLayer(NamedTuple):
    """An `Original` of a base: canonical keys of its layers, and how many outputs each has."""

    modules: tuple[str, ...]
    rows: tuple[int, ...]
    swapped: bool = False


class Names(NamedTuple):
    """What a base and its layers are called elsewhere.

    `originals` are the layers of the family's own programs by `<denoiser>.<path>`; `native`: ai-toolkit's files have
    these names, too. `clips`: how many text encoders an adapter may change.
    """

    title: str
    originals: Mapping[str, FusedLayer]
    clips: int = 1
    native: bool = True


NO_NAMES = Names("", {})
Naming = Callable[[Collection[str]], Mapping[str, Original]]  # from a denoiser's diffusers paths, by original path
Rule = tuple[str, Original]  # as an entry of these, with `{}` for the number of a block


def by_rules(rules: Sequence[Rule], paths: Collection[str]) -> dict[str, Original]:
    """The originals of a denoiser with the layers `paths`. Left out is what is fused of layers not all there."""
    known, found = set(paths), dict[str, Original]()
    for name, rule in rules:
        first = re.compile(re.escape(rule.layers[0]).replace(r"\{\}", r"(\d+)"))
        for match in filter(None, map(first.fullmatch, sorted(paths))):
            layers = tuple(layer.format(*match.groups()) for layer in rule.layers)
            if known.issuperset(layers):
                found[name.format(*match.groups())] = Original(layers, rule.swapped)
    return found


def below(original: str, diffusers: str, tails: Mapping[str, str]) -> list[Rule]:
    """Rules for the layers of a block: original tails, each with the diffusers tails that it fuses, spaces between."""
    return [
        (f"{original}.{tail}", Original(tuple(f"{diffusers}.{layer}" for layer in layers.split())))
        for tail, layers in tails.items()
    ]


def any_like(keys: Iterable[str], pattern: str) -> bool:
    """Whether one of the keys holds `pattern`, a regular expression."""
    found = re.compile(pattern)
    return any(found.search(key) for key in keys)


def growth(shapes: Mapping[str, tuple[int, ...]], layer: str) -> set[int]:
    """How many times as many outputs as inputs the low-rank changes of layers have whose keys hold `layer`."""
    down = {m[1]: shape[1] for key, shape in shapes.items() if (m := re.match(rf"(.*{layer})_lora_(down|A)", key))}
    up = {m[1]: shape[0] for key, shape in shapes.items() if (m := re.match(rf"(.*{layer})_lora_(up|B)", key))}
    return {up[name] // down[name] for name in down.keys() & up.keys() if down[name]}


def without_naming(paths: Collection[str]) -> dict[str, Original]:
    """Of a family whose files have diffusers' names everywhere."""
    return {}
