"""Captions by a model behind an OpenAI-compatible endpoint: chat completions with a picture."""

import base64
import io
import os
from typing import Any

import httpx
from PIL import Image

from training.captioning.settings import KEY
from training.errors import UserError

TIMEOUT_S = 120.0
MOST_TOKENS = 120
LARGEST_PX = 768  # of the longer side of the picture that is sent


class EndpointCaptioner:
    """Sends each picture, reduced, as a JPEG file in a message."""

    def __init__(self, url: str, model: str, prompt: str) -> None:
        self.name = model
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._prompt = prompt
        key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT_S, transport=httpx.HTTPTransport(retries=2))

    def describe(self, image: Image.Image, class_: str) -> str:
        """What a picture shows. Raises UserError with what the endpoint said, if it refuses."""
        asked = self._prompt.replace("{class}", class_ or "subject")
        content = [
            {"type": "text", "text": asked},
            {"type": "image_url", "image_url": {"url": _data_url(image)}},
        ]
        body = {"model": self.name, "messages": [{"role": "user", "content": content}], "max_tokens": MOST_TOKENS}
        try:
            answer = self._client.post(self._url, json=body)
        except httpx.HTTPError as error:
            raise UserError(f"The endpoint of captions cannot be reached: {error}.") from None
        if not answer.is_success:
            hint = f" Set {KEY} to its key." if answer.status_code in (401, 403) else ""
            raise UserError(f"The endpoint of captions answered {answer.status_code}: {answer.text[:300]}.{hint}")
        try:
            said: Any = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            said = None
        if not isinstance(said, str):
            raise UserError(f"The endpoint of captions answered without a text: {answer.text[:300]}")
        return said


def _data_url(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((LARGEST_PX, LARGEST_PX))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
