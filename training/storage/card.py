"""The card of a published version: where it came from, how it was made, how it was judged, and who agreed to it.

Owns the fields of `card.json`. A card holds no path, host, token or key.
"""

from typing import Annotated

from pydantic import ConfigDict, Field, JsonValue, StringConstraints

from training.storage.closed import Closed
from training.storage.consent import Consent

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8,64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
MAX_BYTES = 4 << 30  # of an adapter file: far above any; a server's own limit is in its settings


class _Part(Closed):
    model_config = ConfigDict(populate_by_name=True)


class Score(_Part):
    """One number about one step, and the model that gave it."""

    name: str
    value: Finite
    model: str
    step: int | None = None


class Chosen(_Part):
    """Which step was published, and why."""

    step: int
    reason: str


class Card(_Part):
    """What is known about one version; never changed after publication."""

    # the weights
    sha256: Sha256
    size: int  # bytes
    created: str  # ISO 8601 with an offset
    fingerprint: Fingerprint  # of everything that decides the weights: equal fingerprints train nothing twice
    # the base and what was changed in it
    base: str
    base_hash: str
    family: str = ""  # of the base, as messages call it
    rank: int
    alpha: float  # as trained; the file has alpha / rank folded in
    targets: tuple[str, ...]
    text_encoder_targets: tuple[str, ...] = ()
    # the subject
    instance_prompt: str
    class_prompt: str | None = None
    class_name: str = Field(alias="class")
    trigger: str = ""
    image_hashes: tuple[str, ...] = ()
    image_looks: tuple[str, ...] = ()  # perceptual hashes
    consent: Consent | None = None
    consent_id: str | None = None
    sources: tuple[str, ...] = ()  # `tenant/id@version` of the adapters that it was merged from
    # the training
    run: str | None = None  # None: imported
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    steps: int = 0
    loss: Finite | None = None
    scores: tuple[Score, ...] = ()
    chosen: Chosen | None = None
    # read where `current.json` does not say who may see the adapter
    public: bool = False
