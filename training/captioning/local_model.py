"""Captions by an image-to-text model of transformers, from a folder; nothing is downloaded and no code of it is run."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from training.base.base import best_device
from training.errors import UserError

MOST_TOKENS = 80
FLORENCE = "<CAPTION>"  # Florence-2 knows tasks by such words, and follows no other instruction
LARGEST_PX = 1024  # of a picture's longer side: models reduce it further


class LocalCaptioner:
    """A model with its processor: BLIP by the picture alone, Florence-2 by its task, chat models by a prompt."""

    def __init__(self, folder: str, prompt: str, device: torch.device | str | None = None) -> None:
        path = Path(folder).expanduser()
        if not (path / "config.json").is_file():
            raise UserError(f"caption_model '{folder}' is no folder of a transformers model: it has no config.json.")
        # transformers' vision models take a second to import
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._prompt = prompt
        self._device = torch.device(device) if device is not None else best_device()
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        try:
            self._processor: Any = AutoProcessor.from_pretrained(path, local_files_only=True)
            model: Any = AutoModelForImageTextToText.from_pretrained(path, local_files_only=True, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"caption_model '{folder}' cannot be loaded as an image-to-text model: {error}") from None
        self._model = model.requires_grad_(False).eval().to(self._device)
        kind = str(json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
        self._florence = kind.startswith("florence")
        self.name = path.resolve().name

    @torch.inference_mode()
    def describe(self, image: Image.Image, class_: str) -> str:
        """What a picture shows, greedily: the same picture gets the same words."""
        small = image.convert("RGB")
        small.thumbnail((LARGEST_PX, LARGEST_PX))
        inputs = self._inputs(small, class_).to(self._device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        tokens = self._model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)[0]
        asked = inputs.get("input_ids")
        if asked is not None and not self._model.config.is_encoder_decoder:
            same = len(tokens) > asked.shape[1] and bool((tokens[: asked.shape[1]] == asked[0]).all())
            tokens = tokens[asked.shape[1] :] if same else tokens  # decoders say the question again
        said: str = self._processor.decode(tokens, skip_special_tokens=True)
        return said.strip()

    def _inputs(self, image: Image.Image, class_: str) -> Any:
        """What the processor makes of a picture, and of what is asked where the model takes a question."""
        if self._florence:
            return self._processor(text=FLORENCE, images=image, return_tensors="pt")
        if getattr(self._processor, "chat_template", None):
            asked = self._prompt.replace("{class}", class_ or "subject")
            content = [{"type": "image", "image": image}, {"type": "text", "text": asked}]
            return self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        return self._processor(images=image, return_tensors="pt")
