"""Which model proposes captions. Knows no torch."""

from typing import Annotated

from pydantic import Field, model_validator

from training.storage.closed import Closed

KEY = "DREAMFLEET_CAPTION_KEY"  # in the environment: the API key of `caption_url`
PROMPT = (
    "Write one short caption of this photo, such as 'a {class} on a beach at sunset'. Say 'a {class}' for the subject "
    "and nothing about how it looks; then the place, the light and what else is to be seen. Answer with the caption."
)


class CaptionSpec(Closed):
    """The model that proposes captions; none by default."""

    caption_model: str | None = Field(
        default=None,
        min_length=1,
        description="folder of a transformers image-to-text model (BLIP, Florence-2, ...) that proposes captions of "
        "photos; with --caption-url the model's name there",
    )
    caption_url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = Field(
        default=None,
        description="an OpenAI-compatible endpoint that proposes them, such as http://127.0.0.1:8001/v1; its key is "
        f"read from {KEY}",
    )
    caption_prompt: str = Field(
        default=PROMPT,
        min_length=1,
        max_length=4000,
        description="what a model that follows instructions is asked; {class} is the subject's class noun",
    )

    @model_validator(mode="after")
    def _named(self) -> "CaptionSpec":
        if self.caption_url is not None and self.caption_model is None:
            raise ValueError("an endpoint serves models by name: give --caption-model, too")
        return self
