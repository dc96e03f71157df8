"""The settings of a picture as AUTOMATIC1111 writes them into its PNG files, and as its users paste them back."""

import io
import json

from PIL import PngImagePlugin

from serving.engine.request import AdapterUse, ControlUse, GenerateRequest
from serving.http.sdapi.samplers import sampler_label

KEY = "parameters"
_HEADER_BYTES = 33  # signature and IHDR, which text may follow


def infotext(request: GenerateRequest, seed: int, base: str, base_hash: str) -> str:
    """Prompt, negative prompt and settings of the picture that `request` makes with `seed`."""
    sampler, schedule = sampler_label(request.scheduler)
    worn = [(name_of(use, request.tenant), use) for use in request.adapters]
    settings = {
        "Steps": request.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": request.guidance_scale,
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": base_hash[:10],
        "Model": base,
        "Denoising strength": None if request.image is None else f"{request.strength:g}",
        "Lora hashes": ", ".join(f"{name}: {use.ref.version[:12]}" for name, use in worn) or None,
    }
    settings |= {f"ControlNet {index}": _control(use) for index, use in enumerate(request.controls)}
    prompt = " ".join([request.prompt, *(f"<lora:{name}:{use.weight:g}>" for name, use in worn)])
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    told = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)
    return f"{prompt}{negative}\n{told}"


def with_infotext(png: bytes, text: str) -> bytes:
    """A PNG file with `text` as its parameters; its pixels stay as they are."""
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, text)
    out = io.BytesIO()
    out.write(png[:_HEADER_BYTES])
    for kind, data, *_ in info.chunks:
        PngImagePlugin.putchunk(out, kind, data)
    out.write(png[_HEADER_BYTES:])
    return out.getvalue()


def name_of(use: AdapterUse, tenant: str) -> str:
    """How `tenant` names an adapter in a tag."""
    return use.ref.id if use.ref.tenant == tenant else f"{use.ref.tenant}/{use.ref.id}"


def _control(use: ControlUse) -> str:
    """A unit as the extension writes it."""
    weight = f"Weight: {use.scale:g}, Guidance Start: {use.start:g}, Guidance End: {use.end:g}"
    return f"Module: {use.preprocess}, Model: {use.ref.name} [{use.ref.version[:8]}], {weight}"


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
