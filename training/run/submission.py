"""Submission of a manifest: checks it, and finds or creates its run on a storage.

Everything a run needs to go on without the manifest's file is on the storage afterwards. Imports neither Ray nor torch.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from training.base.files.check import check_trainable
from training.base.files.folder import find_base, hash_base
from training.base.files.outline import Outline, outline
from training.base.quantization import check_offload
from training.errors import UserError
from training.manifest.consent import consent_problems, require_consent
from training.manifest.defaults import filled, meaningless
from training.manifest.manifest import Manifest, load_manifest
from training.manifest.plan import unmatched_targets, unroutable_targets
from training.manifest.subject import SubjectSpec
from training.photos.files import UPLOADED, FileCache, PhotoFile, is_local, list_photo_files
from training.photos.intake import fingerprint, take_in
from training.run.personal import check_subject, photos_forgotten
from training.run.run import ENDED, RunRecord, RunStore, SubjectRecord, digest_of, find_unfinished, new_run_id
from training.storage.file_hash import hash_file
from training.storage.registry import Registry
from training.storage.storage import Storage

READERS = 8  # threads that read photos and states
_DONE = ("published", "reused")


@dataclass(frozen=True)
class Submission:
    """A run that is on the storage. `manifest` is what this process reads photos by; its folders may be local.

    `files` keeps those that this process has read for it.
    """

    store: RunStore
    record: RunRecord
    manifest: Manifest
    base: Outline
    taken_up: bool
    files: FileCache


class Found(NamedTuple):
    """The fingerprint of a subject's training with its files as they are, or the problem with them."""

    fingerprint: str | None
    problem: str | None


def read_manifest(path: str | Path) -> tuple[Manifest, Outline]:
    """Reads and checks a manifest as far as that goes without reading photos.

    Raises UserError naming every problem: unknown keys, bases, targets that no layer has, folders that are not there.
    """
    manifest = load_manifest(path)
    manifest = manifest.model_copy(update={"root": str(Path(manifest.root).resolve())})
    base = outline(manifest.base, manifest.root)
    check_trainable(manifest.base, base.facts)
    manifest = filled(manifest, base.facts)
    problems = list(_problems(manifest, base))
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return manifest, base


def submit(path: str | Path, storage: Storage, *, upload: bool = False, keep_last: bool = False) -> Submission:
    """Resumes the unfinished run of the same manifest, or creates one. Raises UserError for a manifest that is wrong.

    `upload` copies local photos to the storage, for workers on other machines. `keep_last` is said of every subject.
    """
    manifest, base = read_manifest(path)
    if keep_last:
        manifest = manifest.model_copy(update={"subjects": tuple(map(_keeping_last, manifest.subjects))})
    base_hash = hash_base(find_base(manifest.base, manifest.root))
    worn = "" if manifest.training_adapter is None else hash_file(Path(manifest.root, manifest.training_adapter))
    digest = digest_of(manifest, f"{base_hash} {worn}".strip())
    record = find_unfinished(storage, manifest.name, digest)
    taken_up = record is not None
    if record is None:
        store = RunStore(storage, new_run_id(storage, manifest.name, digest))
        record = RunRecord(
            run=store.run,
            name=manifest.name,
            tenant=manifest.tenant,
            base=manifest.base,
            base_hash=base_hash,
            digest=digest,
            manifest=manifest,
            worn=worn,
        )
        store.create(record, Path(path).read_text(encoding="utf-8"))
    store, files = RunStore(storage, record.run), FileCache(storage, manifest.root)
    if upload:
        record = record.model_copy(update={"manifest": _uploaded(manifest, store, files)})
        store.save(record)
    return Submission(store, record, manifest, base, taken_up, files)


def reopen(store: RunStore) -> Submission:
    """A run that is on the storage already, to go on with."""
    record = store.record()
    root = record.manifest.root
    return Submission(store, record, record.manifest, outline(record.base, root), True, FileCache(store.storage, root))


def settle(submission: Submission, retry: bool = False) -> tuple[SubjectRecord, ...]:
    """Every subject as it stands, in manifest order; what changed is written down. Only who leads the run may do this.

    What the storage says is corrected by the photos as they are and by the registry. With `retry`, what failed or was
    cancelled is queued again. Files of subjects that are to be trained stay in `submission.files`.
    """
    store, record, manifest = submission.store, submission.record, submission.manifest
    registry = Registry(store.storage)

    def stand(subject: SubjectSpec) -> SubjectRecord:
        before = store.subject(subject.id)
        if before is not None and before.state in _DONE and photos_forgotten(store, subject):
            return before
        found = _find(subject, submission)
        now = _state(store, registry, record, subject, before, found, retry)
        if now != before:
            store.save_subject(now)
        if now.state in ENDED:
            submission.files.take_out(subject.id)
        return now

    with ThreadPoolExecutor(READERS) as pool:
        return tuple(pool.map(stand, manifest.subjects))


