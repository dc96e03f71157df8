"""A storage's credentials are in no argument list, no output and no error of a command."""

import contextlib
import json
import os
import threading
from typing import Any

import pytest

import ray_app.serve.deployments as serve_module
from ray_app.train import drive, jobs
from ray_app.train.cluster import ClusterLimits
from training.errors import UserError
from training.photos.files import FileCache
from training.run import shares
from training.run.run import RunStore
from training.run.submission import Submission
from training.storage.storage import ObjectStorage

URI = "s3://fleet/x?access_key=hush-id&secret_key=hush&attempts=1&endpoint_override=http://127.0.0.1:9"


class _Store(RunStore):
    def __init__(self) -> None:
        super().__init__(ObjectStorage(URI), "pets-1")


def submission() -> Submission:
    record: Any = type("Record", (), {"run": "pets-1", "tenant": "acme"})
    manifest: Any = None
    return Submission(_Store(), record, manifest, manifest, False, FileCache(_Store().storage))


def test_a_detached_driver_is_told_its_storage_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}
    monkeypatch.setattr(
        drive.subprocess,  # type: ignore[attr-defined]
        "Popen",
        lambda command, **rest: started.update(command=command, **rest),
    )
    drive.detach_run(submission(), "local", ClusterLimits(2)).unlink()
    assert started["command"][-6:] == ["drive", "pets-1", "--address", "local", "--lanes", "2"]
    assert "hush" not in " ".join(started["command"])
    assert started["env"]["DREAMFLEET_STORAGE"] == URI and started["env"]["PATH"] == os.environ["PATH"]


def test_a_job_on_a_cluster_is_told_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}
    monkeypatch.setattr(jobs, "_client", lambda _: None)
    monkeypatch.setattr(jobs, "_submit", lambda _, job, __: sent.update(job) or "1")
    jobs.submit_job(submission(), "http://127.0.0.1:8265", ClusterLimits())
    environment = sent.pop("runtime_env")
    assert environment == {"env_vars": {"DREAMFLEET_STORAGE": URI}}
    assert "hush" not in json.dumps(sent)


def test_a_server_prints_its_storage_without_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Over(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return True

    monkeypatch.setattr(
        serve_module, "start_server", lambda *_: serve_module.Server("http://127.0.0.1:1", contextlib.ExitStack())
    )
    monkeypatch.setattr(serve_module.threading, "Event", Over)  # type: ignore[attr-defined]
    serve_module.serve_forever(URI)
    said = capsys.readouterr().out
    assert "s3://fleet/x" in said and "hush" not in said


def test_a_wrong_quota_file_is_told_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ObjectStorage, "get", lambda *_: b"acme: many")
    with pytest.raises(UserError, match=r"quotas.yaml is not understood") as caught:
        shares.read_quota(ObjectStorage(URI), "acme")
    assert "s3://fleet/x" in str(caught.value) and "hush" not in str(caught.value)


def test_photos_that_are_not_there_are_told_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.training.subjects import spec
    from training.photos.files import read_files

    monkeypatch.setattr(ObjectStorage, "list", lambda *_: [])
    with pytest.raises(UserError, match="holds no files") as caught:
        read_files(spec("rusty").model_copy(update={"images": URI}), ObjectStorage(URI))
    assert "s3://fleet/x" in str(caught.value) and "hush" not in str(caught.value)
