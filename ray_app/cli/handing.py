"""A manifest handed to a fleet elsewhere, over its HTTP calls: photos are uploaded, the run is followed."""

import hashlib
import io
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml
from rich.console import Console

from training.errors import UserError

if TYPE_CHECKING:
    from ray_app.train.drive import Whole
    from training.manifest.manifest import Manifest

LOOK_SECONDS = 1.0
PROBE_S = 5.0
UPLOAD_S = 600.0
LOST_S = 120.0  # how long a fleet may be gone (it starts again, say) before the command gives up


class FleetClient:
    """A fleet at `url`. Raises UserError with the fleet's own words."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=UPLOAD_S, trust_env=False)

    def stands(self) -> bool:
        """Whether a fleet is there; something else may be, or nothing."""
        try:
            answer = self._client.get("/v1/me", timeout=PROBE_S)
            found = answer.json()
        except (httpx.HTTPError, ValueError):
            return False
        error = found.get("error") if isinstance(found, dict) else None
        refused = isinstance(error, dict) and error.get("code") == "invalid_api_key"
        return refused or (isinstance(found, dict) and found.get("object") == "caller")

    def submit(self, path: Path, manifest: "Manifest") -> str:
        """Uploads the photos and submits the manifest; returns the run's id. The same again is the same run."""
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        digest = hashlib.sha256()
        for entry, subject in zip(raw["subjects"], manifest.subjects, strict=True):
            if "://" not in subject.images:
                data = packed(Path(manifest.root, subject.images).expanduser())
                entry["images"] = self._upload(f"{subject.id}.zip", data)
                digest.update(hashlib.sha256(data).digest())
        digest.update(yaml.safe_dump(raw).encode())
        headers = {"Idempotency-Key": digest.hexdigest()}
        run: str = self._call("POST", "/v1/runs", json={"manifest": raw}, headers=headers)["id"]
        return run

    def read(self, run: str, manifest: "Manifest") -> "Whole":
        """How a run stands."""
        from ray_app.train.drive import Whole
        from training.run.run import Attempt, RunRecord, SubjectRecord

        found = self._call("GET", f"/v1/runs/{run}")
        subjects = []
        for one in self._call("GET", f"/v1/runs/{run}/subjects")["data"]:
            progress = one["progress"]
            subjects.append(
                SubjectRecord(
                    id=one["id"],
                    state=progress["state"],
                    step=progress["step"],
                    max_steps=progress["max_steps"],
                    loss=progress["loss"],
                    version=one["version"],
                    seconds=progress["seconds"],
                    pack=progress["lane"],
                    reason=one["error"]["message"] if one["error"] else None,
                    attempts=tuple(Attempt.model_validate(attempt) for attempt in progress["attempts"]),
                    warnings=tuple(progress["warnings"]),
                )
            )
        record = RunRecord(
            run=run,
            name=manifest.name,
            tenant=found["tenant"],
            base=manifest.base,
            base_hash="",
            digest="",
            state=found["status"],
            manifest=manifest,
        )
        return Whole(record, tuple(subjects))

    def follow(self, run: str, manifest: "Manifest", console: Console) -> "Whole":
        """Shows how a run goes on until it has ended. A fleet that is gone for a while is waited for."""
        from ray_app.train.console import RunConsole
        from training.run.view import RunView

        heard = time.monotonic()
        with RunConsole(console, run) as watcher:
            while True:
                try:
                    whole = self.read(run, manifest)
                    heard = time.monotonic()
                except _Gone as error:
                    if time.monotonic() - heard > LOST_S:
                        raise UserError(f"{error} Run {run} goes on there; the same command follows it.") from None
                    time.sleep(LOOK_SECONDS)
                    continue
                watcher.see(RunView.of_records(whole.subjects), {subject.id: subject for subject in whole.subjects})
                if whole.record.state != "running":
                    return whole
                time.sleep(LOOK_SECONDS)

    def _upload(self, name: str, data: bytes) -> str:
        headers = {"Idempotency-Key": hashlib.sha256(data).hexdigest()}
        form = {"purpose": "fine-tune"}
        id: str = self._call("POST", "/v1/files", files={"file": (name, data)}, data=form, headers=headers)["id"]
        return id

    def _call(self, method: str, path: str, **rest: Any) -> Any:
        try:
            answer = self._client.request(method, path, **rest)
        except httpx.HTTPError as error:
            raise _Gone(f"The fleet at {self.url} does not respond: {error}.") from None
        if answer.is_success:
            return answer.json()
        try:
            said = str(answer.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            said = answer.text[:200]
        if answer.status_code >= 500:
            raise _Gone(f"The fleet at {self.url} cannot ({answer.status_code}): {said}")
        raise UserError(f"The fleet at {self.url} refused ({answer.status_code}): {said}")


class _Gone(UserError):
    """The fleet does not respond now."""


def packed(folder: Path) -> bytes:
    """A zip of the files of a folder, the same bytes for the same files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
            archive.writestr(zipfile.ZipInfo(path.name, (2020, 1, 1, 0, 0, 0)), path.read_bytes())
    return buffer.getvalue()
