"""Bodies of the calls about training: OpenAI's, with some additions. An unknown field is an error that names it.

Knows no torch."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.http.wire import Name
from training.manifest.subject import ID_PATTERN
from training.storage.closed import Closed
from training.storage.consent import Consent

Id = Annotated[str, Field(pattern=rf"^{ID_PATTERN}$", max_length=63)]
Key = Annotated[str, Field(max_length=64)]
Metadata = Annotated[dict[Key, Annotated[str, Field(max_length=512)]], Field(max_length=16)]
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
    consent: Consent | None = Field(None, description="who allowed the use of the photos; persons need one")
    webhook: HookBody | None = None
    priority: int = Field(0, ge=-100, le=100, description="higher ones train first; above 0 for admins only")
    validation_file: None = Field(None, description="photos to judge by are held out: `evaluate.hold_out`")
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None


class CaptionsBody(Closed):
    """`POST /v1/files/{id}/captions`: which photos, and what they show."""

    folder: Name = Field("", description="the folder of the archive, where it has several")
    names: Annotated[tuple[Name, ...], Field(max_length=200)] = Field((), description="photos; none: all of the folder")
    class_: Annotated[str, Field(max_length=200)] = Field(alias="class", description="what it is: dog")
    instance_prompt: Annotated[str, Field(max_length=1000)] = Field(
        "a photo of sks {class}", description="of the subject: the words that call it are put into the captions"
    )


class RunBody(Closed):
    """`POST /v1/runs`: a whole manifest, as JSON or as the text of its YAML file."""

    manifest: dict[str, Any] | Annotated[str, Field(max_length=2_000_000)] = Field(
        description="subjects' `images` are file ids, `file-.../folder`"
    )
    metadata: Metadata | None = None
    webhook: HookBody | None = None
    priority: int = Field(0, ge=-100, le=100)


class QuotaBody(Closed):
    """What a tenant may take; what is left out is not bounded."""

    devices: int | None = Field(None, ge=1, le=100_000)
    waiting: int | None = Field(None, ge=1, le=1_000_000)
    device_seconds: int | None = Field(None, ge=1, le=10**12, description="a calendar month, UTC")


class KeyBody(Closed):
    """A key to be made."""

    tenant: Id
    scopes: Annotated[tuple[Literal["images", "train", "admin"], ...], Field(min_length=1, max_length=3)] = (
        "images",
        "train",
    )
    expires_at: int | None = Field(None, ge=0, le=2**33, description="seconds since the epoch")
