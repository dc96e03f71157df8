"""Jobs, runs and subjects as clients see them: OpenAI's objects, made of what lies on the storage. Blocking."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from fleet.board import Board, Submitted
from fleet.http.wire import (
    CheckpointInfo,
    EventInfo,
    JobError,
    JobInfo,
    JobStatus,
    RunInfo,
    RunSubject,
    SampleInfo,
    SubjectProgress,
)
from serving.http.problems import ApiError
from training.base.files.folder import public_name
from training.evaluation.record import load_record
from training.manifest.subject import SubjectSpec
from training.run.log import Line, read_lines
from training.run.run import ENDED, SubjectRecord
from training.run.standing import Standing
from training.storage.interface import NotFound
from training.storage.registry import Registry
from training.storage.version import Resolved, UnknownAdapter

_STATUS: dict[str, JobStatus] = {
    "queued": "queued", "paused": "paused", "failed": "failed", "cancelled": "cancelled",
    "published": "succeeded", "reused": "succeeded",
}  # fmt: skip
_SAMPLE = re.compile(r"[0-9]{1,12}-[0-9]{1,4}\.png")
_WARNINGS = ("is not used", "died", "lost", "no checkpoint", "no sample")


def status_of(subject: SubjectRecord) -> JobStatus:
    """OpenAI's word for a subject's state."""
    return _STATUS.get(subject.state, "running")


def job_info(look: Submitted, standing: Standing) -> JobInfo:
    """A job as `GET /v1/fine_tuning/jobs/{id}` shows it."""
    (subject,), (spec,) = look.subjects, look.record.manifest.subjects
    about = look.order.about
    train = spec.train.model_dump(mode="json")
    return JobInfo(
        id=look.order.run,
        created_at=int(look.order.created),
        finished_at=int(subject.updated) if subject.state in ENDED else None,
        estimated_finish=_finish(look, subject, standing),
        status=status_of(subject),
        model=public_name(look.record.base),
        fine_tuned_model=_model(look, subject),
        organization_id=look.order.tenant,
        training_file=str(about.get("training_file", "")),
        seed=spec.train.seed,
        hyperparameters={"n_epochs": "auto", **train, "rank": spec.lora.rank, "alpha": spec.lora.alpha},
        method=_method(spec),
        error=_error(subject),
        metadata=about.get("metadata") or {},
        suffix=spec.id,
        adapter=f"{look.order.tenant}/{spec.id}",
        version=subject.version,
        priority=look.order.priority,
        progress=progress_of(look, subject, standing),
    )


def run_info(look: Submitted, standing: Standing) -> RunInfo:
    """A run as `GET /v1/runs/{id}` shows it."""
    counts: dict[str, int] = {}
    for subject in look.subjects:
        counts[subject.state] = counts.get(subject.state, 0) + 1
    ends = [_finish(look, subject, standing) for subject in look.subjects if subject.state not in ENDED]
    finishes = [end for end in ends if end is not None]
    return RunInfo(
        id=look.order.run,
        name=look.record.name,
        tenant=look.order.tenant,
        created_at=int(look.order.created),
        finished_at=int(look.record.finished) if look.record.finished else None,
        estimated_finish=max(finishes) if ends and len(finishes) == len(ends) else None,
        status=look.record.state,
        model=public_name(look.record.base),
        metadata=look.order.about.get("metadata") or {},
        priority=look.order.priority,
        counts=counts,
    )


def run_subject(look: Submitted, subject: SubjectRecord, standing: Standing) -> RunSubject:
    """One subject of a run."""
    return RunSubject(
        id=subject.id,
        run=look.order.run,
        status=status_of(subject),
        model=public_name(look.record.base),
        fine_tuned_model=_model(look, subject),
        adapter=f"{look.order.tenant}/{subject.id}",
        version=subject.version,
        error=_error(subject),
        estimated_finish=_finish(look, subject, standing),
        progress=progress_of(look, subject, standing),
    )


def progress_of(look: Submitted, subject: SubjectRecord, standing: Standing) -> SubjectProgress:
    """How a subject stands, with what the driver has last said of its lane."""
    key = f"{look.order.run}/{subject.id}"
    fresh = Board.is_fresh(standing) and subject.state not in ENDED
    lane = next((lane for lane in standing.lanes if fresh and key in lane.subjects), None)
    waits = fresh and lane is None and key in standing.waiting
    return SubjectProgress(
        state=subject.state,
        doing=lane.subjects[key] if lane else None,
        step=subject.step,
        max_steps=subject.max_steps,
        loss=subject.loss,
        seconds=round(subject.seconds, 1),
        place=standing.waiting.index(key) + 1 if waits else None,
        lane=lane.lane if lane else None,
        together=len(lane.subjects) if lane else None,
        images_per_second=lane.images_per_second if lane else None,
        warnings=list(subject.warnings),
        attempts=[attempt.model_dump(mode="json") for attempt in subject.attempts],
    )


def events_of(look: Submitted) -> list[EventInfo]:
    """What has happened, the earliest first."""
    return [_event(line, look.order.kind) for line in read_lines(look.store)]


def checkpoints_of(look: Submitted, subject: SubjectRecord, registry: Registry) -> list[CheckpointInfo]:
    """The steps of a subject that are kept, with the scores of those that were judged, the latest first."""
    record = load_record(look.store, subject.id)
    kept = set(look.store.checkpoints(subject.id))
    steps = kept | set(record.steps if record else ())
    published, current = _published(look, subject, registry)
    model = f"{public_name(look.record.base)}:{look.order.tenant}/{subject.id}"
    found = []
    for step in sorted(steps, reverse=True):
        version = published.get(step)
        scores = {one.name: one.value for one in record.scores if one.step == step} if record else {}
        reason = None
        if record is not None:
            reason = record.reason if step == record.chosen else record.rejected.get(step)
        found.append(
            CheckpointInfo(
                id=f"ftckpt-{step:08d}",
                created_at=int(subject.updated),
                fine_tuning_job_id=look.order.run,
                fine_tuned_model_checkpoint=f"{model}@{version[:12]}" if version else None,
                step_number=step,
                metrics={"step": float(step), **scores},
                version=version,
                kept=step in kept,
                current=version is not None and version == current,
                chosen=record is not None and step == record.chosen,
                reason=reason,
            )
        )
    return found


def samples_of(look: Submitted, subject: SubjectRecord, path: str) -> list[SampleInfo]:
    """The pictures that were drawn while a subject trained; `path` is where they are served."""
    folder = look.store.subject_key(subject.id, "samples")
    names = [PurePosixPath(key).name for key in look.store.storage.list(folder)]
    found = []
    for name in names:
        step, _, index = name.removesuffix(".png").partition("-")
        if step.isdigit() and index.isdigit():
            found.append(SampleInfo(name=name, step=int(step), index=int(index), url=f"{path}/{name}"))
    return found


def sample(look: Submitted, subject: SubjectRecord, name: str) -> bytes:
    """One of these pictures, a PNG file. Raises ApiError 404."""
    try:
        if not _SAMPLE.fullmatch(name):
            raise NotFound(name)
        return look.store.storage.get(look.store.subject_key(subject.id, "samples", name))
    except NotFound:
        raise ApiError(404, f"No sample '{name[:80]}'.", code="sample_not_found") from None


def _published(look: Submitted, subject: SubjectRecord, registry: Registry) -> tuple[dict[int, str], str | None]:
    """Version by step, of what this subject has published, and the version that is current now."""
    name = f"{look.order.tenant}/{subject.id}"
    try:
        current = registry.resolve(name).version
        cards = [registry.resolve(name, version) for version in registry.versions(look.order.tenant, subject.id)]
    except UnknownAdapter:
        return {}, None
    mine: list[Resolved] = [one for one in cards if one.card.run == look.order.run]
    return {one.card.steps: one.version for one in mine}, current


def _event(line: Line, kind: str) -> EventInfo:
    failed = line.data.get("state") == "failed" or ": failed at" in line.text
    worse = any(word in line.text for word in _WARNINGS)
    return EventInfo(
        id=f"ftevent-{line.id}",
        object="fine_tuning.job.event" if kind == "job" else "run.event",
        created_at=int(line.time),
        level="error" if failed else "warn" if worse else "info",
        message=line.text,
        type="metrics" if "train_loss" in line.data else "message",
        data=line.data,
    )


def _finish(look: Submitted, subject: SubjectRecord, standing: Standing) -> int | None:
    if subject.state in ENDED or not Board.is_fresh(standing):
        return None
    end = standing.finish.get(f"{look.order.run}/{subject.id}")
    return None if end is None else int(end)


def _model(look: Submitted, subject: SubjectRecord) -> str | None:
    if status_of(subject) != "succeeded":
        return None
    return f"{public_name(look.record.base)}:{look.order.tenant}/{subject.id}"


def _error(subject: SubjectRecord) -> JobError | None:
    if subject.state != "failed":
        return None
    kinds: Sequence[str] = [attempt.kind for attempt in subject.attempts]
    code = (kinds[-1] if kinds else "bad subject").replace(" ", "_")
    return JobError(code=code, message=subject.reason or "it failed")


def _method(spec: SubjectSpec) -> dict[str, object]:
    shown = spec.model_dump(mode="json", by_alias=True, exclude={"id", "images"})
    return {"type": "dreambooth_lora", "dreambooth_lora": shown}
