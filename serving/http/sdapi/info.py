"""What clients of AUTOMATIC1111's API read when they start: the lists from which their users choose, and options.

A list of what is not served is empty or says so in that API's own way; options are the same for everybody.
"""

import asyncio

from fastapi import APIRouter, Request

from serving.http.images import ERRORS
from serving.http.sdapi.samplers import AUTOMATIC, KARRAS, SAMPLERS, aliases
from serving.http.sdapi.undone import check_options, options
from serving.http.sdapi.wire import (
    SdEmbeddings,
    SdLora,
    SdMemory,
    SdModel,
    SdNamed,
    SdSampler,
    SdScheduler,
    SdScripts,
    SdUpscaler,
)
from serving.http.service import service_of

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
RHO = 7.0  # of Karras' spacing


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
    """Does nothing: new adapters are found without it."""
    service_of(request).tenant(request)
    return {}


@router.post("/refresh-checkpoints", responses=ERRORS)
@router.post("/refresh-embeddings", responses=ERRORS)
@router.post("/refresh-vae", responses=ERRORS)
async def refresh(request: Request) -> dict[str, object]:
    """Does nothing: a server has the one base that it was started with, and words come with their adapter."""
    service_of(request).tenant(request)
    return {}


@router.get("/samplers", responses=ERRORS)
async def samplers(request: Request) -> list[SdSampler]:
    """The samplers, by the names that AUTOMATIC1111 gives them."""
    service = service_of(request)
    service.tenant(request)
    served = service.intake.facts.samplers
    known = [name for name, (plain, _) in SAMPLERS.items() if plain in served]
    return [SdSampler(name=name, aliases=aliases(name), options={}) for name in known]


@router.get("/schedulers", responses=ERRORS)
async def schedulers(request: Request) -> list[SdScheduler]:
    """How the noise levels of a run are spaced: as the base's own schedule does, or as Karras et al."""
    service = service_of(request)
    service.tenant(request)
    with_karras = any(name.endswith("_karras") for name in service.intake.facts.samplers)
    known = {AUTOMATIC: -1.0, **({KARRAS: RHO} if with_karras else {})}
    return [
        SdScheduler(name=name.lower(), label=name, default_rho=rho, need_inner_model=False)
        for name, rho in known.items()
    ]


@router.get("/sd-models", responses=ERRORS)
async def sd_models(request: Request) -> list[SdModel]:
    """The one base."""
    service = service_of(request)
    service.tenant(request)
    name, digest = service.intake.library.base, service.intake.library.base_hash
    return [SdModel(title=name, model_name=name, hash=digest[:10], sha256=digest, filename=name)]


@router.get("/sd-vae", responses=ERRORS)
async def sd_vae(request: Request) -> list[SdNamed]:
    """An empty list: pictures are decoded by the base's own VAE."""
    service_of(request).tenant(request)
    return []


@router.get("/upscalers", responses=ERRORS)
async def upscalers(request: Request) -> list[SdUpscaler]:
    """What enlarges pixels for the second pass."""
    service_of(request).tenant(request)
    return [SdUpscaler(name="None", scale=1), SdUpscaler(name="Lanczos", scale=4)]


@router.get("/latent-upscale-modes", responses=ERRORS)
async def latent_upscale_modes(request: Request) -> list[SdNamed]:
    """What enlarges latents for the second pass."""
    service_of(request).tenant(request)
    return [SdNamed(name="Latent")]


@router.get("/face-restorers", responses=ERRORS)
async def face_restorers(request: Request) -> list[SdNamed]:
    """None."""
    service_of(request).tenant(request)
    return []


@router.get("/hypernetworks", responses=ERRORS)
async def hypernetworks(request: Request) -> list[SdNamed]:
    """None."""
    service_of(request).tenant(request)
    return []


@router.get("/prompt-styles", responses=ERRORS)
async def prompt_styles(request: Request) -> list[SdNamed]:
    """None: prompts are written out."""
    service_of(request).tenant(request)
    return []


@router.get("/embeddings", responses=ERRORS)
async def embeddings(request: Request) -> SdEmbeddings:
    """None of their own: trained words come with their adapter."""
    service_of(request).tenant(request)
    return SdEmbeddings()


@router.get("/script-info", responses=ERRORS)
@router.get("/extensions", responses=ERRORS)
@router.get("/realesrgan-models", responses=ERRORS)
async def extensions(request: Request) -> list[SdNamed]:
    """None: neither scripts nor extensions, nor models that enlarge pictures."""
    service_of(request).tenant(request)
    return []


@router.get("/scripts", responses=ERRORS)
async def scripts(request: Request) -> SdScripts:
    """None."""
    service_of(request).tenant(request)
    return SdScripts()


@router.get("/memory", responses=ERRORS)
async def memory(request: Request) -> SdMemory:
    """No numbers: the machine is the operator's business, who has `/metrics`."""
    service_of(request).tenant(request)
    return SdMemory()


@router.get("/cmd-flags", responses=ERRORS)
async def cmd_flags(request: Request) -> dict[str, object]:
    """None of that program's flags: how this server is set up is the operator's business."""
    service_of(request).tenant(request)
    return {}


@router.get("/options", responses=ERRORS)
async def get_options(request: Request) -> dict[str, object]:
    """The options that clients read; they are the same for everybody and cannot be changed."""
    service = service_of(request)
    service.tenant(request)
    return options(service.intake.library.base, service.intake.library.base_hash)


@router.post("/options", responses=ERRORS)
async def set_options(request: Request, wanted: dict[str, object]) -> None:
    """Does nothing if every option has its value already; else refuses the first that differs, by name."""
    service = service_of(request)
    service.tenant(request)
    check_options(wanted, service.intake.library.base, base_hash=service.intake.library.base_hash)
