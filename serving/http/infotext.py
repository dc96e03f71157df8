"""The settings of a picture as AUTOMATIC1111 writes them into its PNG files, and as its users paste them back."""

import io
import json

from PIL import PngImagePlugin

from serving.engine.request import AdapterUse, GenerateRequest
from serving.http.sdapi.samplers import sampler_label

KEY = "parameters"
_INSTANT = 1e-4  # of the steps: what a weight that jumps takes, as keyframes say it
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
    prompt = " ".join([request.prompt, *(f"<lora:{name}:{_weights(use)}>" for name, use in worn)])
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


def _weights(use: AdapterUse) -> str:
    """The weights of a tag. Those that change over the steps are keyframes: each span's, at its start and its end."""
    denoiser = f"{use.weight:g}"
    if use.schedule:
        denoiser = ",".join(f"{weight:g}@{share:g}" for share, weight in _frames(use))
    if use.text_weight is None and not use.schedule:
        return denoiser
    return f"{use.weight if use.text_weight is None else use.text_weight:g}:{denoiser}"


def _frames(use: AdapterUse) -> list[tuple[float, float]]:
    frames, end = [], 0.0
    for span in use.schedule:
        if span.start > end:
            frames += [(end, 0.0), (max(end, span.start - _INSTANT), 0.0)]
        frames += [(span.start, span.weight), (max(span.start, span.end - _INSTANT), span.weight)]
        end = span.end
    return [*frames, (end, 0.0)] if end < 1 else frames


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
