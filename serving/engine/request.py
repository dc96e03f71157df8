"""What an engine is asked for and what it returns: complete and checked. Knows neither torch nor HTTP.

The HTTP app resolves ids, defaults and limits, so an engine gets a complete `GenerateRequest`. These types
also go to and from Ray deployments, as pydantic dumps.
"""

from typing import Annotated, Literal

from pydantic import Field

from training.base.facts import SamplerName
from training.storage.closed import Closed
from training.storage.networks import NetworkKind

ImageFormat = Literal["png", "jpeg", "webp"]
PromptSyntax = Literal["plain", "a1111"]
NETWORK_TITLES: dict[NetworkKind, str] = {"control": "ControlNet", "ip-adapter": "IP-Adapter"}
ControlPreprocess = Literal["none", "canny"]
MAX_SEED = 2**53 - 1  # above it JavaScript numbers, and floats in an OpenAPI document, cannot hold every integer


class AdapterRef(Closed):
    """One immutable version of one adapter."""

    tenant: str
    id: str
    version: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.id}@{self.version}"

    def __hash__(self) -> int:
        return hash((self.tenant, self.id, self.version))


class AdapterUse(Closed):
    """An adapter in a request's mix. `weight` scales its delta; negative weights subtract it."""

    ref: AdapterRef
    weight: float = 1.0


class EditMask(Closed):
    """Which part of a request's picture is redrawn, and how it is put back."""

    data: bytes | None = Field(default=None, description="an encoded mask, of the picture's size; none: its own alpha")
    means: Literal["clear", "white"] = Field(
        default="clear", description="what is redrawn: where it is transparent, or where it is white or opaque"
    )
    required: bool = Field(default=True, description="without it, all is redrawn where there is none")
    inverted: bool = False
    blur_px: float = Field(default=0.0, ge=0, le=256, description="a Gaussian over the mask's edge, to both sides")
    feather_px: int = Field(default=0, ge=0, le=64, description="fades in from the mask's edge, only inside it")
    fill: Literal["original", "fill", "noise", "nothing"] = Field(
        default="original", description="what drawing starts from there: the picture, its surroundings, noise, zeros"
    )
    only_masked: bool = Field(default=False, description="the part around the mask is drawn at the request's size")
    padding_px: int = Field(default=32, ge=0, le=1024, description="of the picture, around the mask in `only_masked`")
    keep_size: bool = Field(default=False, description="what is finished has the picture's size, not the request's")


class Hires(Closed):
    """A second pass: what is drawn is enlarged and redrawn."""

    width: int = Field(ge=1, description="pixels of the finished picture")
    height: int = Field(ge=1)
    steps: int = Field(ge=1, description="of a whole run: `strength` of them are taken")
    strength: float = Field(gt=0, le=1)
    upscaler: Literal["latent", "lanczos"] = "lanczos"


class NetworkRef(Closed):
    """One state of a ControlNet or an IP-Adapter on the storage."""

    kind: NetworkKind
    name: str
    version: str

    def __str__(self) -> str:
        return f"{NETWORK_TITLES[self.kind]} '{self.name}'"

    def __hash__(self) -> int:
        return hash((self.kind, self.name, self.version))


class ControlUse(Closed):
    """A ControlNet in a request: it steers by `image` with `scale`, from the share `start` of the steps to `end`."""

    ref: NetworkRef
    image: bytes
    preprocess: ControlPreprocess = "none"
    scale: float = 1.0
    start: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)


class ImagePromptUse(Closed):
    """A picture in place of words, read by an IP-Adapter; `scale`: how much it counts beside the prompt."""

    ref: NetworkRef
    image: bytes
    scale: float = 1.0


class GenerateRequest(Closed):
    """`count` images of one prompt; image i has seed `seed + i`."""

    request_id: str = ""
    tenant: str = "default"
    prompt: str
    negative_prompt: str = ""
    prompt_syntax: PromptSyntax = Field(default="plain", description="how both prompts are read")
    adapters: tuple[AdapterUse, ...] = ()
    width: int = Field(ge=1, description="pixels")
    height: int = Field(ge=1, description="pixels")
    count: int = Field(default=1, ge=1)
    seed: int = Field(ge=0, le=MAX_SEED)
    steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    scheduler: SamplerName = "ddim"
    image: bytes | None = Field(default=None, description="an encoded picture to start from (image-to-image)")
    strength: float = Field(default=0.8, gt=0, le=1, description="how much of the picture is redrawn: 1 is all of it")
    mask: EditMask | None = Field(default=None, description="the part of `image` that is redrawn; all of it without")
    references: tuple[bytes, ...] = Field(default=(), description="encoded pictures that the prompt refers to")
    hires: Hires | None = None
    controls: tuple[ControlUse, ...] = ()
    image_prompts: tuple[ImagePromptUse, ...] = ()
    previews: int = Field(default=0, ge=0, description="previews of each image while it runs")
    output_format: ImageFormat = "png"
    output_quality: int = Field(default=95, ge=0, le=100, description="of jpeg and webp")
    linked: bool = Field(default=False, description="its pictures are kept for links that lead to them")
    deadline_s: float = Field(default=600.0, gt=0)
    reading: bool = Field(default=False, description="makes nothing: reads the noise that `image` began as")
    expected: tuple[int, ...] = Field(default=(), description="of a reading: serials of pictures that look alike")
    cut_cells: int = Field(default=0, ge=0, le=16, description="of a reading: cells that may be missing above and left")

    @property
    def pixels(self) -> int:
        """Pixels of a finished picture, where it does not take its size from `image`."""
        last = self.hires or self
        return last.width * last.height


class Preview(Closed):
    """An unfinished image: the model's guess of it after `step` of `steps` steps."""

    kind: Literal["preview"] = "preview"
    index: int
    number: int = Field(description="0 for the first preview of the image")
    step: int
    steps: int
    data: bytes


class FinishedPicture(Closed):
    """A finished image, encoded."""

    kind: Literal["picture"] = "picture"
    index: int
    seed: int
    data: bytes
    kept: str = Field(default="", description="`<shelf>/<id>` of the picture, where the server keeps it")

    @property
    def history_id(self) -> str | None:
        """Its id in the history, where the server keeps one."""
        return self.kept.removeprefix("history/") if self.kept.startswith("history/") else None


Event = Annotated[Preview | FinishedPicture, Field(discriminator="kind")]


class NoiseReading(Closed):
    """What the noise of a picture says: the likeliest message, and how likely unmarked noise says one as clearly."""

    serial: int = Field(description="48 bits; the last 16 times `words` were read")
    words: int
    log10: float = Field(description="of the false-positive probability")
    z: float = Field(description="how far the weakest word stands out, in standard deviations")
