"""What a base is, read off its configs: sizes, components and defaults. No weight is loaded, torch is not imported."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, StringConstraints, ValidationError

from training.base.originals import Naming, without_naming
from training.errors import UserError
from training.storage.closed import Closed

BaseHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12,64}$")]
SamplerName = Literal["ddim", "euler", "euler_a", "dpm++_2m", "euler_karras", "euler_a_karras", "dpm++_2m_karras"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
FLOW_SAMPLERS: tuple[SamplerName, ...] = ("euler", "euler_a", "dpm++_2m")  # of bases trained by flow matching
Guidance = Literal["cfg", "embedded", "none"]
DEFAULTS_FILE = "dreamfleet.json"  # in a base's folder: what its makers recommend


@dataclass(frozen=True, slots=True)
class Facts:
    """Sizes, components and defaults of a base.

    `family` names it in data, `title` in sentences. `denoiser` and `text_encoders` are the components (folders of the
    diffusers layout) that an adapter may change; `frozen_encoders` are the text encoders that none may. `cell_px`:
    pixels a latent cell, per side; width and height of a picture are multiples of `multiple_px`. `targets` and
    `text_targets` end the names of the layers that are trained by default, `layers` and `text_layers` of all that
    adapters of this family change.
    """

    family: str
    title: str
    denoiser: str
    text_encoders: tuple[str, ...]
    channels: int
    cell_px: int
    multiple_px: int
    resolution: int
    targets: tuple[str, ...]
    text_targets: tuple[str, ...]
    layers: tuple[str, ...]
    text_layers: tuple[str, ...]
    # what a row that trains and one that draws hold per latent cell, and the VAE per pixel, in 16 bit
    trained_bytes: float
    drawn_bytes: float
    pixel_bytes: float
    prompt_tokens: int  # that the text encoder takes at once
    chunked: bool = True  # whether it takes a longer prompt piece by piece
    emphasis: bool = False  # whether phrases of a prompt may have weights and begin chunks
    word_widths: tuple[int, ...] = ()  # of a textual-inversion vector, one for each of `text_encoders`
    frozen_encoders: tuple[str, ...] = ()
    inpaints: bool = False  # whether the denoiser takes a mask and a picture beside the latents
    references: int = 0  # pictures that a prompt may refer to
    max_side_px: int | None = None  # where the denoiser's positions end
    guidance: Guidance = "cfg"
    negative: bool = True  # whether a negative prompt has a meaning
    min_snr: bool = True  # whether min-SNR weights have a meaning
    steps: int = 30
    guidance_scale: float = 7.5
    sampler: SamplerName = "ddim"
    samplers: tuple[SamplerName, ...] = SAMPLERS
    judge: str | None = None  # a model that is made for this base's pictures
    serves: tuple[str, ...] = ()  # hashes, or their beginnings, of bases whose adapters are for this one, too
    half: Literal["fp16", "bf16"] = "fp16"  # what it is served in on CUDA, unless the server is told
    # what other programs' files say of it: modelspec's architecture, kohya's name, what it predicts, its own layers
    architecture: str = ""
    kohya_base: str = ""
    prediction: Literal["epsilon", "v", ""] = ""
    originals: Naming = without_naming
    native_files: bool = True  # whether ai-toolkit's files have the names of `originals`, too, or diffusers'

    @property
    def components(self) -> tuple[str, ...]:
        """The components that an adapter may change."""
        return (self.denoiser, *self.text_encoders)

    @property
    def weighted(self) -> tuple[str, ...]:
        """The components that have weights."""
        return (*self.components, *self.frozen_encoders, "vae")

    @property
    def word_width(self) -> int:
        """The length of a textual-inversion vector: of all encoders together."""
        return sum(self.word_widths)

    @property
    def latent_side(self) -> int:
        """Cells a side of a latent at the base's own resolution."""
        return self.resolution // self.cell_px


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """A component's config. Raises UserError if it is missing or no JSON object."""
    file = folder / component / "config.json"
    if not file.is_file():
        raise UserError(f"Base folder '{folder}' has no {component}/config.json.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"Base file '{file}' is no JSON object. Download it again.")
    return config


def check_class(name: str, component: str, config: dict[str, Any], wanted: str) -> None:
    """Raises UserError unless the config is of the class `wanted`."""
    found = config.get("_class_name", wanted)
    if found != wanted:
        raise UserError(f"Base '{name}': its {component} is a {found}; supported is {wanted}.")


def check_files(name: str, folder: Path, *needed: tuple[tuple[str, ...], ...]) -> None:
    """Raises UserError unless of each of `needed` one of its groups of files is there, whole."""
    for groups in needed:
        if not any(all((folder / file).is_file() for file in files) for files in groups):
            said = ", or ".join(" and ".join(files) for files in groups)
            raise UserError(f"Base '{name}': folder '{folder}' has no {said}. Give a whole diffusers folder.")


class _Defaults(Closed):
    """What `dreamfleet.json` may hold."""

    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    sampler: SamplerName | None = None
    judge: str | None = None
    serves: tuple[BaseHash, ...] | None = None


def with_defaults(facts: Facts, folder: Path) -> Facts:
    """`facts` with the defaults that the base's own folder names in `dreamfleet.json`.

    Raises UserError if the file names something else, or a value that cannot be.
    """
    file = folder / DEFAULTS_FILE
    if not file.is_file():
        return facts
    try:
        said = _Defaults.model_validate_json(file.read_bytes())
    except ValidationError as error:
        (first, *_) = error.errors()
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        known = ", ".join(_Defaults.model_fields)
        raise UserError(f"'{file}': {place} is {first['input']!r}: {first['msg']}. Known keys: {known}.") from None
    return replace(facts, **said.model_dump(exclude_none=True))
