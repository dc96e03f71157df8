"""A run through the Ray Jobs API of a cluster that is already there."""

import json

import pytest

from tests.ray_app.conftest import Desk
from tests.ray_app.head import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_run_as_a_job_then_again_and_detached(desk: Desk, head: str) -> None:
    manifest = desk.manifest("rusty", "tabby")
    result = desk.run("train", manifest, "--address", head, "--json")
    assert result.status == 0, result.err
    assert set(result.states().values()) == {"published"}
    uploaded = desk.storage / "runs" / result.json["run"] / "subjects/rusty/images"
    assert len(list(uploaded.iterdir())) == 5

    again = desk.run("train", manifest, "--address", head, "--detach", "--json")
    assert again.status == 0 and again.json["state"] == "running"
    watched = desk.run("status", again.json["run"], "--watch", "--json")
    assert set(watched.states().values()) == {"reused"}


def test_what_the_cluster_cannot_see_is_refused_before_anything_is_submitted(desk: Desk) -> None:
    manifest = desk.manifest("rusty")
    result = desk.run("train", manifest, "--address", "http://head.example:8265")
    assert result.status == 2 and "folder of this machine" in result.err and "s3://" in result.err
    result = desk.run("train", manifest, "--address", "http://head.example:8265", "--storage", "s3://bucket/x")
    assert result.status == 2 and "Base" in result.err and "does not see" in result.err
    assert not desk.storage.exists()


def test_without_the_clusters_token(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(desk.folder / "nothing"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    result = desk.run("train", desk.manifest("rusty"), "--address", f"http://127.0.0.1:{free_port()}")
    assert result.status == 2 and "RAY_AUTH_TOKEN" in result.err and "Traceback" not in result.err


def test_a_dashboard_that_is_not_there(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    result = desk.run("train", desk.manifest("rusty"), "--address", f"http://127.0.0.1:{free_port()}")
    assert result.status == 2 and "No Ray dashboard responds" in result.err
    assert "Traceback" not in result.err
    assert json.loads(desk.run("status", "--json").out)["runs"][0]["state"] == "running"
