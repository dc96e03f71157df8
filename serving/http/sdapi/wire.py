"""What goes over HTTP under `/sdapi/v1`: bodies and replies as AUTOMATIC1111's API has them. Knows no torch.

Its clients send dozens of fields, most of them at their defaults. Fields that are not declared here are looked at in
`undone.py`: those that ask for nothing pass, those that would change the picture are refused by name.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from serving.engine.request import MAX_SEED
from serving.http.wire import MAX_PICTURE, Name, Prompt


class Txt2ImgBody(BaseModel):
    """`POST /sdapi/v1/txt2img`. Further fields of AUTOMATIC1111 may be sent as long as they ask for nothing."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"examples": [{"prompt": "a sks dog <lora:rusty:0.8>", "steps": 20, "cfg_scale": 5}]},
    )

    prompt: Prompt = ""
    negative_prompt: Prompt = ""
    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="-1: any")
    sampler_name: Name | None = Field(None, description="as `GET /sdapi/v1/samplers` lists it, or an alias")
    sampler_index: Name | None = Field(None, description="read where `sampler_name` is missing")
    scheduler: Name | None = Field(None, description="as `GET /sdapi/v1/schedulers` lists it")
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    steps: int | None = Field(None, ge=1)
    cfg_scale: float | None = Field(None, ge=0, le=100)
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    denoising_strength: float = Field(0.75, ge=0, le=1, description="0: one step at the least noise")
    enable_hr: bool = False
    hr_scale: float = Field(2.0, ge=1, le=8)
    hr_upscaler: Name | None = Field(None, description="Latent or Lanczos")
    hr_second_pass_steps: int = Field(0, ge=0, description="0: as many as of the first pass")
    hr_resize_x: int = Field(0, ge=0, description="the size of the second pass; 0: by `hr_scale`")
    hr_resize_y: int = Field(0, ge=0)
    send_images: bool = True


class Img2ImgBody(Txt2ImgBody):
    """`POST /sdapi/v1/img2img`: starts from the one picture in `init_images` (base64)."""

    init_images: tuple[Annotated[str, Field(max_length=MAX_PICTURE)], ...] = Field(min_length=1, max_length=1)
    mask: str | None = Field(None, max_length=MAX_PICTURE, description="of the picture's size; white is redrawn")
    mask_blur: float | None = Field(None, ge=0, le=64, description="a Gaussian over the mask's edge, pixels")
    inpainting_fill: int = Field(0, ge=0, le=3, description="0: surroundings, 1: original, 2: noise, 3: nothing")
    inpaint_full_res: bool = Field(True, description="the part around the mask is drawn at the whole size")
    inpaint_full_res_padding: int = Field(0, ge=0, le=1024)
    inpainting_mask_invert: int = Field(0, ge=0, le=1)
    include_init_images: bool = Field(False, description="whether `parameters` of the reply holds `init_images`")


class SdImages(BaseModel):
    """The images of a call, base64, with what was asked for."""

    images: list[str]
    parameters: dict[str, object]
    info: str = Field(description="JSON: the seeds, `infotexts` and what else it takes to make the images again")


class SdProgress(BaseModel):
    """How far a call is: `progress` from 0 to 1, `eta_relative` in seconds."""

    progress: float
    eta_relative: float
    state: dict[str, object]
    current_image: str | None = None
    textinfo: str | None = None


class SdLora(BaseModel):
    """An adapter that a prompt tag may name."""

    name: str
    alias: str
    path: str
    metadata: dict[str, object]


class SdSampler(BaseModel):
    """A sampler and its other names."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class SdScheduler(BaseModel):
    """A way to space the noise levels of a run."""

    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float
    need_inner_model: bool


class SdModel(BaseModel):
    """A base."""

    title: str
    model_name: str
    hash: str
    sha256: str
    filename: str
    config: str | None = None


class SdUpscaler(BaseModel):
    """A way to enlarge pictures."""

    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float


class SdNamed(BaseModel):
    """An entry of a list in which a name is all there is."""

    name: str


class SdScripts(BaseModel):
    """The scripts of each tab of AUTOMATIC1111's page."""

    txt2img: list[str] = []
    img2img: list[str] = []


class SdEmbeddings(BaseModel):
    """Textual-inversion words by name."""

    loaded: dict[str, dict[str, object]] = {}
    skipped: dict[str, dict[str, object]] = {}


class SdMemory(BaseModel):
    """The machine's memory, as that API says that it is unknown: it is for the operator, who has `/metrics`."""

    ram: dict[str, str] = {"error": "unavailable"}
    cuda: dict[str, str] = {"error": "unavailable"}