def photo_report(manifest: Manifest, base: Outline) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What is wrong with subjects' photos, and what could be better, by subject. Local folders only: no downloads."""

    def look(subject: SubjectSpec) -> tuple[str, str | None, list[str]]:
        try:
            files = list_photo_files(Path(manifest.root, subject.images).expanduser())
            found = take_in(subject, files, base.facts.resolution).photos
        except UserError as error:
            return subject.id, str(error), []
        warned = [f"{warning.message} {warning.advice}" for warning in found.warnings]
        return subject.id, None, [*found.refusals, *warned]

    local = [subject for subject in manifest.subjects if is_local(subject.images)]
    with ThreadPoolExecutor(READERS) as pool:
        looked = list(pool.map(look, local))
    problems = {id: problem for id, problem, _ in looked if problem}
    return problems, {id: warnings for id, _, warnings in looked if warnings}


def _keeping_last(subject: SubjectSpec) -> SubjectSpec:
    evaluate = subject.evaluate.model_copy(update={"keep_last": True})
    return subject.model_copy(update={"evaluate": evaluate})


def _problems(manifest: Manifest, base: Outline) -> Iterator[str]:
    try:
        check_offload(manifest.base_offload, manifest.base_quantization)
    except UserError as error:
        yield str(error)
    if manifest.training_adapter is not None:
        file = Path(manifest.root, manifest.training_adapter)
        if not file.is_file():
            yield f"training_adapter '{manifest.training_adapter}': there is no file '{file}'. Give an adapter's file."
        for subject in manifest.subjects:
            if subject.train.strategy == "zero" or subject.evaluate.early_stop:
                setting = "`train.strategy: zero`" if subject.train.strategy == "zero" else "`evaluate.early_stop`"
                yield f"subject '{subject.id}': {setting} knows no `training_adapter`. Leave out one of the two."
    policy = require_consent()
    for subject in manifest.subjects:
        for problem in consent_problems(subject, policy):
            yield f"subject '{subject.id}': {problem}"
        for target in unmatched_targets(subject, base):
            yield (
                f"subject '{subject.id}': no layer of base '{base.name}' ends with target {target!r}. "
                f"Use names such as {', '.join(base.facts.layers[:4])}."
            )
        for target, layer in unroutable_targets(subject, base):
            yield (
                f"subject '{subject.id}': target {target!r} is also the layer '{layer}', in which the rows of a batch "
                f"cannot wear adapters of their own. Use {', '.join(base.facts.layers)}."
            )
        yield from meaningless(subject, base.facts, manifest.base_quantization, manifest.base_offload)
        for name, what in (("images", subject.images), ("prior.folder", subject.prior.folder)):
            if what is None or not is_local(what):
                continue
            folder = Path(manifest.root, what).expanduser()
            if not folder.is_dir():
                why = "is a file, not a folder" if folder.exists() else "does not exist"
                yield (
                    f"subject '{subject.id}': {name} '{what}': folder '{folder}' {why}. Give the subject's folder of "
                    "photos, relative to the manifest, or a URI."
                )


def _find(subject: SubjectSpec, submission: Submission) -> Found:
    base, root = submission.record.base_identity, submission.manifest.root
    try:
        files = submission.files.read(subject)
        check_subject(submission.store, submission.record.tenant, subject, files)
        return Found(fingerprint(subject, base, files, root), None)
    except UserError as error:
        return Found(None, str(error))


def _state(
    store: RunStore,
    registry: Registry,
    record: RunRecord,
    subject: SubjectSpec,
    before: SubjectRecord | None,
    found: Found,
    retry: bool,
) -> SubjectRecord:
    fresh = SubjectRecord(id=subject.id, max_steps=subject.train.max_steps, fingerprint=found.fingerprint)
    if before is not None and before.fingerprint != found.fingerprint and before.state not in _DONE:
        before = None  # the photos have changed: what was learned from the old ones does not count
        store.storage.delete_tree(store.subject_key(subject.id, "checkpoints"))
    if found.fingerprint is None:
        return (before or fresh).model_copy(update={"state": "failed", "reason": found.problem})
    version = registry.find(record.tenant, subject.id, found.fingerprint)
    if version is not None:
        mine = before is not None and before.state != "reused"
        news = {"state": "published" if mine else "reused", "version": version, "step": fresh.max_steps, "reason": None}
        return (before or fresh).model_copy(update=news)
    if before is None:
        return fresh
    if before.state in ("failed", "cancelled") and not retry:
        return before
    steps = store.checkpoints(subject.id)
    return before.model_copy(update={"state": "queued", "step": steps[-1] if steps else 0, "reason": None})


def _uploaded(manifest: Manifest, store: RunStore, files: FileCache) -> Manifest:
    """The manifest with local photos copied to the run's folder on the storage."""

    def upload(subject: SubjectSpec) -> SubjectSpec:
        if not is_local(subject.images):
            return subject
        folder = store.subject_key(subject.id, "images")
        _put(store.storage, folder, files.read(subject))
        return subject.model_copy(update={"images": f"{UPLOADED}{folder}"})

    with ThreadPoolExecutor(READERS) as pool:
        return manifest.model_copy(update={"subjects": tuple(pool.map(upload, manifest.subjects))})


def _put(storage: Storage, folder: str, files: Sequence[PhotoFile]) -> None:
    for file in files:
        if not file.problem:
            storage.put(f"{folder}/{file.name}", file.data)
