"""What the calls about usage, the fleet, tenants and keys answer. Knows no torch."""

from typing import Literal

from pydantic import BaseModel, Field

from fleet.http.bodies import QuotaBody
from serving.http.paging import Listed
from training.manifest.consent import Policy


class UsageLine(BaseModel):
    """What an adapter was used for, or made with, on a day; the adapter is empty for the base alone."""

    day: str
    adapter: str
    images: float = 0
    pixel_steps: float = 0
    training_steps: float = 0
    device_seconds: float = 0


class UsageInfo(BaseModel):
    """What a tenant has used."""

    object: Literal["usage"] = "usage"
    tenant: str
    since: str
    until: str
    data: list[UsageLine]
    total: dict[str, float]
    stored_bytes: dict[str, int] = Field(description="bytes kept now: adapters, files")


class LaneInfo(BaseModel):
    """A lane: subjects that train in one pack on one device. `subjects` are the caller's, by run or job."""

    lane: int
    images_per_second: float
    subjects: list[dict[str, str]]
    others: int = Field(description="subjects of other tenants in the same pack")


class FleetInfo(BaseModel):
    """How the fleet stands, as the caller may see it."""

    object: Literal["fleet"] = "fleet"
    base: str
    driven: bool = Field(description="whether a driver lives")
    lanes: list[LaneInfo]
    waiting: int = Field(description="subjects of all tenants that wait")
    waiting_mine: int


class ConsentRules(BaseModel):
    """Which subjects need a consent, as the operator says: persons, all or none."""

    object: Literal["consent.rules"] = "consent.rules"
    policy: Policy
    persons: list[str] = Field(description="nouns: a subject whose class has one of them is a person")


class CallerInfo(BaseModel):
    """Who calls."""

    object: Literal["caller"] = "caller"
    tenant: str
    scopes: list[str]
    key: str | None = None
    keys: bool = Field(description="whether the server has keys at all")


class TenantInfo(BaseModel):
    """A tenant, as an admin sees it."""

    id: str
    object: Literal["tenant"] = "tenant"
    quota: QuotaBody
    waiting: int
    device_seconds: float = Field(description="of this calendar month")


class TenantPage(Listed[TenantInfo]):
    """All tenants that have a key, a quota, or have used anything."""


class KeyInfo(BaseModel):
    """A key; `key` is shown only when it is made."""

    id: str
    object: Literal["key"] = "key"
    tenant: str
    scopes: list[str]
    state: Literal["active", "expired", "revoked"]
    created: str
    expires: str | None = None
    key: str | None = None


class KeyPage(Listed[KeyInfo]):
    """All keys."""
