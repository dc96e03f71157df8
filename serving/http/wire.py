"""What goes over HTTP: bodies and replies, as OpenAI's images API has them, with some additions. Knows no torch.

Bodies are closed: an unknown field is an error that names it. Limits that depend on the server are checked in
`intake.py`; here is only what holds for every server.
"""

import json
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serving.engine.request import MAX_SEED, ImageFormat, PromptSyntax
from serving.http.defaults import ImageDefaults
from serving.http.networks.wire import ControlBody, ImagePromptBody
from training.base.facts import SamplerName
from training.storage.closed import Closed

# Every string has a largest length, whatever the server's own limits are: pydantic checks it before anything else. It
# is also what makes pydantic refuse a lone surrogate, which no encoder and no reply can hold.
MAX_PROMPT = 20_000
MAX_NAME = 300
MAX_PICTURE = 96 * 2**20  # base64 of the largest picture
Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
Name = Annotated[str, Field(max_length=MAX_NAME)]
SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
ADAPTER_NAME = r"^[a-z0-9][a-z0-9._-]{0,62}(/[a-z0-9][a-z0-9._-]{0,62})?(@[0-9a-f]{6,64})?$"


class WornAdapter(Closed):
    """An adapter in a mix."""

    id: Annotated[
        str,
        Field(
            pattern=ADAPTER_NAME,
            max_length=MAX_NAME,
            description="`<id>`, `<tenant>/<id>`, either with `@<version>`",
            examples=["rusty"],
        ),
    ]
    weight: Annotated[float, Field(description="scales its effect; negative subtracts it", examples=[1.0])] = 1.0


def from_json(value: object) -> object:
    """JSON, as a form sends what is not one value."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("is no JSON") from None


class HiresBody(Closed):
    """A second pass: the picture is enlarged by `scale` and redrawn by `strength`."""

    scale: float = Field(2.0, gt=1, le=8)
    steps: int | None = Field(None, ge=1, description="of a whole run, of which `strength` is taken; as of the first")
    strength: float = Field(0.5, gt=0, le=1)
    upscaler: Literal["lanczos", "latent"] = Field("lanczos", description="what enlarges: pixels, or latents")


class ImagesBody(Closed):
    """`POST /v1/images/generations`. Fields that only OpenAI's own models use are accepted and ignored."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "a photo of sks dog on the beach", "model": "pocket:default/rusty", "seed": 7},
                {
                    "prompt": "a photo of sks dog on the grass",
                    "adapters": [{"id": "rusty", "weight": 0.8}, {"id": "bolt", "weight": 0.4}],
                    "n": 2,
                    "steps": 20,
                    "guidance_scale": 4.0,
                    "scheduler": "dpm++_2m",
                },
            ]
        }
    )

    prompt: Prompt
    model: Name | None = Field(
        None, description="`<base>`, `<base>:<tenant>/<id>[@version]`, or `<id>` of the caller's tenant"
    )
    n: int | None = Field(None, ge=1, description="images; image i has seed + i")
    size: str | None = Field(None, pattern=SIZE, max_length=11, description="`WIDTHxHEIGHT` in pixels, or `auto`")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="`url`: links, which expire")
    output_format: ImageFormat | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3, description="previews of each image, with `stream`")
    user: Name | None = None
    # known to OpenAI's models only
    background: Literal["transparent", "opaque", "auto"] | None = Field(
        None, description="images are opaque: `transparent` is refused"
    )
    moderation: Literal["low", "auto"] | None = None
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    safety_identifier: Name | None = None
    # additions
    adapters: tuple[WornAdapter, ...] | None = Field(None, description="the mix; with that of `model`, if it names one")
    negative_prompt: Prompt | None = None
    prompt_syntax: PromptSyntax | None = Field(None, description="`a1111`: brackets, `BREAK` and `AND` mean something")
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    scheduler: SamplerName | None = None
    image: str | None = Field(None, max_length=MAX_PICTURE, description="a picture to start from, base64 or a data URL")
    control: tuple[ControlBody, ...] | None = Field(None, description="ControlNets, and the pictures they steer by")
    image_prompts: tuple[ImagePromptBody, ...] | None = Field(None, description="pictures in place of words")
    strength: float | None = Field(None, gt=0, le=1, description="how much of `image` is redrawn: 1 is all of it")
    hires: Annotated[HiresBody | None, BeforeValidator(from_json)] = None


class UsedAdapter(BaseModel):
    """A version that was used, and its weight."""

    id: str
    version: str
    weight: float


