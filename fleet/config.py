"""How a fleet is set up. Knows no torch."""

from pydantic import Field

from serving.config import ServeSpec
from training.captioning.settings import CaptionSpec
from training.manifest.plan import MAX_ROWS
from training.storage.closed import Closed


class TrainLimits(Closed):
    """What one tenant may send to be trained."""

    file_bytes: int = Field(default=256 * 2**20, ge=1024, description="size of an uploaded archive of photos")
    files: int = Field(default=1000, ge=1, description="archives that one tenant may have")
    subjects: int = Field(default=200, ge=1, description="subjects of one run")
    waiting: int = Field(default=1000, ge=1, description="subjects of one tenant that wait or train at once")
    max_steps: int = Field(default=100_000, ge=1, description="optimizer steps of one subject")


# fields of `FleetSpec` that are flags of the command that starts a fleet
FLEET_FLAGS = ("train_share", "warm_s", "train_rows", "uris", "private_hooks")


class FleetSpec(Closed):
    """A whole fleet: what it serves, what it trains, and how both share a device."""

    server: ServeSpec = ServeSpec.model_construct()
    limits: TrainLimits = TrainLimits.model_construct()
    captions: CaptionSpec = CaptionSpec.model_construct()
    train_share: float = Field(
        default=0.25, gt=0, lt=1, description="the part of the device that training gets while pictures are wanted"
    )
    warm_s: float = Field(default=300.0, ge=0, description="seconds that a lane stays open when nothing waits for it")
    train_rows: int = Field(default=MAX_ROWS, ge=1, description="rows of one fused training step")
    uris: tuple[str, ...] = Field(default=(), description="beginnings of URIs that photos may be read from; none")
    private_hooks: bool = Field(default=False, description="webhooks may go to loopback and private addresses")
