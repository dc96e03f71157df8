"""What goes over HTTP about training: OpenAI's files and fine-tuning calls, with some additions. Knows no torch."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.http.wire import Name
from training.manifest.subject import ID_PATTERN
from training.storage.closed import Closed

Id = Annotated[str, Field(pattern=rf"^{ID_PATTERN}$", max_length=63)]
Key = Annotated[str, Field(max_length=64)]
Metadata = Annotated[dict[Key, Annotated[str, Field(max_length=512)]], Field(max_length=16)]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled", "paused"]
EVENTS = Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]


class HookBody(Closed):
    """Who is told when a job ends: the body is the job, signed by the Standard Webhooks convention."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/]", max_length=2000)]
    secret: Annotated[
        str, Field(min_length=16, max_length=200, description="`whsec_<base64>`, or any text; signs the messages")
    ]
    events: Annotated[tuple[EVENTS, ...], Field(max_length=8, description="which to send; none: all of them")] = ()


class DreamBooth(BaseModel):
    """What a manifest says of a subject, but its id and images: class, instance_prompt, lora, prior, train, ..."""

    model_config = ConfigDict(extra="allow")


class Method(Closed):
    """How it is trained."""

    type: Literal["dreambooth_lora"]
    dreambooth_lora: DreamBooth = DreamBooth()


class JobBody(Closed):
    """`POST /v1/fine_tuning/jobs`: one subject."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "pocket",
                    "training_file": "file-18b0c2",
                    "suffix": "rusty",
                    "seed": 0,
                    "method": {
                        "type": "dreambooth_lora",
                        "dreambooth_lora": {"class": "dog", "instance_prompt": "a photo of a sks {class}"},
                    },
                    "hyperparameters": {"max_steps": 250, "learning_rate": 0.002},
                }
            ]
        }
    )

    model: Name = Field(description="the base")
    training_file: Name = Field(description="`file-...`, or `file-.../folder` where the archive has several")
    suffix: Id | None = Field(None, description="the adapter's id; made of the file's name by default")
    seed: int | None = Field(None, ge=0, lt=2**63)
    metadata: Metadata | None = None
    hyperparameters: dict[Key, Any] | None = Field(
        None, description="a subject's `train` settings, `rank`, `alpha`, or OpenAI's names", max_length=64
    )
    method: Method | None = None
    webhook: HookBody | None = None
    priority: int = Field(0, ge=-100, le=100, description="higher ones train first; above 0 for admins only")
    validation_file: None = Field(None, description="photos to judge by are held out: `evaluate.hold_out`")
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None


class RunBody(Closed):
    """`POST /v1/runs`: a whole manifest, as JSON or as the text of its YAML file."""

    manifest: dict[str, Any] | Annotated[str, Field(max_length=2_000_000)] = Field(
        description="subjects' `images` are file ids, `file-.../folder`"
    )
    metadata: Metadata | None = None
    webhook: HookBody | None = None
    priority: int = Field(0, ge=-100, le=100)


class FileProblem(BaseModel):
    """A file of an archive that is not used."""

    name: str
    reason: str


class FileWarning(BaseModel):
    """What could be better about photos."""

    kind: str
    names: list[str]
    message: str
    advice: str


class FileSubject(BaseModel):
    """The photos of one folder of an archive, as they were checked. `images` is what a manifest or job calls them."""

    folder: str
    images: str
    photos: int
    captions: int
    problems: list[FileProblem]
    warnings: list[FileWarning]
    error: str | None = Field(None, description="why nobody could train on them")


class FileInfo(BaseModel):
    """An uploaded archive."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: None = None
    filename: str
    purpose: str
    status: Literal["processed", "error"]
    status_details: str | None = None
    subjects: list[FileSubject]