Revised = Field(None, exclude_if=lambda value: value is None, description="with an adapter's trigger that was added")


KeptId = Field(None, exclude_if=lambda value: value is None, description="in the history, where the server keeps one")


class ImageData(BaseModel):
    """One image, with the settings that make it again."""

    id: str | None = KeptId
    b64_json: str | None = Field(None, exclude_if=lambda value: value is None)
    url: str | None = Field(None, exclude_if=lambda value: value is None, description="`response_format: url`")
    seed: int
    adapters: list[UsedAdapter]
    revised_prompt: str | None = Revised


class TokenDetails(BaseModel):
    """Tokens by what they stand for."""

    text_tokens: int
    image_tokens: int


class TokenUsage(BaseModel):
    """What a request took: text in tokens of the base's tokenizer, images in latent cells."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class ImagesAnswer(BaseModel):
    """OpenAI's reply with images."""

    created: int = Field(description="seconds since the epoch")
    data: list[ImageData]
    model: str
    size: str
    output_format: ImageFormat
    background: Literal["opaque"] = "opaque"
    usage: TokenUsage


class PartialImage(BaseModel):
    """A preview in a stream."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"] = "image_generation.partial_image"
    b64_json: str
    partial_image_index: int
    image_index: int
    step: int
    steps: int
    created_at: int
    size: str
    output_format: ImageFormat
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"


class CompletedImage(BaseModel):
    """A finished image in a stream."""

    type: Literal["image_generation.completed", "image_edit.completed"] = "image_generation.completed"
    id: str | None = KeptId
    b64_json: str
    image_index: int
    seed: int
    adapters: list[UsedAdapter]
    revised_prompt: str | None = Revised
    created_at: int
    size: str
    output_format: ImageFormat
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    usage: TokenUsage = Field(description="of this image; the prompts count with image 0")


class ModelInfo(BaseModel):
    """A base, or an adapter on it, as OpenAI lists models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    defaults: ImageDefaults | None = Field(default=None, description="of a base")


class ModelPage(BaseModel):
    """A page of a list of models; the next one begins after the last id."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]
    has_more: bool = False


class AdapterInfo(BaseModel):
    """An adapter as its tenant sees it."""

    id: str
    object: Literal["adapter"] = "adapter"
    tenant: str
    version: str
    base: str
    created: int
    bytes: int
    rank: int
    public: bool
    trigger: str = Field(description="what its prompts say")


class AdapterDetails(AdapterInfo):
    """An adapter with its card: how it was made and judged. Of another tenant's, what it takes to use it."""

    card: dict[str, object]


class AdapterChange(Closed):
    """`PATCH /v1/adapters/{id}`: what belongs to an adapter, not to a version. Fields left out stay as they are."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"public": False}]})

    public: bool | None = Field(None, description="other tenants may generate with it, with every version")
    trigger: str | None = Field(None, max_length=1000, description="what its prompts say")
    version: str | None = Field(
        None, pattern=r"^[0-9a-f]{6,64}$", max_length=64, description="the version to serve from now on"
    )


class AdapterPage(BaseModel):
    """A page of a list: the next one begins `after` its `last_id`."""

    object: Literal["list"] = "list"
    data: list[AdapterInfo]
    first_id: str | None = None
    last_id: str | None = Field(None, description="`<tenant>/<id>` of the last")
    has_more: bool = False


class AdapterVersion(BaseModel):
    """One version of an adapter."""

    id: str
    object: Literal["adapter.version"] = "adapter.version"
    version: str
    created: int
    bytes: int
    steps: int
    current: bool = Field(description="whether it is the one that is served")


class AdapterVersions(BaseModel):
    """All versions of an adapter, newest first."""

    object: Literal["list"] = "list"
    data: list[AdapterVersion]


class AdapterFile(BaseModel):
    """One file of a version."""

    name: str
    object: Literal["adapter.file"] = "adapter.file"
    bytes: int


class AdapterFiles(BaseModel):
    """The files of a version."""

    object: Literal["list"] = "list"
    version: str
    data: list[AdapterFile]


class Deleted(BaseModel):
    """What has been deleted."""

    id: str
    object: Literal["adapter", "adapter.version"] = "adapter"
    deleted: Literal[True] = True


class Health(BaseModel):
    """Whether requests can be served now."""

    status: Literal["ok", "starting", "failing"]
    base: str


class ErrorDetail(BaseModel):
    """What was wrong; `param` is the field, `code` what programs go by."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorDetail
