"""A base before it is loaded: its facts, and the layers of its components read off file headers. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from training.base.facts import Facts
from training.base.files.check import check_base
from training.base.files.folder import count_parameters, find_base, layer_shapes
from training.base.names import canonical
from training.base.originals import FusedLayer, Names


@dataclass(frozen=True)
class Outline:
    """A base before it is loaded. `layers[component][name]` is the shape of a layer's weight."""

    name: str
    folder: Path
    facts: Facts
    layers: Mapping[str, Mapping[str, tuple[int, ...]]]
    parameters: int  # of all its models

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and weight shape of every layer that an adapter may change."""
        return {
            canonical(component, name): shape
            for component, found in self.layers.items()
            for name, shape in found.items()
            if len(shape) in (2, 4)
        }

    @cached_property
    def names(self) -> Names:
        """What its denoiser's layers are called by the family's own programs."""
        denoiser, shapes = self.facts.denoiser, self.layers[self.facts.denoiser]
        layers = {name for name, shape in shapes.items() if len(shape) in (2, 4)}
        originals = {
            f"{denoiser}.{path}": FusedLayer(
                tuple(canonical(denoiser, layer) for layer in one.layers),
                tuple(shapes[layer][0] for layer in one.layers),
                one.swapped,
            )
            for path, one in self.facts.originals(layers).items()
        }
        return Names(self.facts.title, originals, len(self.facts.text_encoders), self.facts.native_files)


def outline(name: str, root: str = ".") -> Outline:
    """The outline of a base, from configs and file headers.

    Raises UserError for a base that is unknown or cannot be trained.
    """
    folder = find_base(name, root)
    facts = check_base(name, folder).facts
    layers = {component: dict(layer_shapes(folder, component)) for component in facts.components}
    parameters = sum(count_parameters(folder, component) for component in facts.weighted)
    return Outline(name, folder, facts, layers, parameters)
