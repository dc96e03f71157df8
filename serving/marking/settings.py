"""How a server marks its pictures. Knows no torch."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from training.storage.closed import Closed


class MarkSpec(Closed):
    """What a server's pictures carry, and what it tells about them."""

    watermark: Literal["noise", "none"] = Field(
        default="noise", description="noise: the first latents carry a keyed message; none: pictures carry none"
    )
    pixels: bool = Field(
        default=False,
        description="a second mark in the pixels of pictures of 256 px and more; needs the extra rivagan",
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
    suspend_reported: bool = Field(
        default=False, description="a report takes the adapters of its picture off at once, until the operator decides"
    )
    safety: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="pictures that the safety filter scores as high are withheld; needs the extra safety",
    )
    safety_tenants: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*=(0?\.\d+|1)$")], ...] = (
        Field(default=(), description="other thresholds for some tenants: acme=0.9")
    )
    tell_prompt: bool = Field(default=False, description="the manifest names prompt and negative prompt, too")
    detect_per_minute: int = Field(
        default=30, ge=1, description="pictures a minute that callers without a key may have looked at, each address"
    )

    def most_unsafe(self, tenant: str) -> float | None:
        """The score from which a tenant's pictures are withheld; None where there is no filter."""
        others = dict(one.split("=") for one in self.safety_tenants)
        return None if self.safety is None else float(others.get(tenant, self.safety))
