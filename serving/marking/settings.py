"""How a server marks its pictures. Knows no torch."""

from typing import Literal

from pydantic import Field

from training.storage.closed import Closed


class MarkSpec(Closed):
    """What a server's pictures carry, and what it tells about them."""

    watermark: Literal["noise", "none"] = Field(
        default="noise", description="noise: the first latents carry a keyed message; none: pictures carry none"
    )
    credentials: bool = Field(
        default=True, description="a signed C2PA manifest and XMP's digital source type in every picture file"
    )
    certificate: str | None = Field(
        default=None, description="PEM file of the certificate chain that signs, leaf first; by default a self-made one"
    )
    certificate_key: str | None = Field(default=None, description="PEM file of its private key")
    timestamp_url: str | None = Field(
        default=None, pattern=r"^https?://\S+$", description="an RFC 3161 time-stamp service for signatures; none"
    )
    operator: str = Field(default="dreamfleet", min_length=1, max_length=200, description="who runs the service")
    operator_tenant: str | None = Field(
        default=None, description="the tenant whose admin keys may know whose any picture is; none: nobody's"
    )
    tell_prompt: bool = Field(default=False, description="the manifest names prompt and negative prompt, too")
    detect_per_minute: int = Field(
        default=30, ge=1, description="pictures a minute that callers without a key may have looked at, each address"
    )
