"""A linear layer with a quantised weight that nobody trains, in a forward that others' gradients pass through."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class FrozenLinear(torch.autograd.Function):
    """Saves nothing for backward but the layer itself, whose weight is unpacked there once more."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Linear, x: Tensor) -> Tensor:
        """The layer's output of `x`."""
        ctx.layer = layer
        return functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        """The gradient of `x`."""
        (gradient,) = gradients
        weight: Any = ctx.layer.weight
        return None, gradient @ weight.dequantize().to(gradient.dtype)
