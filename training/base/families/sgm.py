"""The names that the original Stable Diffusion programs (SGM, CompVis) give a UNet's layers, by diffusers' names.

diffusers' blocks are numbered through: `down_blocks.i.…` is one of `input_blocks`, `up_blocks.i.…` of `output_blocks`.
Source: diffusers' `_maybe_map_sgm_blocks_to_diffusers`, the other way round.
"""

import re
from collections.abc import Collection

from training.base.originals import Original

_PLACE = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ALONE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def sgm_originals(paths: Collection[str]) -> dict[str, Original]:
    """The layers of a UNet by their original paths."""
    return {original: Original((path,)) for path, original in sgm_paths(paths).items()}


def sgm_paths(paths: Collection[str]) -> dict[str, str]:
    """The original path of each of a UNet's layers, by its diffusers path; those that have none are left out.

    `paths` are all layers of the UNet: where a block's number begins depends on how many layers a block has.
    """
    found = [match for path in paths if (match := _PLACE.fullmatch(path))]
    layers = 1 + max((int(m[4]) for m in found if m[1] == "down_blocks" and m[3] == "resnets"), default=0)
    attending = {m[2] for m in found if m[1] == "up_blocks" and m[3] == "attentions"}
    named = {path: _path(path, layers, attending) for path in paths}
    return {path: name for path, name in named.items() if name is not None}


def _path(path: str, layers: int, attending: Collection[str]) -> str | None:
    if path in _ALONE:
        return _ALONE[path]
    if match := _MIDDLE.fullmatch(path):
        kind, number, tail = match.groups()
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{_tail(kind, tail)}"
    if not (match := _PLACE.fullmatch(path)):
        return None
    way, block, kind, number, tail = match.groups()
    each = layers + 1
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * each}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{int(block) * each + layers}.{2 if block in attending else 1}.{tail}"
    start, shift = ("input_blocks", 1) if way == "down_blocks" else ("output_blocks", 0)
    return f"{start}.{int(block) * each + int(number) + shift}.{int(kind == 'attentions')}.{_tail(kind, tail)}"


def _tail(kind: str, tail: str) -> str:
    return _RESNET.get(tail, tail) if kind == "resnets" else tail
