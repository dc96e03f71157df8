"""A base before it is loaded: its facts, and the layers of its components read off file headers. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from training.base.facts import Facts
from training.base.families import open_family
from training.base.folder import find_base, layer_shapes
from training.base.names import canonical


@dataclass(frozen=True)
class Outline:
    """A base before it is loaded. `layers[component][name]` is the shape of a layer's weight."""

    name: str
    folder: Path
    facts: Facts
    layers: Mapping[str, Mapping[str, tuple[int, ...]]]

    @cached_property
    def parameters(self) -> int:
        """Weights of all layers of the components that an adapter may change."""
        return sum(prod(shape) for found in self.layers.values() for shape in found.values())

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and weight shape of every layer that an adapter may change."""
        return {
            canonical(component, name): shape
            for component, found in self.layers.items()
            for name, shape in found.items()
            if len(shape) in (2, 4)
        }


def outline(name: str, root: str = ".") -> Outline:
    """The outline of a base, from configs and file headers. Raises UserError for an unknown or unsupported base."""
    folder = find_base(name, root)
    facts = open_family(folder, name).facts
    layers = {component: dict(layer_shapes(folder, component)) for component in facts.components}
    return Outline(name, folder, facts, layers)
