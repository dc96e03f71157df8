"""Whether a base can be trained and served, told by its configs and the headers of its weights. Knows no torch.

Everything that would make it fail minutes later, in a worker that loads it, is said here within a second.
"""

from pathlib import Path

from training.base.families import open_family
from training.base.family import Family
from training.base.files.weights import find_weights, read_header


def check_base(name: str, folder: Path) -> Family:
    """The family of the base in a diffusers folder. Raises UserError saying why it cannot be trained."""
    family = open_family(folder, name)
    for component in family.facts.weighted:
        for file in find_weights(folder, component).files:
            read_header(file)
    return family
