"""The nodes, by ComfyUI's conventions: class attributes say what goes in and out, `FUNCTION` names what runs.

An IMAGE is a float tensor [B, H, W, C] from 0 to 1.
"""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from PIL import Image

from .fleet import FleetClient, FleetError, fleet_of

CATEGORY = "dreamfleet"
FLEET = "DREAMFLEET"
BASES_OWN = "the base's own"
SAMPLERS = (BASES_OWN, "ddim", "euler", "euler_a", "dpm++_2m", "euler_karras", "euler_a_karras", "dpm++_2m_karras")
FORMATS = ("kohya", "diffusers", "peft", "lora_diffusion", "ai_toolkit")
LARGEST_SEED = 2**53 - 1

Inputs = dict[str, dict[str, tuple[Any, ...]]]


class DreamfleetServer:
    """Which server the other nodes use."""

    RETURN_TYPES: ClassVar[tuple[str, ...]] = (FLEET,)
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("fleet",)
    FUNCTION: ClassVar[str] = "connect"
    CATEGORY: ClassVar[str] = CATEGORY
    DESCRIPTION: ClassVar[str] = "A dreamfleet server. Its key is read from DREAMFLEET_KEY or settings.json."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """An address; empty: that of DREAMFLEET_URL, settings.json or this machine."""
        return {"required": {"url": ("STRING", {"default": "", "placeholder": "as DREAMFLEET_URL says"})}}

    def connect(self, url: str) -> tuple[FleetClient]:
        """The server. Nothing is asked of it yet."""
        return (fleet_of(url),)


class DreamfleetGenerate:
    """Draws pictures with an adapter, or with several."""

    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("IMAGE", "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("images", "info")
    FUNCTION: ClassVar[str] = "draw"
    CATEGORY: ClassVar[str] = CATEGORY
    DESCRIPTION: ClassVar[str] = "Pictures of a prompt, drawn by the server; 0 and empty fields are its defaults."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """`adapter` is `id`, `tenant/id`, either with `@version`; empty: the base alone."""
        side = {"default": 0, "min": 0, "max": 8192, "step": 8}
        return {
            "required": {
                "fleet": (FLEET,),
                "prompt": ("STRING", {"multiline": True, "default": ""}),
                "adapter": ("STRING", {"default": ""}),
                "weight": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
                "seed": ("INT", {"default": 0, "min": 0, "max": LARGEST_SEED, "control_after_generate": True}),
                "count": ("INT", {"default": 1, "min": 1, "max": 64}),
                "width": ("INT", side),
                "height": ("INT", side),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000}),
                "guidance_scale": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.5}),
                "scheduler": (SAMPLERS, {"default": BASES_OWN}),
            },
            "optional": {
                "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
                "more_adapters": ("STRING", {"multiline": True, "default": "", "placeholder": "id:weight, one a line"}),
                "prompt_syntax": (("plain", "a1111"), {"default": "plain"}),
                "image": ("IMAGE",),
                "strength": ("FLOAT", {"default": 0.8, "min": 0.01, "max": 1.0, "step": 0.01}),
            },
        }

    def draw(
        self,
        fleet: FleetClient,
        prompt: str,
        adapter: str,
        weight: float,
        seed: int,
        count: int,
        width: int,
        height: int,
        steps: int,
        guidance_scale: float,
        scheduler: str,
        negative_prompt: str = "",
        more_adapters: str = "",
        prompt_syntax: str = "plain",
        image: torch.Tensor | None = None,
        strength: float = 0.8,
    ) -> tuple[torch.Tensor, str]:
        """Images [count, H, W, 3], and JSON that tells seeds and the versions of adapters. Raises FleetError."""
        if bool(width) != bool(height):
            raise FleetError(f"The size is {width}x{height}: give both width and height, or 0 for the base's own.")
        body: dict[str, Any] = {
            "prompt": prompt,
            "seed": seed,
            "n": count,
            "prompt_syntax": prompt_syntax,
            "adapters": [
                *([{"id": adapter.strip(), "weight": weight}] if adapter.strip() else []),
                *mix(more_adapters),
            ],
            "size": f"{width}x{height}" if width else None,
            "steps": steps or None,
            "guidance_scale": guidance_scale or None,
            "scheduler": None if scheduler == BASES_OWN else scheduler,
            "negative_prompt": negative_prompt or None,
        }
        if image is not None:
            body |= {"image": png_of(image), "strength": strength}
        files, answer = fleet.draw({name: value for name, value in body.items() if value is not None})
        return torch.cat([image_of(file) for file in files]), json.dumps(answer)


