"""Checkpoints as the original Stable Diffusion programs write them, made from diffusers models.

The names are those of CompVis' and Stability's released files; readers are tested with what this writes.
"""

import re
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

Rules = Iterable[tuple[str, str]]

UNET_RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
VAE_ATTENTION = [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")]


def original_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    count, layers = len(unet.config.block_out_channels), unet.config.layers_per_block
    places: dict[str, str] = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    places |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    places |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    places |= {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in (0, 1)}
    places["mid_block.attentions.0"] = "middle_block.1"
    for block in range(count):
        for layer in range(layers):
            place = f"input_blocks.{1 + block * (layers + 1) + layer}"
            places[f"down_blocks.{block}.resnets.{layer}"] = f"{place}.0"
            places[f"down_blocks.{block}.attentions.{layer}"] = f"{place}.1"
        places[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
        for layer in range(layers + 1):
            place = f"output_blocks.{block * (layers + 1) + layer}"
            places[f"up_blocks.{block}.resnets.{layer}"] = f"{place}.0"
            places[f"up_blocks.{block}.attentions.{layer}"] = f"{place}.1"
        attends = hasattr(unet.up_blocks[block], "attentions")
        last = f"output_blocks.{block * (layers + 1) + layers}.{2 if attends else 1}.conv"
        places[f"up_blocks.{block}.upsamplers.0.conv"] = last
    named = _renamed(unet.state_dict(), places, UNET_RESNET)
    return {f"model.diffusion_model.{name}": tensor for name, tensor in named.items()}


def original_vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    count, layers = len(vae.config.block_out_channels), vae.config.layers_per_block
    places: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        places |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        places[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        places |= {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in (0, 1)}
        places[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
    places |= {name: name for name in ("quant_conv", "post_quant_conv")}
    for block in range(count):
        for layer in range(layers + 1):
            places[f"encoder.down_blocks.{block}.resnets.{layer}"] = f"encoder.down.{block}.block.{layer}"
            places[f"decoder.up_blocks.{block}.resnets.{layer}"] = f"decoder.up.{count - 1 - block}.block.{layer}"
        places[f"encoder.down_blocks.{block}.downsamplers.0.conv"] = f"encoder.down.{block}.downsample.conv"
        places[f"decoder.up_blocks.{block}.upsamplers.0.conv"] = f"decoder.up.{count - 1 - block}.upsample.conv"
    named = _renamed(vae.state_dict(), places, [("conv_shortcut", "nin_shortcut"), *VAE_ATTENTION])
    squares = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight")
    return {
        f"first_stage_model.{name}": tensor[:, :, None, None] if squares.search(name) else tensor
        for name, tensor in named.items()
    }


def original_clip(text: CLIPTextModel, prefix: str = "cond_stage_model.") -> dict[str, Tensor]:
    """1.x, and XL's first: transformers' own names of their day."""
    return {f"{prefix}transformer.text_model.{_bare(k)}": v for k, v in text.state_dict().items()}


def original_open_clip(text: CLIPTextModel) -> dict[str, Tensor]:
    """2.x: OpenCLIP's names, and one more layer than is read."""
    projection = torch.eye(text.config.hidden_size)
    return _open_clip(text, projection, text.config.num_hidden_layers + 1, "cond_stage_model.model.")


def original_big_clip(text: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    """XL's second: OpenCLIP's names; the projection is kept the other way round."""
    projection = text.text_projection.weight.T
    return _open_clip(text.text_model, projection, text.config.num_hidden_layers, "conditioner.embedders.1.model.")


def _open_clip(text: CLIPTextModel, projection: Tensor, kept: int, prefix: str) -> dict[str, Tensor]:
    """With q, k and v in one matrix; the last layer is repeated until there are `kept`."""
    state = {_bare(name): tensor for name, tensor in text.state_dict().items()}
    made = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "text_projection": projection,
    }
    layers = text.config.num_hidden_layers
    for layer in range(kept):
        source = f"encoder.layers.{min(layer, layers - 1)}"
        place = f"transformer.resblocks.{layer}"
        for part in ("weight", "bias"):
            qkv = [state[f"{source}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            made[f"{place}.attn.in_proj_{part}"] = torch.cat(qkv)
            made[f"{place}.attn.out_proj.{part}"] = state[f"{source}.self_attn.out_proj.{part}"]
            made[f"{place}.mlp.c_fc.{part}"] = state[f"{source}.mlp.fc1.{part}"]
            made[f"{place}.mlp.c_proj.{part}"] = state[f"{source}.mlp.fc2.{part}"]
            made[f"{place}.ln_1.{part}"] = state[f"{source}.layer_norm1.{part}"]
            made[f"{place}.ln_2.{part}"] = state[f"{source}.layer_norm2.{part}"]
    for part in ("weight", "bias"):
        made[f"ln_final.{part}"] = state[f"final_layer_norm.{part}"]
    return {f"{prefix}{name}": tensor for name, tensor in made.items()}


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")


def _renamed(state: dict[str, Tensor], places: dict[str, str], inner: Rules) -> dict[str, Tensor]:
    """Every key by its longest known place; inside resnets and attentions by `inner` rules."""
    made = {}
    for name, tensor in state.items():
        place = max((p for p in places if name.startswith(f"{p}.")), key=len)
        tail = name[len(place) + 1 :]
        if ".resnets." in place or ".attentions." in place:
            for ours, theirs in inner:
                if tail.startswith(f"{ours}."):
                    tail = theirs + tail[len(ours) :]
                    break
        made[f"{places[place]}.{tail}"] = tensor
    return made
