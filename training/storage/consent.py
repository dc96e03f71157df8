"""A consent: who allowed the use of a subject's photos, for what and until when."""

from datetime import UTC, datetime
from typing import Literal

from pydantic import AwareDatetime, Field, field_validator, model_validator

from training.storage.closed import Closed

SubjectKind = Literal["person", "pet", "object"]
ConsentScope = Literal["train", "generate", "public"]


class Consent(Closed):
    """Who allowed the use of photos, for what and until when."""

    kind: SubjectKind
    granted_by: str = Field(min_length=1, max_length=200, description="who agreed: the person, or who may speak for it")
    scope: tuple[ConsentScope, ...] = Field(("train", "generate"), min_length=1)
    evidence: str = Field(
        pattern=r"^([0-9a-f]{64}|[a-z][a-z0-9+.-]*:\S{1,500})$",
        description="of the agreement itself: the SHA-256 of a document, or a URI",
    )
    granted_at: AwareDatetime
    expires_at: AwareDatetime | None = None

    @field_validator("scope")
    @classmethod
    def _trains(cls, scope: tuple[ConsentScope, ...]) -> tuple[ConsentScope, ...]:
        if "train" not in scope:
            raise ValueError("`scope` lacks 'train': without it nothing may be trained")
        return scope

    @model_validator(mode="after")
    def _in_order(self) -> "Consent":
        if self.expires_at is not None and self.expires_at <= self.granted_at:
            raise ValueError(
                f"`expires_at` {self.expires_at.isoformat()} is not after `granted_at` {self.granted_at.isoformat()}"
            )
        return self

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)
