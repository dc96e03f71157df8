"""What clients of AUTOMATIC1111's API call to get pictures; `<lora:id:weight>` in the prompt works.

Unlike there, calls may overlap, an unknown adapter is an error, unsupported fields are refused by name, and no call
changes anything for other callers. The lists that clients read when they start are in `info.py`.
"""

import asyncio
import base64
import json
import time
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter, Request

from serving.engine.pictures.codec import measure
from serving.engine.request import FinishedPicture, GenerateRequest
from serving.http.edits import check_native
from serving.http.images import ERRORS
from serving.http.infotext import infotext
from serving.http.intake import any_seed, read_picture_field, uses
from serving.http.problems import ApiError
from serving.http.sdapi.controlnet import read_units
from serving.http.sdapi.inpainting import read_hires, read_mask
from serving.http.sdapi.prompt import refuse_tags, split_prompt
from serving.http.sdapi.samplers import read_sampler, sampler_label
from serving.http.sdapi.undone import refuse_undone
from serving.http.sdapi.wire import Img2ImgBody, SdImages, SdProgress, Txt2ImgBody
from serving.http.service import Service, request_id, service_of, unless_gone

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
PREVIEWS = 8
IDLE: dict[str, object] = {
    "skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0, "job_no": 0,
    "job_timestamp": "0", "sampling_step": 0, "sampling_steps": 0,
}  # fmt: skip


@dataclass(eq=False, slots=True)
class CallProgress:
    """How far the images of one call are."""

    count: int
    since: float
    task: "asyncio.Task[list[FinishedPicture]] | None" = None
    done: int = 0
    part: dict[int, float] = field(default_factory=dict)
    current: bytes | None = None
    steps: int = 0
    pictures: list[FinishedPicture] = field(default_factory=list)
    skipped: bool = False

    @property
    def share(self) -> float:
        """How much of the call is done, 0 to 1."""
        return min(1.0, sum(self.part.values()) / self.count)


Under = dict[str, list[CallProgress]]  # by tenant; the newest last


@router.post("/txt2img", responses=ERRORS)
async def txt2img(request: Request, body: Txt2ImgBody) -> SdImages:
    """Images of a prompt."""
    return await _make_images(request, body)


@router.post("/img2img", responses=ERRORS)
async def img2img(request: Request, body: Img2ImgBody) -> SdImages:
    """Images that start from a picture."""
    return await _make_images(request, body)


@router.get("/progress", responses=ERRORS)
async def progress(request: Request, skip_current_image: bool = False) -> SdProgress:
    """How far the caller's newest call is."""
    service = service_of(request)
    under: Under = request.app.state.under
    mine = under.get(service.tenant(request))
    if not mine:
        return SdProgress(progress=0.0, eta_relative=0.0, state=IDLE)
    newest = mine[-1]
    elapsed = time.monotonic() - newest.since
    image = None if skip_current_image or newest.current is None else base64.b64encode(newest.current).decode()
    return SdProgress(
        progress=newest.share,
        eta_relative=elapsed * (1 - newest.share) / newest.share if newest.share else 0.0,
        state={
            **IDLE,
            "job": "txt2img",
            "job_count": newest.count,
            "job_no": newest.done,
            "sampling_step": int(newest.share * newest.steps),
            "sampling_steps": newest.steps,
        },
        current_image=image,
    )


@router.post("/interrupt", responses=ERRORS)
async def interrupt(request: Request) -> dict[str, object]:
    """Cancels all running calls of the caller's tenant, of no other."""
    service = service_of(request)
    under: Under = request.app.state.under
    for one in under.get(service.tenant(request), []):
        if one.task is not None:
            one.task.cancel()
    return {}


@router.post("/skip", responses=ERRORS)
async def skip(request: Request) -> dict[str, object]:
    """Ends the caller's newest call: it answers with the images that are finished, or as if interrupted."""
    service = service_of(request)
    under: Under = request.app.state.under
    for one in under.get(service.tenant(request), [])[-1:]:
        one.skipped = True
        if one.task is not None:
            one.task.cancel()
    return {}


async def _make_images(request: Request, body: Txt2ImgBody) -> SdImages:
    service = service_of(request)
    tenant = service.tenant(request)
    wanted = await asyncio.to_thread(_wanted, service, tenant, body, request_id(request))
    one = CallProgress(count=wanted.count, since=time.monotonic(), steps=wanted.steps)
    under: Under = request.app.state.under
    under.setdefault(tenant, []).append(one)
    try:
        one.task = asyncio.ensure_future(_draw_images(service, wanted, one))
        pictures = await unless_gone(request, one.task)
    except asyncio.CancelledError:
        if one.task is not None and one.task.cancelled():
            if one.skipped and one.pictures:
                return _images_of(service, wanted, sorted(one.pictures, key=lambda picture: picture.index), body)
            raise ApiError(499, "The call was interrupted.", code="interrupted") from None
        raise
    finally:
        under[tenant].remove(one)
        if not under[tenant]:
            del under[tenant]
    return _images_of(service, wanted, pictures, body)


