"""What clients of AUTOMATIC1111's API call, as far as it makes sense here; `<lora:id:weight>` in the prompt works.

Unlike there, calls may overlap, an unknown adapter is an error, and no call changes anything for anybody else.
"""

import asyncio
import base64
import json
import re
import time
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter, Request

from serving.engine.request import GenerateRequest, Picture
from serving.http.images import ERRORS, as_generator
from serving.http.intake import any_seed, read_base64
from serving.http.problems import ApiError
from serving.http.service import Service, request_id, service_of, unless_gone
from serving.http.wire import (
    ADAPTER_NAME,
    Img2ImgBody,
    SdImages,
    SdLora,
    SdProgress,
    SdSampler,
    Txt2ImgBody,
    WornAdapter,
)
from training.base.facts import SamplerName

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
SAMPLERS: dict[str, SamplerName] = {"DDIM": "ddim", "Euler": "euler", "Euler a": "euler_a", "DPM++ 2M": "dpm++_2m"}
PREVIEWS = 8
_LORA = re.compile(r"<lora:([^:>]*)(?::([^:>]*))?(?::[^>]*)?>")


@dataclass(eq=False, slots=True)
class Progress:
    """How far the images of one call are."""

    count: int
    since: float
    task: "asyncio.Task[list[Picture]] | None" = None
    done: int = 0
    part: dict[int, float] = field(default_factory=dict)
    current: bytes | None = None

    @property
    def share(self) -> float:
        return min(1.0, sum(self.part.values()) / self.count)


Under = dict[str, list[Progress]]  # by tenant; the newest last


@router.post("/txt2img", responses=ERRORS)
async def txt2img(request: Request, body: Txt2ImgBody) -> SdImages:
    """Images of a prompt."""
    return await _make(request, body, image=None, strength=1.0)


@router.post("/img2img", responses=ERRORS)
async def img2img(request: Request, body: Img2ImgBody) -> SdImages:
    """Images that start from a picture."""
    image = read_base64(body.init_images[0], "init_images")
    return await _make(request, body, image=image, strength=body.denoising_strength)


@router.get("/progress", responses=ERRORS)
async def progress(request: Request, skip_current_image: bool = False) -> SdProgress:
    """How far the caller's newest call is."""
    service = service_of(request)
    under: Under = request.app.state.under
    mine = under.get(service.tenant(request))
    if not mine:
        return SdProgress(progress=0.0, eta_relative=0.0, state={"job_count": 0, "interrupted": False})
    newest = mine[-1]
    elapsed = time.monotonic() - newest.since
    image = None if skip_current_image or newest.current is None else base64.b64encode(newest.current).decode()
    return SdProgress(
        progress=newest.share,
        eta_relative=elapsed * (1 - newest.share) / newest.share if newest.share else 0.0,
        state={"job_count": newest.count, "job_no": newest.done, "interrupted": False},
        current_image=image,
    )


@router.post("/interrupt", responses=ERRORS)
async def interrupt(request: Request) -> dict[str, object]:
    """Stops the caller's calls; nobody else's."""
    service = service_of(request)
    under: Under = request.app.state.under
    for one in under.get(service.tenant(request), []):
        if one.task is not None:
            one.task.cancel()
    return {}


@router.get("/loras", responses=ERRORS)
async def loras(request: Request) -> list[SdLora]:
    """The adapters that prompt tags may name."""
    service = service_of(request)
    tenant = service.tenant(request)
    found = await asyncio.to_thread(service.intake.library.list, tenant)
    names = [one.id if one.tenant == tenant else f"{one.tenant}/{one.id}" for one in found]
    return [
        SdLora(name=name, alias=name, path=name, metadata={"version": one.version, "trigger": one.card.trigger})
        for name, one in zip(names, found, strict=True)
    ]


@router.post("/refresh-loras", responses=ERRORS)
async def refresh_loras(request: Request) -> dict[str, object]:
    """Nothing to do: new adapters are seen by themselves."""
    service_of(request).tenant(request)
    return {}


@router.get("/samplers", responses=ERRORS)
async def samplers(request: Request) -> list[SdSampler]:
    """The samplers, by the names that AUTOMATIC1111 gives them."""
    service_of(request).tenant(request)
    return [SdSampler(name=name, aliases=[ours], options={}) for name, ours in SAMPLERS.items()]


@router.get("/sd-models", responses=ERRORS)
async def sd_models(request: Request) -> list[dict[str, object]]:
    """The one base."""
    service = service_of(request)
    service.tenant(request)
    name, digest = service.intake.library.base, service.intake.library.base_hash
    return [
        {"title": name, "model_name": name, "hash": digest[:10], "sha256": digest, "filename": name, "config": None}
    ]


