"""The settings of a picture as AUTOMATIC1111 writes them into its PNG files, and as its users paste them back."""

import io
import json
import re

from PIL import PngImagePlugin

from serving.engine.request import AdapterUse, ControlUse, GenerateRequest
from serving.http.sdapi.samplers import sampler_label

KEY = "parameters"
_NEGATIVE = "Negative prompt:"
_FIELD = re.compile(r'([A-Za-z][A-Za-z0-9 /-]{1,60}): *("(?:\\.|[^\\"]){0,4000}"|[^,"]{0,1000})(?:,|$)')
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
        "Denoising strength": _strength(request),
        **_second_pass(request),
        "Lora hashes": ", ".join(f"{name}: {use.ref.version[:12]}" for name, use in worn) or None,
    }
    settings |= {f"ControlNet {index}": _control(use) for index, use in enumerate(request.controls)}
    prompt = " ".join([request.prompt, *(f"<lora:{name}:{use.weight:g}>" for name, use in worn)])
    negative = f"\n{_NEGATIVE} {request.negative_prompt}" if request.negative_prompt else ""
    told = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)
    return f"{prompt}{negative}\n{told}"


def read_infotext(text: str) -> dict[str, str]:
    """The fields of such a text, prompts as `Prompt` and `Negative prompt`; empty if it is none. Takes linear time."""
    *lines, last = text.strip().split("\n")
    found = {name: _unquoted(value.strip()) for name, value in _FIELD.findall(last)}
    if len(found) < 3:  # no line of settings: all of it is the prompt
        lines, found = [*lines, last], {}
    prompt: list[str] = []
    negative: list[str] = []
    part = prompt
    for line in lines:
        if line.startswith(_NEGATIVE):
            part, line = negative, line.removeprefix(_NEGATIVE)
        part.append(line.strip())
    told = {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}
    return {name: value for name, value in {**told, **found}.items() if value}


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


def _strength(request: GenerateRequest) -> str | None:
    if request.hires is not None:
        return f"{request.hires.strength:g}"
    return None if request.image is None else f"{request.strength:g}"


def _second_pass(request: GenerateRequest) -> dict[str, object]:
    hires = request.hires
    if hires is None:
        return {}
    return {
        "Hires upscale": f"{hires.width / request.width:g}",
        "Hires steps": max(1, int(hires.steps * hires.strength)),
        "Hires upscaler": hires.upscaler.capitalize(),
    }


def _unquoted(text: str) -> str:
    """The value of a field as `_quoted` writes it."""
    if text.startswith('"'):
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def _control(use: ControlUse) -> str:
    """A unit as the extension writes it."""
    weight = f"Weight: {use.scale:g}, Guidance Start: {use.start:g}, Guidance End: {use.end:g}"
    return f"Module: {use.preprocess}, Model: {use.ref.name} [{use.ref.version[:8]}], {weight}"


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