class DreamfleetAdapters:
    """Lists what may be drawn with."""

    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("STRING", "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("names", "details")
    FUNCTION: ClassVar[str] = "list"
    CATEGORY: ClassVar[str] = CATEGORY
    DESCRIPTION: ClassVar[str] = "The adapters of the server: their names, one a line, and all about them as JSON."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """A server."""
        return {"required": {"fleet": (FLEET,)}}

    @classmethod
    def IS_CHANGED(cls, **inputs: object) -> float:
        """Never the same: adapters are trained meanwhile."""
        return math.nan

    def list(self, fleet: FleetClient) -> tuple[str, str]:
        """Names, one a line, and JSON. Raises FleetError."""
        found = fleet.adapters()
        return "\n".join(f"{one['tenant']}/{one['id']}" for one in found), json.dumps(found)


class DreamfleetAdapterFile:
    """Fetches an adapter as a file, for ComfyUI's own nodes."""

    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("STRING", "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("lora_name", "path")
    FUNCTION: ClassVar[str] = "fetch"
    CATEGORY: ClassVar[str] = CATEGORY
    OUTPUT_NODE: ClassVar[bool] = True
    DESCRIPTION: ClassVar[str] = "Saves an adapter into ComfyUI's folder of LoRAs; a version that is there stays."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """`folder`: empty for ComfyUI's own of LoRAs."""
        return {
            "required": {
                "fleet": (FLEET,),
                "adapter": ("STRING", {"default": ""}),
                "format": (FORMATS, {"default": "kohya"}),
            },
            "optional": {"folder": ("STRING", {"default": ""})},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: object) -> float:
        """Never the same: the adapter may have got another version."""
        return math.nan

    def fetch(self, fleet: FleetClient, adapter: str, format: str, folder: str = "") -> tuple[str, str]:
        """The file's name as ComfyUI lists it, and its path. A reader never sees half a file. Raises FleetError."""
        name, data = fleet.file(adapter.strip(), format)
        target = (Path(folder).expanduser() if folder else _loras()) / f"{format}-{name}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            part.write_bytes(data)
            part.replace(target)
        return target.name, str(target)


def mix(text: str) -> list[dict[str, Any]]:
    """The adapters of lines `id:weight`, or `id` with weight 1. Raises FleetError for a weight that is no number."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, weight = line.partition(":")
        try:
            found.append({"id": name.strip(), "weight": float(weight or 1)})
        except ValueError:
            raise FleetError(f"'{line}': '{weight}' is no weight. Write one adapter a line, as rusty:0.8.") from None
    return found


def image_of(file: bytes) -> torch.Tensor:
    """A picture file as an IMAGE [1, H, W, 3]."""
    with Image.open(io.BytesIO(file)) as opened:
        pixels = numpy.asarray(opened.convert("RGB"), dtype=numpy.float32) / 255.0
    return torch.from_numpy(pixels)[None]


def png_of(image: torch.Tensor) -> str:
    """The first picture of an IMAGE as a PNG file in base64."""
    pixels = (image[0, :, :, :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def _loras() -> Path:
    """ComfyUI's folder of LoRAs. Raises FleetError outside ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        raise FleetError("This is not ComfyUI, so there is no folder of LoRAs: name a folder.") from None
    return Path(folder_paths.get_folder_paths("loras")[0])


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "DreamfleetServer": DreamfleetServer,
    "DreamfleetGenerate": DreamfleetGenerate,
    "DreamfleetAdapters": DreamfleetAdapters,
    "DreamfleetAdapterFile": DreamfleetAdapterFile,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DreamfleetServer": "dreamfleet: server",
    "DreamfleetGenerate": "dreamfleet: draw",
    "DreamfleetAdapters": "dreamfleet: adapters",
    "DreamfleetAdapterFile": "dreamfleet: adapter file",
}
