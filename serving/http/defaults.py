"""What a request for images gets on this server that does not say, and how far it may go. Knows no torch."""

from pydantic import BaseModel, Field

from training.base.facts import SamplerName


class ImageDefaults(BaseModel):
    """What a request for images gets that does not say, and what it may ask for."""

    size: str
    multiple: int = Field(description="width and height are multiples of it")
    largest_side: int
    largest_pixels: int = Field(description="width x height x n")
    steps: int
    largest_steps: int
    guidance_scale: float
    scheduler: SamplerName
    negative_prompt: bool = Field(description="whether it has a meaning on this base")
    largest_n: int
    largest_adapters: int
    largest_weight: float
    history: bool = Field(False, description="whether the server keeps a history of pictures")
