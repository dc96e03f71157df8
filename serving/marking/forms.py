"""The image files that are marked and read."""

from typing import Literal

ImageForm = Literal["png", "jpeg", "webp"]


def form_of(data: bytes) -> ImageForm | None:
    """What a file's first bytes say it is; None for anything else."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
