"""From a body to a run that is accepted: jobs of one subject, and whole manifests. Blocking.

Everything that can be checked without training is checked first, the photos too; then the run is on the storage.
"""

import json
from collections.abc import Sequence
from typing import Any

import yaml

from fleet.board import Board, Submitted
from fleet.config import FleetSpec
from fleet.files import PREFIX, Files
from fleet.hooks import check_hook
from fleet.http.bodies import HookBody, JobBody, RunBody
from fleet.manifests import check_depth, text_of
from fleet.once import digest, id_once
from fleet.settings import check_subject, default_id, subject_of
from serving.errors import QueueFull
from serving.http.problems import ApiError
from training.base.files.check import check_trainable
from training.base.files.folder import public_name
from training.base.files.outline import Outline
from training.errors import UserError
from training.manifest.consent import consent_problems, require_consent
from training.manifest.defaults import fill_subject, filled
from training.manifest.manifest import Manifest, parse_manifest
from training.manifest.subject import SubjectSpec
from training.photos.files import read_files
from training.photos.intake import take_in
from training.run import accepted
from training.run.accepted import Hook, Order, RunKind, new_id
from training.run.run import RunRecord, digest_of
from training.run.turns import read_quotas
from training.storage.interface import Storage

FULL_S = 60.0


class SubmissionDesk:
    """Where jobs and manifests are submitted, for the base of this fleet."""

    def __init__(self, storage: Storage, base: Outline, base_hash: str, spec: FleetSpec, board: Board) -> None:
        check_trainable(base.name, base.facts)
        self.storage = storage
        self.base = base
        self.base_hash = base_hash
        self.spec = spec
        self.board = board
        self.files = Files(storage, base.facts.resolution, spec.limits)
        self.name = public_name(base.name)

    def submit_job(self, tenant: str, body: JobBody, key: str | None) -> Submitted:
        """Accepts a job. Raises ApiError, UserError for what cannot be trained."""
        self._check_base(body.model)
        check_depth(body.hyperparameters, "hyperparameters")
        if body.method is not None:
            check_depth(body.method.dreambooth_lora.model_extra, "method.dreambooth_lora")
        file, images = self.files.images(tenant, body.training_file)
        photos = sum(one.photos for one in file.subjects)
        method = body.method.dreambooth_lora.model_dump() if body.method else {}
        id = body.suffix or default_id(images if "/" in body.training_file else file.filename)
        asked = subject_of(id, images, method, body.hyperparameters or {}, body.seed, photos)
        subject = fill_subject(asked, self.base.facts)
        self._check(subject)
        self._check_photos(subject, "training_file")
        run = id_once(self.storage, tenant, key, digest("job", body.model_dump_json()), new_id("ftjob-"))
        manifest = Manifest(version=1, name="job", tenant=tenant, base=self.base.name, subjects=(subject,))
        about = body.model_dump(mode="json", include={"training_file", "hyperparameters", "metadata", "method"})
        order = self._order(run, tenant, "job", body.priority, [file.id], about, body.webhook, 1)
        return self._accept(manifest, order)

    def submit_run(self, tenant: str, body: RunBody, key: str | None) -> Submitted:
        """Accepts a manifest. Raises ApiError, ManifestError for what is wrong with it."""
        manifest = filled(parse_manifest(text_of(body.manifest)), self.base.facts)
        self._check_base(manifest.base)
        if (manifest.base_quantization, manifest.base_offload, manifest.training_adapter) != ("none", "none", None):
            raise ApiError(
                400,
                "A fleet trains on its base as it is served: leave out base_quantization, base_offload and "
                "training_adapter, or use `dreamfleet train` without a fleet.",
                param="manifest",
            )
        if manifest.tenant not in (tenant, "default"):
            raise ApiError(400, f"The manifest's tenant is '{manifest.tenant}', your key's '{tenant}'.", param="tenant")
        if len(manifest.subjects) > self.spec.limits.subjects:
            raise ApiError(
                400,
                f"The manifest has {len(manifest.subjects)} subjects; at most {self.spec.limits.subjects} are allowed.",
                param="manifest.subjects",
            )
        files: list[str] = []
        subjects = tuple(self._stored(tenant, subject, files) for subject in manifest.subjects)
        for subject in subjects:
            self._check(subject)
            self._check_photos(subject, f"manifest.subjects.{subject.id}")
        manifest = manifest.model_copy(update={"tenant": tenant, "base": self.base.name, "subjects": subjects})
        asked = digest("run", body.model_dump_json())
        run = id_once(self.storage, tenant, key, asked, new_id(f"{manifest.name}-"))
        about = {"metadata": body.metadata}
        order = self._order(run, tenant, "run", body.priority, files, about, body.webhook, len(subjects))
        return self._accept(manifest, order)

    # -- pieces --

    def _check_base(self, model: str) -> None:
        if model not in (self.name, self.base.name):
            raise ApiError(
                404,
                f"This fleet trains on '{self.name}', not on '{model[:80]}'.",
                param="model",
                code="model_not_found",
            )

    def _check(self, subject: SubjectSpec) -> None:
        check_subject(subject, self.base, self.spec)
        for problem in consent_problems(subject, require_consent()):
            raise ApiError(400, f"Subject '{subject.id}': {problem}", param="consent", code="no_consent")

    def _check_photos(self, subject: SubjectSpec, param: str) -> None:
        """Raises ApiError if the subject's photos cannot be trained on as it asks: too few, words nothing trains."""
        try:
            take_in(subject, read_files(subject, self.storage), self.base.facts.resolution)
        except UserError as error:
            raise ApiError(400, f"Subject '{subject.id}': {error}", param=param, code="bad_photos") from None

    def _stored(self, tenant: str, subject: SubjectSpec, files: list[str]) -> SubjectSpec:
        """The subject with its photos where they lie on the storage."""
        if not subject.images.startswith(PREFIX):
            if subject.images.startswith("storage:"):  # keys of the storage are not the client's to name
                raise ApiError(
                    400, f"images '{subject.images[:80]}': give the id of an uploaded file.", param="manifest.subjects"
                )
            return subject
        file, images = self.files.images(tenant, subject.images)
        files.append(file.id)
        return subject.model_copy(update={"images": images})

    def _order(
        self,
        run: str,
        tenant: str,
        kind: RunKind,
        priority: int,
        files: Sequence[str],
        about: dict[str, Any],
        hook: HookBody | None,
        subjects: int,
    ) -> Order:
        if hook is not None:
            check_hook(hook.url, self.spec.private_hooks)
        return Order(
            run=run,
            tenant=tenant,
            kind=kind,
            priority=priority,
            subjects=subjects,
            files=tuple(dict.fromkeys(files)),
            hook=Hook(url=hook.url, secret=hook.secret, events=hook.events) if hook else None,
            about={name: value for name, value in about.items() if value is not None},
        )

    def _accept(self, manifest: Manifest, order: Order) -> Submitted:
        self._check_room(order)
        record = RunRecord(
            run=order.run,
            name=manifest.name,
            tenant=order.tenant,
            base=self.base.name,
            base_hash=self.base_hash,
            digest=digest_of(manifest, self.base_hash),
            manifest=manifest,
        )
        text = yaml.safe_dump(json.loads(manifest.model_dump_json(by_alias=True, exclude={"root"})), allow_unicode=True)
        accepted.accept(self.storage, record, text, order)
        self.board.wake()
        return self.board.look(order.tenant, order.run, order.kind)

    def _check_room(self, order: Order) -> None:
        """Raises QueueFull if the tenant has too much waiting."""
        quota = read_quotas(self.storage).get(order.tenant)
        most = min(self.spec.limits.waiting, quota.waiting or self.spec.limits.waiting if quota else 10**9)
        there = self.board.waiting(order.tenant)
        if there + order.subjects > most and accepted.read_order(self.storage, order.run) is None:
            raise QueueFull(
                f"You have {there} subjects that wait or train; at most {most} may be, and this adds {order.subjects}. "
                "Wait for some to end.",
                FULL_S,
            )
