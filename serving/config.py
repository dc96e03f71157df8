"""How a server is set up: sizes, budgets and limits. Knows no torch.

`ServeSpec` is what a user may set; `Limits` what a request may ask for.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from serving.marking.settings import MarkSpec
from training.base.facts import BaseHash, SamplerName
from training.base.quantization import Offload, Quantization
from training.storage.card import MAX_BYTES
from training.storage.closed import Closed

MAX_RANK = 1024
MAX_WORDS = 256


class Limits(Closed):
    """What one request, and one tenant, may ask for."""

    images: int = Field(default=10, ge=1, le=64, description="images a request (n)")
    steps: int = Field(default=150, ge=1, le=1000)
    side_px: int = Field(default=2048, ge=16, le=8192)
    pixels: int = Field(default=2048 * 2048, ge=256, description="width x height x n of one request")
    prompt_chars: int = Field(default=2000, ge=1, le=20_000)
    adapters: int = Field(default=8, ge=1, le=64, description="adapters mixed in one request")
    weight: float = Field(default=10.0, gt=0, description="the largest weight of an adapter, either sign")
    body_bytes: int = Field(default=24 * 2**20, ge=1024)
    upload_bytes: int = Field(default=256 << 20, ge=1024, le=MAX_BYTES, description="size of an uploaded adapter file")
    deadline_s: float = Field(default=600, gt=0, description="a request that takes longer fails with 504")
    tenant_running: int = Field(default=256, ge=1, description="requests of one tenant waiting or running at once")
    tenant_per_minute: int = Field(default=6000, ge=1, description="requests of one tenant in a minute")
    tenant_uploads: int = Field(default=4, ge=1, description="uploads of one tenant at once")
    tenant_uploads_per_minute: int = Field(default=120, ge=1, description="uploads of one tenant in a minute")
    tenant_adapters: int = Field(default=10_000, ge=1, description="adapters that one tenant may have")
    tenant_bytes: int = Field(default=50 * 2**30, ge=1024, description="bytes of all versions of a tenant's adapters")


class EngineSpec(Closed):
    """Sizes and budgets of one engine."""

    device: str | None = Field(
        default=None, pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda, cuda:1; by default CUDA where it works"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="auto: fp32 on a CPU, on CUDA what suits the base: fp16, bf16 for transformers"
    )
    base_quantization: Quantization = Field(
        default="none",
        description="bits of the denoiser's weights: int8 and fp8 by torchao, nf4 by bitsandbytes on CUDA",
    )
    base_offload: Offload = Field(
        default="none", description="layers: the denoiser's wait in host memory; slower, for what does not fit"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of the compute thread")
    slots: int = Field(default=16, ge=1, le=65536, description="adapters on the device at once")
    rank: int = Field(default=32, ge=1, le=MAX_RANK, description="the largest adapter rank served")
    words: int = Field(default=8, ge=0, le=MAX_WORDS, description="textual-inversion vectors that an adapter may bring")
    targets: tuple[str, ...] | None = Field(
        default=None, description="ends of the denoiser's layers that are served; all that adapters change by default"
    )
    text_encoder_targets: tuple[str, ...] | None = Field(default=None, description="the same for text encoders")
    max_rows: int = Field(
        default=32,
        ge=1,
        description="rows of one forward at the base's own size, fewer of larger images; guidance takes two an image",
    )
    queue: int = Field(default=256, ge=1, description="images that may wait; beyond it requests get 429")
    decode_rows: int = Field(default=4, ge=1, description="images of the base's size decoded between two steps")
    vae_tile_px: int = Field(
        default=1024,
        ge=0,
        description="pictures with a longer side are encoded and decoded in overlapping tiles of it; 0: never",
    )
    host_bytes: int = Field(default=2 * 2**30, ge=0, description="host memory for adapters that are not on the device")
    networks: int = Field(default=4, ge=1, le=64, description="ControlNets and IP-Adapters on the device at once")
    prompt_tokens: int = Field(default=600, ge=1, description="tokens of a prompt; longer ones get 400")
    prompt_cache: int = Field(default=512, ge=0, description="prompt embeddings kept")
    loaders: int = Field(default=4, ge=1, le=64, description="threads that fetch and unpack adapters")
    fixed_rows: bool = Field(
        default=False,
        description="pad every forward to `max_rows`: the same seed gives the same bits beside any requests; slower",
    )

    def flags_for(self, rank: int, words: int) -> str:
        """The flags that this server lacks for an adapter of `rank` with `words` vectors; empty if it takes it."""
        short = {"--rank": (rank, self.rank), "--words": (words, self.words)}
        return " ".join(f"{flag} {need}" for flag, (need, there) in short.items() if need > there)


# fields of `ServeSpec` that are flags of the commands that start a server
SERVER_FLAGS = (
    "serves",
    "cors",
    "steps",
    "guidance_scale",
    "scheduler",
    "picture_parameters",
    "history",
    "history_days",
    "link_s",
    "picture_bytes",
    "site",
    "disk_bytes",
    "refresh_s",
)


class ServeSpec(Closed):
    """A whole server."""

    base: str = Field(default="pocket", description="pocket, a diffusers folder or a hub id")
    storage: str = "./storage"
    keys: str | None = Field(default=None, description="tenants and keys file; none: loopback only, one tenant")
    cors: tuple[Annotated[str, StringConstraints(pattern=r"^https?://[^/*\s]+$")], ...] = Field(
        default=(), description="origins whose web pages may use the server, such as https://studio.example; none"
    )
    serves: tuple[BaseHash, ...] = Field(
        default=(),
        description="hashes, or their beginnings (`dreamfleet base NAME --hash`), of other bases whose adapters are "
        "served, too, such as the base that a few-step base was made of",
    )
    engine: EngineSpec = EngineSpec.model_construct()
    limits: Limits = Limits.model_construct()
    # of a request that does not say
    steps: int | None = Field(default=None, ge=1, le=1000, description="denoising steps; none: the base's own")
    guidance_scale: float | None = Field(default=None, ge=0, le=50, description="guidance; none: the base's own")
    scheduler: SamplerName | None = Field(default=None, description="sampler; none: the base's own")
    add_trigger: bool = Field(
        default=False,
        description="an adapter's trigger is put before a prompt that lacks it; the answer has it as `revised_prompt`",
    )
    marks: MarkSpec = MarkSpec.model_construct()
    picture_parameters: bool | None = Field(
        default=None,
        description="PNG files hold prompt, seed and settings, as AUTOMATIC1111 writes and reads them; by default "
        "where the server has no keys: they would tell others a tenant's prompts",
    )
    history: bool = Field(
        default=False,
        description="pictures are kept on the storage with prompt and settings, for their own tenant to see and delete",
    )
    history_days: float = Field(default=30.0, gt=0, description="days that the history keeps a picture")
    link_s: float = Field(
        default=3600.0,
        gt=0,
        le=7 * 86400,
        description="seconds that a link to a picture (response_format url) is valid",
    )
    picture_bytes: int = Field(
        default=2**30, ge=0, description="bytes of a tenant's kept pictures; beyond it the oldest are deleted"
    )
    site: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$",
        description="what links to pictures begin with, such as https://fleet.example; none: what the caller used",
    )
    disk_bytes: int = Field(default=10 * 2**30, ge=0, description="local disk for adapters of an object store; 0: none")
    refresh_s: float = Field(default=1.0, ge=0, description="how old what is known about `current` may be")
