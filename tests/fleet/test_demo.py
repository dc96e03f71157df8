"""The demo's subjects by one call."""

from pathlib import Path

import httpx
import pytest
import yaml

from tests.fleet.house import FAST, House
from tests.tiny import tiny_images


def post(house: House) -> httpx.Response:
    return httpx.post(f"{house.url}/v1/demo", headers={"Idempotency-Key": "once"}, timeout=60, trust_env=False)


def test_it_is_a_run_like_any_other_and_made_once(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = [{"id": id, "images": f"images/{id}"} for id in ("rusty", "tabby")]
    for seed, subject in enumerate(subjects):
        tiny_images(tmp_path / "demo" / subject["images"], seed=seed, side=40)
    manifest = {"version": 1, "name": "demo", "base": house.base, "defaults": FAST, "subjects": subjects}
    (tmp_path / "demo" / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    monkeypatch.setattr("fleet.http.demo.FOLDER", tmp_path / "demo")
    run = post(house).json()
    assert run["name"] == "demo" and sum(run["counts"].values()) == 2
    assert post(house).json()["id"] == run["id"]
    cancelled = httpx.post(f"{house.url}/v1/runs/{run['id']}/cancel", timeout=60, trust_env=False)
    assert cancelled.status_code == 200


def test_a_fleet_of_another_base_says_so(house: House) -> None:
    refused = post(house)
    assert refused.status_code == 404 and "for the base 'pocket'" in refused.json()["error"]["message"]
