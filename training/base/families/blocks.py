"""What the FLUX families name alike: the attention of their double-stream blocks; and how to tell them apart there."""

from collections.abc import Mapping

from training.base.originals import below, growth

DOUBLE_BLOCKS = below(
    "double_blocks.{}",
    "transformer_blocks.{}",
    {
        "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
        "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
    },
)
# outputs for each input of `img_mlp.0` and `linear1`: FLUX.2's MLPs are three times as wide, and gated; FLUX.1's have 4
# and 7
FLUX_2_GROWTH = {6, 9}


def inner_growth(shapes: Mapping[str, tuple[int, ...]]) -> set[int]:
    """Of the layers whose width tells the two apart, in an adapter's tensors by key."""
    return growth(shapes, "img_mlp_0") | growth(shapes, "linear1")
