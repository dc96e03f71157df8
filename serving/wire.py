"""What goes over HTTP: bodies and answers, as OpenAI's images API has them and a little more. Knows no torch.

Bodies are closed: an unknown field is an error that names it. Limits that depend on the server are checked in
`intake.py`; here is only what holds for every server.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.request import MAX_SEED, Closed, ImageFormat, SamplerName

SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
ADAPTER_NAME = r"^[a-z0-9][a-z0-9._-]{0,62}(/[a-z0-9][a-z0-9._-]{0,62})?(@[0-9a-f]{6,64})?$"


class WornAdapter(Closed):
    """An adapter in a mix."""

    id: Annotated[
        str,
        Field(
            pattern=ADAPTER_NAME, description="`<id>`, `<tenant>/<id>`, either with `@<version>`", examples=["rusty"]
        ),
    ]
    weight: Annotated[float, Field(description="scales its effect; negative subtracts it", examples=[1.0])] = 1.0


class ImagesBody(Closed):
    """`POST /v1/images/generations`. Fields that OpenAI's models know and ours do not use are accepted and ignored."""

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

    prompt: str
    model: str | None = Field(
        None, max_length=300, description="`<base>`, `<base>:<tenant>/<id>[@version]`, or `<id>` of the caller's tenant"
    )
    n: int | None = Field(None, ge=1, description="images; image i has seed + i")
    size: str | None = Field(None, pattern=SIZE, description="`WIDTHxHEIGHT` in pixels, or `auto`")
    response_format: Literal["b64_json"] | None = None
    output_format: ImageFormat | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3, description="previews of each image, with `stream`")
    user: str | None = None
    # known to OpenAI's models only
    background: Literal["transparent", "opaque", "auto"] | None = Field(
        None, description="images are opaque: `transparent` is refused"
    )
    moderation: Literal["low", "auto"] | None = None
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    safety_identifier: str | None = None
    # ours
    adapters: tuple[WornAdapter, ...] | None = Field(None, description="the mix; with that of `model`, if it names one")
    negative_prompt: str | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    scheduler: SamplerName | None = None
    image: str | None = Field(None, description="a picture to start from, base64 or a data URL")
    strength: float | None = Field(None, gt=0, le=1, description="how much of `image` is made anew")


class UsedAdapter(BaseModel):
    """Which version was worn."""

    id: str
    version: str
    weight: float


class ImageData(BaseModel):
    """One image, and what it takes to make it again."""

    b64_json: str
    seed: int
    adapters: list[UsedAdapter]


class TokenDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """What a request took: text in tokens of the base's tokenizer, images in latent cells."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class ImagesAnswer(BaseModel):
    """OpenAI's images answer."""

    created: int = Field(description="seconds since the epoch")
    data: list[ImageData]
    model: str
    size: str
    output_format: ImageFormat
    background: Literal["opaque"] = "opaque"
    usage: Usage


class PartialImage(BaseModel):
    """A preview in a stream."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
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

    type: Literal["image_generation.completed"] = "image_generation.completed"
    b64_json: str
    image_index: int
    seed: int
    adapters: list[UsedAdapter]
    created_at: int
    size: str
    output_format: ImageFormat
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    usage: Usage = Field(description="of this image; the prompts count with image 0")


class Model(BaseModel):
    """A base, or an adapter on it, as OpenAI lists models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
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
    """`PATCH /v1/adapters/{id}`: what belongs to an adapter, not to a version. What is left out stays."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"public": False}]})

    public: bool | None = Field(None, description="other tenants may generate with it, with every version")
    trigger: str | None = Field(None, max_length=1000, description="what its prompts say")
    version: str | None = Field(
        None, pattern=r"^[0-9a-f]{6,64}$", max_length=64, description="the version to serve from now on"
    )


class Adapters(BaseModel):
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
    object: Literal["list"] = "list"
    data: list[AdapterVersion]


class AdapterFile(BaseModel):
    """One file of a version."""

    name: str
    object: Literal["adapter.file"] = "adapter.file"
    bytes: int


class AdapterFiles(BaseModel):
    object: Literal["list"] = "list"
    version: str
    data: list[AdapterFile]


class Deleted(BaseModel):
    id: str
    object: Literal["adapter", "adapter.version"] = "adapter"
    deleted: Literal[True] = True


class Health(BaseModel):
    """Whether requests can be served now."""

    status: Literal["ok", "starting", "failing"]
    base: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorDetail


class Txt2ImgBody(BaseModel):
    """`POST /sdapi/v1/txt2img`. Fields of AUTOMATIC1111 that are not here are ignored, as its clients send dozens."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"examples": [{"prompt": "a sks dog <lora:rusty:0.8>", "steps": 20, "cfg_scale": 5}]},
    )

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="-1: any")
    sampler_name: str | None = None
    sampler_index: str | None = None
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    steps: int | None = Field(None, ge=1)
    cfg_scale: float | None = Field(None, ge=0, le=100)
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    send_images: bool = True


class Img2ImgBody(Txt2ImgBody):
    """`POST /sdapi/v1/img2img`: starts from the first of `init_images` (base64)."""

    init_images: tuple[str, ...] = Field(min_length=1)
    denoising_strength: float = Field(0.75, gt=0, le=1)


class SdImages(BaseModel):
    images: list[str]
    parameters: dict[str, object]
    info: str


class SdProgress(BaseModel):
    progress: float
    eta_relative: float
    state: dict[str, object]
    current_image: str | None = None
    textinfo: str | None = None


class SdLora(BaseModel):
    name: str
    alias: str
    path: str
    metadata: dict[str, object]


class SdSampler(BaseModel):
    name: str
    aliases: list[str]
    options: dict[str, str]
