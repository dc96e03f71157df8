"""What AUTOMATIC1111's clients have read off a picture: its parameters. What takes other models is refused in words."""

import asyncio
import io
from typing import Annotated, NoReturn

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from serving.http.images import ERRORS
from serving.http.infotext import KEY, read_infotext
from serving.http.intake import read_picture_field
from serving.http.problems import ApiError
from serving.http.service import service_of
from serving.http.wire import MAX_PICTURE

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])


class PngInfoBody(BaseModel):
    """A picture, base64."""

    model_config = ConfigDict(extra="forbid")
    image: Annotated[str, Field(max_length=MAX_PICTURE)]


class PngInfo(BaseModel):
    """What a picture file says: `info` is the text as it is, `parameters` its fields."""

    info: str
    items: dict[str, str]
    parameters: dict[str, str]


@router.post("/png-info", responses=ERRORS)
async def png_info(request: Request, body: PngInfoBody) -> PngInfo:
    """The parameters that a PNG file of AUTOMATIC1111 or of this server holds; empty if it holds none."""
    service_of(request).tenant(request)
    return await asyncio.to_thread(_read, body.image)


@router.post("/interrogate", responses=ERRORS)
async def interrogate(request: Request) -> None:
    """Not done: describing a picture takes a model that this server does not have."""
    _refuse(request, "describes no pictures: it has no model that does. Write the prompt by hand, or ask /png-info")


@router.post("/extra-single-image", responses=ERRORS)
@router.post("/extra-batch-images", responses=ERRORS)
async def extras(request: Request) -> None:
    """Not done: there are no models that enlarge or mend finished pictures."""
    _refuse(request, "enlarges and mends no finished pictures. Ask for the size with 'width' and 'height'")


@router.post("/unload-checkpoint", responses=ERRORS)
@router.post("/reload-checkpoint", responses=ERRORS)
async def load(request: Request) -> None:
    """Not done: the base is everybody's."""
    _refuse(request, "keeps its base loaded: everybody shares it")


def _refuse(request: Request, what: str) -> NoReturn:
    service_of(request).tenant(request)
    raise ApiError(400, f"This server {what}.", code="not_supported")


def _read(text: str) -> PngInfo:
    data = read_picture_field(text, "image", 64, 64)
    with Image.open(io.BytesIO(data)) as opened:
        items = {str(name): value for name, value in opened.info.items() if isinstance(value, str)}
    info = items.get(KEY, "")
    return PngInfo(info=info, items=items, parameters=read_infotext(info))