@router.get("/options", responses=ERRORS)
async def options(request: Request) -> dict[str, object]:
    """The only option that clients ask for before they begin."""
    service = service_of(request)
    service.tenant(request)
    return {"sd_model_checkpoint": service.intake.library.base}


async def _make(request: Request, body: Txt2ImgBody, *, image: bytes | None, strength: float) -> SdImages:
    service = service_of(request)
    tenant = service.tenant(request)
    wanted = await asyncio.to_thread(_wanted, service, tenant, body, request_id(request), image, strength)
    one = Progress(count=wanted.count, since=time.monotonic())
    under: Under = request.app.state.under
    under.setdefault(tenant, []).append(one)
    try:
        one.task = asyncio.ensure_future(_run(service, wanted, one))
        pictures = await unless_gone(request, one.task)
    except asyncio.CancelledError:
        if one.task is not None and one.task.cancelled():
            raise ApiError(499, "The call was interrupted.", code="interrupted") from None
        raise
    finally:
        under[tenant].remove(one)
        if not under[tenant]:
            del under[tenant]
    return _answer(wanted, pictures, body)


async def _run(service: Service, wanted: GenerateRequest, one: Progress) -> list[Picture]:
    pictures = []
    with service.quota.request(wanted.tenant):
        async with aclosing(as_generator(service.generate(wanted))) as events:
            async for event in events:
                one.current = event.data
                if isinstance(event, Picture):
                    pictures.append(event)
                    one.done += 1
                    one.part[event.index] = 1.0
                else:
                    one.part[event.index] = event.step / event.steps
    return sorted(pictures, key=lambda picture: picture.index)


def _wanted(
    service: Service, tenant: str, body: Txt2ImgBody, name: str, image: bytes | None, strength: float
) -> GenerateRequest:
    """The engine's request: tags taken out of the prompt, samplers by their other names."""
    intake = service.intake
    prompt, worn = split_prompt(body.prompt)
    side = intake.facts.resolution
    sampler = body.sampler_name or body.sampler_index
    if sampler is not None and sampler not in SAMPLERS:
        raise ApiError(400, f"Unknown sampler '{sampler}'. Known: {', '.join(SAMPLERS)}.", param="sampler_name")
    count = body.batch_size * body.n_iter
    return intake.text_to_image(
        GenerateRequest(
            request_id=name,
            tenant=tenant,
            prompt=prompt,
            negative_prompt=_LORA.sub("", body.negative_prompt),
            adapters=intake.adapters(tenant, None, worn),
            width=body.width or side,
            height=body.height or side,
            count=count,
            seed=any_seed() if body.seed < 0 else body.seed,
            steps=body.steps or intake.spec.steps,
            guidance_scale=intake.spec.guidance_scale if body.cfg_scale is None else body.cfg_scale,
            scheduler=SAMPLERS[sampler] if sampler else intake.spec.scheduler,
            image=image,
            strength=strength,
            previews=PREVIEWS,
            deadline_s=intake.spec.limits.deadline_s,
        )
    )


def split_prompt(prompt: str) -> tuple[str, list[WornAdapter]]:
    """A prompt without its `<lora:id:weight>` tags, and what they name. Raises ApiError for a tag that is none."""
    worn = []
    for tag in _LORA.finditer(prompt):
        id, weight = tag.group(1).strip(), (tag.group(2) or "1").strip()
        try:
            number = float(weight)
        except ValueError:
            raise ApiError(400, f"'{tag.group(0)}': the weight '{weight}' is no number.", param="prompt") from None
        if not re.fullmatch(ADAPTER_NAME, id) or number != number or abs(number) == float("inf"):
            raise ApiError(400, f"'{tag.group(0)}' names no adapter; write <lora:id:weight>.", param="prompt")
        worn.append(WornAdapter(id=id, weight=number))
    return re.sub(r"\s+", " ", _LORA.sub(" ", prompt)).strip() if worn else prompt, worn


def _answer(wanted: GenerateRequest, pictures: list[Picture], body: Txt2ImgBody) -> SdImages:
    seeds = [picture.seed for picture in pictures]
    info = {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "seed": wanted.seed,
        "all_seeds": seeds,
        "width": wanted.width,
        "height": wanted.height,
        "steps": wanted.steps,
        "cfg_scale": wanted.guidance_scale,
        "sampler_name": next(name for name, ours in SAMPLERS.items() if ours == wanted.scheduler),
        "adapters": {str(use.ref): use.weight for use in wanted.adapters},
    }
    images = [base64.b64encode(picture.data).decode() for picture in pictures] if body.send_images else []
    return SdImages(images=images, parameters=body.model_dump(mode="json"), info=json.dumps(info))
