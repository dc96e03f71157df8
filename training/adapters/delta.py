"""What one layer adds to the rows of a forward: the low-rank product, and where in its rows.

Shape suffixes: N rows of a batch, G groups of neighbouring rows that wear the same, K adapters a row mixes, R = K x
rank, I and O a layer's inputs and outputs, T tokens or cells.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.adapters.coverage import Coverage
from training.base.tokens import TokenKind

Where = tuple[Coverage, TokenKind]  # the parts of its rows that a layer changes


@dataclass(frozen=True, slots=True)
class Delta:
    """What one layer adds: `down` [G, R, I] (R = K x rank) and `up` [G, R, O], for G groups of neighbouring rows."""

    down: Tensor
    up: Tensor


def add_linear(x: Tensor, output: Tensor, delta: Delta, where: Where | None) -> Tensor:
    """output [N, ..., O] + (x [N, ..., I] down^T) up; each of G groups of rows has its own down and up."""
    g = delta.down.shape[0]
    x_GTI = x.reshape(g, -1, x.shape[-1])
    low_GTR = torch.bmm(x_GTI, delta.down.transpose(1, 2))
    if where is not None:
        coverage, kind = where
        share_NTK = coverage.of_tokens(kind, x[0, ..., 0].numel(), low_GTR)
        low_GTKr = low_GTR.unflatten(2, (share_NTK.shape[2], -1))
        low_GTR = (low_GTKr * share_NTK.reshape(*low_GTKr.shape[:3], 1)).flatten(2)
    return _add_product(output.reshape(g, -1, output.shape[-1]), low_GTR, delta.up).view(output.shape)


def add_conv(layer: nn.Conv2d, x: Tensor, output: Tensor, delta: Delta, where: Where | None) -> Tensor:
    """The same for a convolution: G small convolutions run as one grouped one, then a 1x1 up for every row."""
    g, ranks, _ = delta.down.shape
    n, channels, *size = x.shape
    m = n // g  # rows a group
    low = functional.conv2d(
        x.view(g, m, channels, *size).transpose(0, 1).reshape(m, g * channels, *size),
        delta.down.reshape(g * ranks, channels, *layer.kernel_size),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=g,
    )
    low_NRT = low.view(m, g, ranks, -1).transpose(0, 1).reshape(n, ranks, -1)
    if where is not None:
        share_NKT = where[0].of_cells((output.shape[2], output.shape[3]), low_NRT)
        low_NRT = (low_NRT.unflatten(1, (share_NKT.shape[1], -1)) * share_NKT[:, :, None]).flatten(1, 2)
    up_NOR = delta.up.transpose(1, 2).repeat_interleave(m, dim=0) if m > 1 else delta.up.transpose(1, 2)
    return _add_product(output.reshape(n, output.shape[1], -1), up_NOR, low_NRT).view(output.shape)


def _add_product(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """output + left x right, batched; written over the layer's own fresh output where no gradient will ask for it."""
    if torch.is_grad_enabled():
        return torch.baddbmm(output, left, right)
    return output.baddbmm_(left, right)
