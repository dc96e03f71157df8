"""What the calls about files, jobs and runs answer: OpenAI's objects, with some additions. Knows no torch."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from serving.http.paging import Listed, Page

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled", "paused"]


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
    unchecked: list[str] = Field(description="what was not looked at in the photos, and why")


class FilePage(Page[FileInfo]):
    """A page of files, the latest first."""


class CaptionInfo(BaseModel):
    """A caption that is proposed for a photo, or why there is none."""

    name: str
    object: Literal["caption"] = "caption"
    caption: str | None = None
    error: str | None = None


class CaptionPage(Listed[CaptionInfo]):
    """Captions in the order of the photos."""

    model: str


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


class SubjectProgress(BaseModel):
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
    progress: SubjectProgress


class JobPage(Page[JobInfo]):
    """A page of jobs, the latest first."""


class EventInfo(BaseModel):
    """Something that happened to a job or run."""

    id: str
    object: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class EventPage(Page[EventInfo]):
    """A page of events, the latest first."""


class CheckpointInfo(BaseModel):
    """A step of a subject, with its scores. `version` once it has been published."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str | None
    step_number: int
    metrics: dict[str, float]
    version: str | None = None
    kept: bool = Field(description="whether its weights are there: it can be published, drawn with and made current")
    current: bool = False
    chosen: bool = False
    reason: str | None = Field(None, description="why it was chosen, or rejected")


class CheckpointPage(Page[CheckpointInfo]):
    """The checkpoints of a subject, the latest step first."""


class SampleInfo(BaseModel):
    """A picture that was drawn while a subject trained."""

    name: str
    object: Literal["sample"] = "sample"
    step: int
    index: int
    url: str


class SamplePage(Listed[SampleInfo]):
    """The pictures of a subject, the earliest step first."""


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
    progress: SubjectProgress


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


class RunPage(Page[RunInfo]):
    """A page of runs, the latest first."""


class RunSubjects(Listed[RunSubject]):
    """The subjects of a run, in manifest order."""
