"""A model that says what a picture shows, and its words as a subject's caption."""

import re
from typing import Protocol

from PIL import Image

from training.captioning.settings import CaptionSpec
from training.errors import UserError
from training.manifest.subject import SubjectSpec
from training.photos.captions import MAX_CAPTION_CHARS


class Captioner(Protocol):
    """Says what pictures show. `name` never holds a path of this machine."""

    name: str

    def describe(self, image: Image.Image, class_: str) -> str:
        """What an RGB picture of a subject of this class shows. Raises UserError if the model cannot say."""


class NoCaptioner(UserError):
    """No model is configured."""


def open_captioner(spec: CaptionSpec) -> Captioner:
    """The configured model. Raises NoCaptioner without one, UserError for one that cannot be loaded."""
    if spec.caption_model is None:
        raise NoCaptioner(
            "No model is configured that could propose captions. Give --caption-model FOLDER (a transformers "
            "image-to-text model such as BLIP), or --caption-url URL with --caption-model NAME (an OpenAI-compatible "
            "endpoint); or write captions yourself."
        )
    if spec.caption_url is not None:
        from training.captioning.endpoint import EndpointCaptioner

        return EndpointCaptioner(spec.caption_url, spec.caption_model, spec.caption_prompt)
    from training.captioning.local_model import LocalCaptioner

    return LocalCaptioner(spec.caption_model, spec.caption_prompt)


def worded(said: str, subject: SubjectSpec) -> str:
    """What a model said, as a caption of the subject: its class noun becomes the words that call the subject.

    Where the noun is not found the subject's prompt goes first. One line, printable, no longer than a caption may be.
    """
    text = "".join(letter if letter.isprintable() else " " for letter in said)
    text = " ".join(text.split()).strip(" \"'`").rstrip(".")
    if not text:
        return subject.filled_instance_prompt
    noun, called = subject.class_ or "", subject.trigger
    if called.lower() not in text.lower():
        pattern = re.compile(rf"\b{re.escape(noun)}\b", re.IGNORECASE)
        found = pattern.search(text) if noun else None
        text = pattern.sub(lambda _: called, text, count=1) if found else f"{subject.filled_instance_prompt}, {text}"
    return text[:MAX_CAPTION_CHARS].rstrip()
