"""What goes over HTTP about ControlNets and IP-Adapters. Knows no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from serving.engine.request import ControlPreprocess
from training.storage.closed import Closed
from training.storage.networks import NetworkKind

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
MAX_SCALE = 2.0
MAX_PICTURE = 96 * 2**20  # base64 of the largest picture


class ControlBody(Closed):
    """A ControlNet of a request, and the picture that it steers by."""

    model: Annotated[
        str, Field(pattern=NAME, max_length=63, description="as `GET /v1/controls` lists it", examples=["pocket-canny"])
    ]
    image: str = Field(
        max_length=MAX_PICTURE, description="base64 or a data URL; it is resized to the size of the request's images"
    )
    preprocess: ControlPreprocess = Field(
        "none", description="`canny` makes edges of `image`; `none`: it is what the ControlNet reads"
    )
    scale: float = Field(1.0, ge=0, le=MAX_SCALE, description="how much it steers")
    start: float = Field(0.0, ge=0, le=1, description="the share of the steps from which on it steers")
    end: float = Field(1.0, ge=0, le=1, description="the share of the steps up to which it steers")


class ImagePromptBody(Closed):
    """A picture in place of words, and the IP-Adapter that reads it."""

    model: Annotated[
        str, Field(pattern=NAME, max_length=63, description="as `GET /v1/ip-adapters` lists it", examples=["plus"])
    ]
    image: str = Field(max_length=MAX_PICTURE, description="base64 or a data URL; its middle square is read")
    scale: float = Field(1.0, ge=0, le=MAX_SCALE, description="how much it counts beside the prompt")


class NetworkInfo(BaseModel):
    """A ControlNet or an IP-Adapter that there is."""

    id: str
    object: NetworkKind
    version: str = Field(description="changes with its files")
    bytes: int
    usable: bool = Field(description="whether it is one for the base of this server")
    reason: str | None = Field(None, description="why it is none")


class NetworkList(BaseModel):
    """All of a kind, OpenAI's form of a list."""

    object: Literal["list"] = "list"
    data: list[NetworkInfo]
