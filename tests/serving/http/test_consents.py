"""Taking back and taking off over HTTP: requests under way end with 410, new ones get it, receipts say what went."""

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from tests.serving.http.test_api import problem
from tests.serving.http.test_provenance import Marked
from training.base.base import Base
from training.storage import audit
from training.storage.consent import Consent
from training.storage.consents import keep_consent
from training.storage.erasure import revoke
from training.storage.storage import open_storage

AGREED = Consent.model_validate(
    {"kind": "person", "granted_by": "Rusty", "evidence": "a" * 64, "granted_at": datetime.now(UTC)}
)


@pytest.fixture
def marked(tiny: Base, tiny_folder: Path, tmp_path: Path) -> Iterator[Marked]:
    world = Marked(tiny, tiny_folder, tmp_path, suspend_reported=False)
    yield world
    world.loop.close()


def agree(world: Marked, id: str) -> str:
    record = keep_consent(world.registry.storage, "ann", id, AGREED, ["b" * 64])
    world.upload("ann", id, 1)
    return record.id


def test_taking_back_ends_what_is_under_way_and_refuses_the_rest(marked: Marked) -> None:
    id = agree(marked, "rusty")
    marked.upload("ann", "tabby", 2)

    async def go() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        async with marked.client("ann") as client:

            async def draw(adapter: str) -> httpx.Response:
                asked = {"prompt": "a dog", "steps": 50, "seed": 1, "model": adapter}
                return await client.post("/v1/images/generations", json=asked)

            under, other = asyncio.ensure_future(draw("rusty")), asyncio.ensure_future(draw("tabby"))
            while marked.loop.engine.stats.steps < 2:
                await asyncio.sleep(0.01)
            receipt = await client.post(f"/v1/consents/{id}/revoke")
            return await under, await other, receipt

    under, other, receipt = asyncio.run(go())
    assert problem(under, 410)["code"] == "adapter_withdrawn"
    assert other.status_code == 200  # nobody else is disturbed
    assert receipt.status_code == 200 and receipt.json()["adapters"] == ["ann/rusty"]
    assert any(key.endswith("adapter.safetensors") for key in receipt.json()["keys"])
    problem(marked.images("ann", model="rusty"), 410)
    problem(marked.images("bob", model="ann/rusty"), 404)  # others never knew of it
    again = marked.call("POST", f"/v1/consents/{id}/revoke", "ann")
    assert again.status_code == 200 and again.json()["repeated"]
    assert audit.verify(marked.registry.storage).broken is None
    with pytest.raises(Exception, match="taken back"):
        marked.upload("ann", "rusty", 3)


def test_a_command_on_another_machine_is_followed_within_seconds(marked: Marked) -> None:
    agree(marked, "rusty")
    assert marked.images("ann", model="rusty").status_code == 200

    async def go() -> tuple[httpx.Response, float]:
        async with marked.client("ann") as client:
            asked = {"prompt": "a dog", "steps": 50, "seed": 1, "model": "rusty", "n": 4}
            under = asyncio.ensure_future(client.post("/v1/images/generations", json=asked))
            while not marked.loop.engine.stats.steps > 4:
                await asyncio.sleep(0.01)
            began = time.monotonic()
            storage = open_storage(str(marked.registry.storage))
            await asyncio.to_thread(lambda: revoke(storage, "ann", "rusty", by="test", reason="revoked"))
            last = await under
            # a replica that has not yet read the revocation may find no adapter any more: 404
            while last.status_code in (200, 404) and time.monotonic() - began < 10:
                last = await client.post("/v1/images/generations", json={**asked, "steps": 1, "n": 1})
            return last, time.monotonic() - began

    response, waited_s = asyncio.run(go())
    assert problem(response, 410) and waited_s < 5


def test_records_are_the_tenants_own(marked: Marked) -> None:
    id = agree(marked, "rusty")
    (mine,) = marked.call("GET", "/v1/consents", "ann").json()["data"]
    assert mine["id"] == id and mine["consent"]["granted_by"] == "Rusty"
    assert marked.call("GET", f"/v1/consents/{id}", "ann").json() == mine
    assert marked.call("GET", "/v1/consents", "bob").json()["data"] == []
    for method, path in (("GET", f"/v1/consents/{id}"), ("POST", f"/v1/consents/{id}/revoke")):
        assert problem(marked.call(method, path, "bob"), 404)["code"] == "consent_not_found"
        problem(marked.call(method, path), 401)


def report(world: Marked, data: bytes, reason: str = "this is me") -> httpx.Response:
    once = {"Idempotency-Key": "once"}
    return world.call("POST", "/v1/reports", files={"image": ("a.png", data)}, data={"reason": reason}, headers=once)


def test_a_report_is_resolved_and_the_operator_takes_off_and_puts_back(marked: Marked) -> None:
    version = marked.upload("ann", "rusty", 1)
    data = base64.b64decode(marked.images("ann", model="rusty", seed=5).json()["data"][0]["b64_json"])
    marked.told = marked.found("ann", 5)
    told = report(marked, data).json()
    assert told["made_here"] and not told["suspended"] and set(told) == {"id", "made_here", "suspended"}
    assert report(marked, data).json() == told  # sent twice, it is one report
    assert problem(report(marked, data, "another"), 422)["code"] == "idempotency_error"
    problem(marked.call("GET", "/v1/reports", "ann"), 403)
    (seen,) = marked.call("GET", "/v1/reports", "admin").json()["data"]
    assert seen["adapters"] == [f"ann/rusty@{version}"] and seen["reason"] == "this is me"
    assert marked.images("ann", model="rusty").status_code == 200
    assert marked.call("POST", f"/v1/reports/{told['id']}/suspend", "admin").status_code == 200
    problem(marked.images("ann", model="rusty"), 410)
    assert marked.call("POST", f"/v1/reports/{told['id']}/lift", "admin").status_code == 200
    assert marked.images("ann", model="rusty").status_code == 200
    problem(marked.call("POST", f"/v1/reports/{'0' * 16}/lift", "admin"), 404)
    events = [one.event for one in audit.entries(marked.registry.storage)]
    assert events == ["suspended", "lifted"]


def test_a_report_takes_off_at_once_where_the_operator_says_so(tiny: Base, tiny_folder: Path, tmp_path: Path) -> None:
    world = Marked(tiny, tiny_folder, tmp_path, suspend_reported=True)
    world.upload("ann", "rusty", 1)
    data = base64.b64decode(world.images("ann", model="rusty", seed=5).json()["data"][0]["b64_json"])
    world.told = world.found("ann", 5)
    assert report(world, data).json()["suspended"]
    problem(world.images("ann", model="rusty"), 410)
    stored = json.loads(world.registry.storage.get(world.registry.storage.list("reports")[0]))
    assert stored["suspended"] and "b64" not in stored
    world.loop.close()
