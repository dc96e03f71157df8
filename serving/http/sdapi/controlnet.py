"""ControlNet as clients of AUTOMATIC1111's extension ask for it: `alwayson_scripts.controlnet`, and its lists.

A unit's fields that this server does nothing with are refused by name, unless they ask for nothing.
"""

import asyncio
import io
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import ValidationError

from serving.engine.pictures.canny import HIGH, LOW
from serving.http.images import ERRORS
from serving.http.intake import read_picture_field
from serving.http.networks.wire import ControlBody
from serving.http.problems import ApiError
from serving.http.service import service_of

router = APIRouter(prefix="/controlnet", tags=["AUTOMATIC1111"])
SCRIPT = "controlnet"
FIELD = "alwayson_scripts"
MODULES = ("none", "canny")
VERSION = 2  # of the extension's API
_READ = {"enabled", "image", "input_image", "module", "model", "weight", "guidance_start", "guidance_end"}
# what a field may be; None, "", false, [] and {} are always allowed
_ALLOWED: dict[str, tuple[object, ...]] = {
    "control_mode": (0, "Balanced"),
    "resize_mode": (0, "Just Resize"),  # others, where nothing is cropped or added by them
    "threshold_a": (-1, LOW),
    "threshold_b": (-1, HIGH),
    "inpaint_crop_input_image": (True,),
    "hr_option": ("Both",),
    "input_mode": ("simple",),
    "pulid_mode": ("Fidelity",),
    "union_control_type": ("Unknown", "All"),
}
_IDLE = {"processor_res", "pixel_perfect", "lowvram", "low_vram", "save_detected_map", "guidance", "animatediff_batch"}
_CROPS = (1, 2, "Crop and Resize", "Resize and Fill")


def read_units(scripts: object, start: str | None, width: int, height: int) -> list[ControlBody]:
    """The ControlNets of a body's `alwayson_scripts`; `start`: the picture of a unit that has none of its own.

    Raises ApiError for what a unit asks for and is not done.
    """
    if not isinstance(scripts, Mapping):
        return []
    script = next((one for name, one in scripts.items() if str(name).lower() == SCRIPT), None)
    units = script.get("args") if isinstance(script, Mapping) else script
    asked = [one for one in units or () if isinstance(one, Mapping)] if isinstance(units, list | tuple) else []
    return [_unit(one, start, width, height) for one in asked if _is_on(one)]


def _is_on(unit: Mapping[str, Any]) -> bool:
    """Whether a unit asks for something: clients send those that are off, too. Raises ApiError if it is half on."""
    if not unit.get("enabled", True):
        return False
    if str(unit.get("model") or "None") != "None":
        return True
    if unit.get("enabled") or unit.get("image") or unit.get("input_image"):
        raise ApiError(
            400,
            "'alwayson_scripts': a ControlNet unit is on and names no 'model'. See /controlnet/model_list.",
            param=FIELD,
        )
    return False


def _unit(unit: Mapping[str, Any], start: str | None, width: int, height: int) -> ControlBody:
    image = unit.get("image") or unit.get("input_image") or start
    if isinstance(image, Mapping):
        _refuse_field("mask", image.get("mask"))
        image = image.get("image")
    if not image:
        raise ApiError(400, "A ControlNet unit has no 'image'. Send one as base64.", param=FIELD)
    for name, value in unit.items():
        if name == "resize_mode" and value in _CROPS and _same_shape(str(image), width, height):
            continue
        if name not in _READ and name not in _IDLE:
            _refuse_field(str(name), value)
    module = str(unit.get("module") or "none").lower()
    if module not in MODULES:
        known = f"Known: {', '.join(MODULES)}. Make the picture yourself, and send it with module 'none'."
        raise ApiError(400, f"The ControlNet module '{module[:80]}' is not here. {known}", param=FIELD)
    said = {"scale": "weight", "start": "guidance_start", "end": "guidance_end"}
    given = {ours: unit[theirs] for ours, theirs in said.items() if unit.get(theirs) is not None}
    model = str(unit["model"]).partition(" [")[0]
    try:
        return ControlBody.model_validate({"model": model, "image": image, "preprocess": module, **given})
    except ValidationError as error:
        (first, *_) = error.errors()
        place = said.get(str(first["loc"][0]), str(first["loc"][0]))
        shown = repr(first["input"])[:80]
        raise ApiError(400, f"'{place}' of a ControlNet unit: {first['msg']}, got {shown}.", param=FIELD) from None


def _refuse_field(name: str, value: object) -> None:
    if value is None or value is False or value in ("", [], {}) or value in _ALLOWED.get(name, ()):
        return
    allowed = f"allowed is {_ALLOWED[name][-1]!r}" if name in _ALLOWED else "this server does nothing with it"
    raise ApiError(400, f"'{name[:80]}' of a ControlNet unit is {str(value)[:80]!r}: {allowed}.", param=FIELD)


def _same_shape(image: str, width: int, height: int) -> bool:
    """Whether a picture has the proportions of the images, so that it is not cropped or filled up."""
    data = read_picture_field(image, FIELD, width, height)
    across, down = Image.open(io.BytesIO(data)).size
    return abs(across * height - down * width) < max(width, height)


@router.get("/model_list", responses=ERRORS)
async def model_list(request: Request) -> dict[str, list[str]]:
    """The ControlNets for this base."""
    service = service_of(request)
    service.tenant(request)
    found = await asyncio.to_thread(service.intake.library.networks.all, "control")
    return {"model_list": [f"{one.id} [{one.version[:8]}]" for one in found if one.usable]}


@router.get("/module_list", responses=ERRORS)
async def module_list(request: Request) -> dict[str, object]:
    """What makes a ControlNet's picture of another one here."""
    service_of(request).tenant(request)
    details = {name: {"model_free": False, "sliders": []} for name in MODULES}
    return {"module_list": list(MODULES), "module_detail": details}


@router.get("/version", responses=ERRORS)
async def version(request: Request) -> dict[str, int]:
    """Of the extension's API that this is."""
    service_of(request).tenant(request)
    return {"version": VERSION}


@router.get("/settings", responses=ERRORS)
async def settings(request: Request) -> dict[str, int]:
    """How many ControlNets a request may have."""
    service = service_of(request)
    service.tenant(request)
    return {"control_net_unit_count": service.intake.spec.engine.networks}


@router.get("/control_types", responses=ERRORS)
async def control_types(request: Request) -> dict[str, object]:
    """One kind, of all models and modules: what a ControlNet was trained for is not known here."""
    models = (await model_list(request))["model_list"]
    kind = {
        "module_list": list(MODULES),
        "model_list": ["None", *models],
        "default_option": MODULES[0],
        "default_model": models[0] if models else "None",
    }
    return {"control_types": {"All": kind}}
