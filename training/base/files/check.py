"""Whether a base can be trained and served, told by its configs and the headers of its weights. Knows no torch.

Everything that would make it fail minutes later, in a worker that loads it, is said here within a second.
"""

from pathlib import Path

from training.base.facts import Facts, read_config
from training.base.families import open_family
from training.base.family import Family
from training.base.files.weights import find_weights, read_header
from training.errors import UserError


def check_trainable(name: str, facts: Facts) -> None:
    """Raises UserError for a base that is served only."""
    if facts.inpaints:
        raise UserError(
            f"Base '{name}' is made for inpainting: its UNet takes a mask and a picture beside the {facts.channels} "
            "channels of the latents. It is served, but cannot be trained on photos. Take the text-to-image base that "
            "it was made from; its adapters are served on this one, too (`serves`)."
        )


def check_base(name: str, folder: Path) -> Family:
    """The family of the base in a diffusers folder. Raises UserError saying why it cannot be used."""
    family = open_family(folder, name)
    if kind := read_config(folder, family.facts.denoiser).get("quantization_config"):
        raise UserError(
            f"Base '{name}': its {family.facts.denoiser} is quantised in the files "
            f"({kind.get('quant_method', 'unknown')}). Take the base in 16 or 32 bit, and set `base_quantization` for "
            "what it takes while it trains or is served."
        )
    for component in family.facts.weighted:
        for file in find_weights(folder, component).files:
            read_header(file)
    return family