async def _draw_images(service: Service, wanted: GenerateRequest, one: CallProgress) -> list[FinishedPicture]:
    pictures = one.pictures
    async with aclosing(service.events(wanted)) as events:
        async for event in events:
            one.current = event.data
            if isinstance(event, FinishedPicture):
                pictures.append(event)
                one.done += 1
                one.part[event.index] = 1.0
            else:
                one.part[event.index] = event.step / event.steps
    return sorted(pictures, key=lambda picture: picture.index)


def _wanted(service: Service, tenant: str, body: Txt2ImgBody, name: str) -> GenerateRequest:
    """The engine's request: limits first, then tags taken out of the prompt and samplers by their other names."""
    intake = service.intake
    prompt, worn = split_prompt(intake.prompt(body.prompt, "prompt"))
    negative_prompt = refuse_tags(intake.prompt(body.negative_prompt, "negative_prompt"))
    sampler = read_sampler(body.sampler_name or body.sampler_index, body.scheduler, intake.scheduler)
    refuse_undone(body.model_extra or {}, sampler, intake.library.base)
    steps = body.steps or intake.steps
    side = intake.facts.resolution
    width, height = body.width or side, body.height or side
    mix = intake.worn(tenant, None, worn)
    first = body.init_images[0] if isinstance(body, Img2ImgBody) else None
    units = read_units((body.model_extra or {}).get("alwayson_scripts"), first, width, height)
    image, mask, strength = None, None, 1.0
    if isinstance(body, Img2ImgBody):
        image = read_picture_field(body.init_images[0], "init_images", width, height)
        mask = read_mask(body, width, height)
        if mask is not None and mask.only_masked:
            count = body.batch_size * body.n_iter
            check_native(intake.spec.limits, measure(image, "picture"), count, "init_images")
        strength = min(1.0, max(body.denoising_strength, 1.001 / steps))  # AUTOMATIC1111 takes 0 as one step
    return intake.checked(
        GenerateRequest(
            request_id=name,
            tenant=tenant,
            prompt=intake.told(prompt, mix),
            negative_prompt=negative_prompt,
            prompt_syntax="a1111",
            adapters=uses(mix),
            width=width,
            height=height,
            count=body.batch_size * body.n_iter,
            seed=any_seed() if body.seed < 0 else body.seed,
            steps=steps,
            guidance_scale=intake.guidance_scale if body.cfg_scale is None else body.cfg_scale,
            scheduler=sampler,
            image=image,
            strength=strength,
            mask=mask,
            hires=read_hires(body, width, height, steps, intake.facts),
            controls=intake.controls(units, width, height, "alwayson_scripts"),
            previews=PREVIEWS,
            deadline_s=intake.spec.limits.deadline_s,
        )
    )


def _images_of(
    service: Service, wanted: GenerateRequest, pictures: list[FinishedPicture], body: Txt2ImgBody
) -> SdImages:
    library = service.intake.library
    texts = [infotext(wanted, picture.seed, library.base, library.base_hash) for picture in pictures]
    info = {
        "prompt": body.prompt if wanted.prompt in body.prompt else wanted.prompt,  # where a trigger was added
        "negative_prompt": body.negative_prompt,
        "seed": wanted.seed,
        "all_seeds": [picture.seed for picture in pictures],
        "width": wanted.width,
        "height": wanted.height,
        "steps": wanted.steps,
        "cfg_scale": wanted.guidance_scale,
        "sampler_name": sampler_label(wanted.scheduler)[0],
        "adapters": {str(use.ref): use.weight for use in wanted.adapters},
        "infotexts": texts if service.tells_parameters else [],
    }
    images = [base64.b64encode(picture.data).decode() for picture in pictures] if body.send_images else []
    return SdImages(images=images, parameters=_echo(body), info=json.dumps(info))


def _echo(body: Txt2ImgBody) -> dict[str, object]:
    """The declared fields of the body; the pictures only where they are asked back."""
    told = body.model_dump(mode="json", include=set(type(body).model_fields))
    if isinstance(body, Img2ImgBody) and not body.include_init_images:
        told["init_images"] = told["mask"] = None
    return told
