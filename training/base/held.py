"""What a layer inside a model returns while the model runs."""

from collections.abc import Callable
from typing import Any

from torch import nn


def output_of(layer: nn.Module, run: Callable[[], object]) -> Any:
    """The output of `layer` in a run."""
    held: list[Any] = []
    hook = layer.register_forward_hook(lambda _module, _inputs, output: held.append(output))
    try:
        run()
    finally:
        hook.remove()
    return held[0]