class FilePage(BaseModel):
    """A page of files, the latest first."""

    object: Literal["list"] = "list"
    data: list[FileInfo]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class FileDeleted(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class Progress(BaseModel):
    """How a subject stands. Times are seconds."""

    state: str = Field(description="queued, preparing, training, evaluating, paused, published, failed, ...")
    doing: str | None = Field(None, description="what is being done with it now")
    step: int
    max_steps: int
    loss: float | None = None
    seconds: float
    place: int | None = Field(None, description="in the queue, from 1")
    lane: int | None = Field(None, description="who trains it; subjects of one lane train in one pack")
    together: int | None = Field(None, description="subjects in its pack, itself among them")
    images_per_second: float | None = Field(None, description="of its pack")
    warnings: list[str] = []
    attempts: list[dict[str, Any]] = []


class JobInfo(BaseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None = None
    estimated_finish: int | None = None
    status: JobStatus
    model: str
    fine_tuned_model: str | None = None
    organization_id: str
    training_file: str
    validation_file: None = None
    result_files: list[str] = []
    trained_tokens: int | None = None
    seed: int
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    error: JobError | None = None
    metadata: dict[str, str]
    integrations: list[Any] = []
    suffix: str
    adapter: str = Field(description="`<tenant>/<id>`")
    version: str | None = None
    priority: int = 0
    progress: Progress


class JobPage(BaseModel):
    """A page of jobs, the latest first."""

    object: Literal["list"] = "list"
    data: list[JobInfo]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class EventInfo(BaseModel):
    """Something that happened to a job or run."""

    id: str
    object: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class EventPage(BaseModel):
    """A page of events, the latest first."""

    object: Literal["list"] = "list"
    data: list[EventInfo]
    has_more: bool = False


class CheckpointInfo(BaseModel):
    """A step of a job that was kept, with its scores. `version` if it has been published."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str | None
    step_number: int
    metrics: dict[str, float]
    version: str | None = None
    current: bool = False
    chosen: bool = False
    reason: str | None = Field(None, description="why it was chosen, or rejected")


class CheckpointPage(BaseModel):
    """The checkpoints of a job, the latest step first."""

    object: Literal["list"] = "list"
    data: list[CheckpointInfo]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class SampleInfo(BaseModel):
    """A picture that was drawn while a subject trained."""

    name: str
    object: Literal["sample"] = "sample"
    step: int
    index: int
    url: str


class SamplePage(BaseModel):
    """The pictures of a subject, the earliest step first."""

    object: Literal["list"] = "list"
    data: list[SampleInfo]


class RunSubject(BaseModel):
    """One subject of a run."""

    id: str
    object: Literal["run.subject"] = "run.subject"
    run: str
    status: JobStatus
    model: str
    fine_tuned_model: str | None = None
    adapter: str
    version: str | None = None
    error: JobError | None = None
    estimated_finish: int | None = None
    progress: Progress


class RunInfo(BaseModel):
    """A run: a manifest that was submitted whole."""

    id: str
    object: Literal["run"] = "run"
    name: str
    tenant: str
    created_at: int
    finished_at: int | None = None
    estimated_finish: int | None = None
    status: Literal["running", "done", "failed", "cancelled"]
    model: str
    metadata: dict[str, str]
    priority: int = 0
    counts: dict[str, int] = Field(description="subjects by state")


class RunPage(BaseModel):
    """A page of runs, the latest first."""

    object: Literal["list"] = "list"
    data: list[RunInfo]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class RunSubjects(BaseModel):
    """The subjects of a run, in manifest order."""

    object: Literal["list"] = "list"
    data: list[RunSubject]


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


class CallerInfo(BaseModel):
    """Who calls."""

    object: Literal["caller"] = "caller"
    tenant: str
    scopes: list[str]
    key: str | None = None
    keys: bool = Field(description="whether the server has keys at all")


class QuotaBody(Closed):
    """What a tenant may take; what is left out is not bounded."""

    devices: int | None = Field(None, ge=1, le=100_000)
    waiting: int | None = Field(None, ge=1, le=1_000_000)
    device_seconds: int | None = Field(None, ge=1, le=10**12, description="a calendar month, UTC")


class TenantInfo(BaseModel):
    """A tenant, as an admin sees it."""

    id: str
    object: Literal["tenant"] = "tenant"
    quota: QuotaBody
    waiting: int
    device_seconds: float = Field(description="of this calendar month")


class TenantPage(BaseModel):
    """All tenants that have a key, a quota, or have used anything."""

    object: Literal["list"] = "list"
    data: list[TenantInfo]


class KeyBody(Closed):
    """A key to be made."""

    tenant: Id
    scopes: Annotated[tuple[Literal["images", "train", "admin"], ...], Field(min_length=1, max_length=3)] = (
        "images",
        "train",
    )
    expires_at: int | None = Field(None, ge=0, le=2**33, description="seconds since the epoch")


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


class KeyPage(BaseModel):
    """All keys."""

    object: Literal["list"] = "list"
    data: list[KeyInfo]
