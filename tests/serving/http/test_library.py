"""The adapters over HTTP: what a tenant's lists hold, who sees what, versions and files, quotas."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serving.config import Limits
from tests.serving.company import random_adapter
from tests.serving.http.test_api import World, problem
from training.adapters.adapter import save_adapter
from training.base.base import Base
from training.storage.card import MAX_BYTES
from training.storage.storage import LocalStorage

LISTS = ("/v1/adapters", "/v1/models", "/sdapi/v1/loras")


@pytest.fixture
def shared(tiny: Base, tiny_folder: Path, tmp_path: Path) -> Iterator[World]:
    """Two tenants with keys."""
    world = World(tiny, tiny_folder, tmp_path, keys=True)
    yield world
    world.loop.close()


def put(world: World, tenant: str, seed: int, **form: str) -> Any:
    data = save_adapter(random_adapter(world.base, seed))
    fields = {"id": "rusty", **form}
    answer = world.call("POST", "/v1/adapters", tenant, files={"file": data}, data=fields)
    assert answer.status_code == 201, answer.text
    return answer.json()


# -- a neighbour's damage --


@pytest.mark.parametrize("file", ["card.json", "current.json"])
def test_a_damaged_adapter_is_passed_over_logged_and_counted(
    shared: World, tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    for tenant in ("ann", "bob"):
        shared.upload(tenant, "whole", 1, public=True)
        shared.upload(tenant, "secret", 2)
    shared.upload("ann", "hurt", 3, public=True)
    (damaged,) = (tmp_path / "adapters/ann/hurt").glob(f"{'*/' if file == 'card.json' else ''}{file}")
    damaged.write_bytes(b"{")
    shared.library._forget("ann", "hurt")
    with caplog.at_level(logging.ERROR):
        for path in LISTS:
            mine, others = shared.call("GET", path, "ann").text, shared.call("GET", path, "bob").text
            assert "whole" in mine and "secret" in mine and "hurt" not in mine
            assert "ann/whole" in others or '"tenant":"ann"' in others
            assert "hurt" not in others
    assert sum("ann/hurt" in line for line in caplog.messages) == 1  # once, not for every list
    assert "dreamfleet_damaged_adapters 1.0" in shared.call("GET", "/metrics").text
    stranger = problem(shared.images("bob", model="ann/hurt"), 404)["message"]
    assert stranger.replace("hurt", "ghost") == problem(shared.images("bob", model="ann/ghost"), 404)["message"]
    assert problem(shared.images("ann", model="hurt"), 422)["code"] == "adapter_damaged"
    assert shared.call("DELETE", "/v1/adapters/hurt", "ann").status_code == 200
    assert "dreamfleet_damaged_adapters 0.0" in shared.call("GET", "/metrics").text
    put(shared, "ann", 3, id="hurt")
    assert shared.images("ann", model="hurt").status_code == 200


def test_a_list_reads_its_own_and_public_cards_only(shared: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, id in enumerate(("a", "b", "c")):
        shared.upload("bob", id, seed)
    shared.upload("bob", "open", 4, public=True)
    shared.upload("ann", "mine", 5)
    for id in "abc":
        shared.library.known.forget("bob", id)
    read: list[str] = []
    get = LocalStorage.get_tagged

    def counted(storage: LocalStorage, key: str) -> tuple[bytes, str]:
        read.append(key)
        return get(storage, key)

    monkeypatch.setattr(LocalStorage, "get_tagged", counted)
    assert [one.name for one in shared.library.list("ann")] == ["ann/mine", "bob/open"]
    assert len(read) == 4 and {key.split("/")[2] for key in read} == {"mine", "open"}


def test_lists_come_in_pages(shared: World) -> None:
    for seed, id in enumerate(("a", "b", "c")):
        shared.upload("ann", id, seed)
    shared.upload("bob", "a", 4, public=True)
    seen, after = [], None
    for _ in range(9):
        query = {"limit": 2} | ({"after": after} if after else {})
        page = shared.call("GET", "/v1/adapters", "ann", params=query).json()
        seen += [f"{one['tenant']}/{one['id']}" for one in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert seen == ["ann/a", "ann/b", "ann/c", "bob/a"]
    models = shared.call("GET", "/v1/models", "ann", params={"limit": 1}).json()
    assert [one["id"] for one in models["data"]] == ["tiny-epsilon-0", "tiny-epsilon-0:ann/a"] and models["has_more"]
    rest = shared.call("GET", "/v1/models", "ann", params={"after": "tiny-epsilon-0:ann/a"}).json()
    assert [one["id"].partition(":")[2] for one in rest["data"]] == ["ann/b", "ann/c", "bob/a"]
    assert problem(shared.call("GET", "/v1/adapters", "ann", params={"limit": 0}), 400)["param"] == "limit"


def test_an_id_is_resolved_once_from_http_to_the_denoiser(shared: World, monkeypatch: pytest.MonkeyPatch) -> None:
    version = shared.upload("ann", "rusty", 1)
    read: list[str] = []
    get = LocalStorage.get_tagged

    def counted(storage: LocalStorage, key: str) -> tuple[bytes, str]:
        read.append(key.removeprefix("adapters/ann/rusty/"))
        return get(storage, key)

    monkeypatch.setattr(LocalStorage, "get_tagged", counted)
    assert shared.images("ann", model="rusty").status_code == 200
    assert read == ["current.json", f"{version}/card.json", f"{version}/adapter.safetensors"]
    read.clear()
    shared.library.known.forget("ann", "rusty")
    assert shared.call("GET", "/v1/models/ann/rusty", "ann").status_code == 200
    assert read == ["current.json", f"{version}/card.json"]


# -- visibility --


def test_the_same_file_again_can_make_an_adapter_private(shared: World) -> None:
    assert put(shared, "ann", 1, public="true")["public"] is True
    assert shared.images("bob", model="ann/rusty").status_code == 200
    assert put(shared, "ann", 1)["public"] is True  # nothing said: as before
    assert put(shared, "ann", 1, public="false")["public"] is False
    problem(shared.images("bob", model="ann/rusty"), 404)
    for path in LISTS:
        assert "rusty" not in shared.call("GET", path, "bob").text


def test_an_old_version_is_as_visible_as_its_adapter(shared: World) -> None:
    old = put(shared, "ann", 1, public="true")["version"]
    new = put(shared, "ann", 2, public="false")["version"]
    for version in (old, old[:8], new):
        problem(shared.images("bob", model=f"ann/rusty@{version}"), 404)
        problem(shared.call("GET", f"/v1/adapters/ann/rusty@{version}", "bob"), 404)
    assert shared.call("PATCH", "/v1/adapters/rusty", "ann", json={"public": True}).json()["public"] is True
    for version in (old, new):
        assert shared.images("bob", model=f"ann/rusty@{version}").status_code == 200


def test_public_trigger_and_the_served_version_can_be_changed(shared: World) -> None:
    old = put(shared, "ann", 1, trigger="a sks dog")["version"]
    put(shared, "ann", 2)
    changed = shared.call(
        "PATCH", "/v1/adapters/rusty", "ann", json={"public": True, "trigger": "a zwx dog", "version": old[:8]}
    ).json()
    assert (changed["public"], changed["trigger"], changed["version"]) == (True, "a zwx dog", old)
    assert changed == shared.call("GET", "/v1/adapters/rusty", "ann").json()
    assert "ann/rusty" in shared.call("GET", "/v1/models", "bob").text
    assert put(shared, "ann", 2)["trigger"] == "a zwx dog"  # the adapter's, whatever version is served
    problem(shared.call("PATCH", "/v1/adapters/rusty", "bob", json={"public": False}), 404)
    problem(shared.call("PATCH", "/v1/adapters/rusty", "ann", json={"version": "0" * 64}), 404)
    assert problem(shared.call("PATCH", "/v1/adapters/rusty", "ann", json={"owner": "bob"}), 400)["param"] == "owner"


def test_another_tenant_sees_how_to_use_a_public_adapter_and_not_how_it_was_made(shared: World) -> None:
    shared.upload("ann", "rusty", 1, public=True)
    resolved = shared.registry.resolve("ann/rusty")
    made = {"image_hashes": ("e" * 64,), "settings": {"images": "/home/ann/photos"}, "run": "pets-1", "steps": 9}
    card = resolved.card.model_copy(update={**made, "fingerprint": "d" * 64})
    shared.registry.storage.put(
        f"adapters/ann/rusty/{resolved.version}/card.json", card.model_dump_json(by_alias=True).encode()
    )
    shared.library._forget("ann", "rusty")
    mine = shared.call("GET", "/v1/adapters/rusty", "ann").json()
    other = shared.call("GET", "/v1/adapters/ann/rusty", "bob").json()
    assert mine["card"]["image_hashes"] == ["e" * 64] and mine["card"]["settings"]
    for secret in ("e" * 64, "/home/ann", "pets-1", "d" * 64):
        assert secret not in str(other)
    assert {**other, "card": None} == {**mine, "card": None} and other["card"]["rank"] == 4
    problem(shared.call("GET", "/v1/adapters/rusty/versions", "bob"), 404)


# -- versions and files --


def test_versions_are_listed_downloaded_and_deleted_one_by_one(shared: World) -> None:
    old, new = (put(shared, "ann", seed)["version"] for seed in (1, 2))
    found = shared.call("GET", "/v1/adapters/rusty/versions", "ann").json()["data"]
    assert {one["version"]: one["current"] for one in found} == {old: False, new: True}
    shown = shared.call("GET", f"/v1/adapters/rusty/versions/{old[:8]}", "ann").json()
    assert shown["version"] == shown["card"]["sha256"] == old
    files = shared.call("GET", f"/v1/adapters/rusty/versions/{old[:8]}/files", "ann").json()
    sizes = {one["name"]: one["bytes"] for one in files["data"]}
    path = f"/v1/adapters/rusty/versions/{old}/files/adapter.safetensors"
    weights = shared.call("GET", path, "ann")
    assert weights.content == save_adapter(random_adapter(shared.base, 1))
    assert (
        len(weights.content) == sizes["adapter.safetensors"] and "attachment" in weights.headers["content-disposition"]
    )
    for wrong in ("nothing.png", "../../../../keys.json", "%2e%2e/card.json"):
        problem(shared.call("GET", path.replace("adapter.safetensors", wrong), "ann"), 404)
    for method, stranger in (("GET", path), ("DELETE", f"/v1/adapters/rusty/versions/{old}")):
        problem(shared.call(method, stranger, "bob"), 404)

    assert problem(shared.call("DELETE", f"/v1/adapters/rusty/versions/{new}", "ann"), 409)["param"] == "version"
    gone = shared.call("DELETE", f"/v1/adapters/rusty/versions/{old[:8]}", "ann").json()
    assert gone == {"id": f"rusty@{old}", "object": "adapter.version", "deleted": True}
    problem(shared.images("ann", model=f"rusty@{old}"), 404)
    problem(shared.call("GET", path, "ann"), 404)
    assert not [key for key in shared.registry.storage.list("adapters") if old in key]
    assert shared.images("ann", model="rusty").json()["data"][0]["adapters"][0]["version"] == new
    assert put(shared, "ann", 1)["version"] == old  # may come again
    assert shared.images("ann", model="rusty").json()["data"][0]["adapters"][0]["version"] == old


# -- quotas --


def test_a_tenant_has_a_quota_of_adapters_and_of_bytes(shared: World) -> None:
    data = {seed: save_adapter(random_adapter(shared.base, seed)) for seed in (1, 2, 3)}

    def upload(id: str, seed: int, **limits: int) -> Any:
        narrow = shared.spec.limits.model_copy(update=limits)
        object.__setattr__(shared.app.state.service.intake, "spec", shared.spec.model_copy(update={"limits": narrow}))
        return shared.call("POST", "/v1/adapters", "ann", files={"file": data[seed]}, data={"id": id})

    assert upload("a", 1, tenant_adapters=1).status_code == 201
    full = upload("b", 2, tenant_adapters=1)
    assert (
        problem(full, 429)["code"] == "insufficient_quota"
        and "at most 1 are allowed" in full.json()["error"]["message"]
    )
    assert full.headers["x-should-retry"] == "false"
    assert upload("a", 2, tenant_adapters=1).status_code == 201  # a new version of one that is there
    stored = shared.registry.usage("ann").bytes
    assert stored >= len(data[1]) + len(data[2])
    error = problem(upload("c", 3, tenant_bytes=stored + 100), 429)
    assert error["code"] == "insufficient_quota" and str(stored) in error["message"]
    assert upload("c", 3, tenant_bytes=stored + 10 * len(data[3])).status_code == 201


def test_the_limit_of_an_upload_is_the_one_that_holds() -> None:
    assert Limits().upload_bytes == 256 << 20 < MAX_BYTES
    with pytest.raises(ValidationError):
        Limits(upload_bytes=MAX_BYTES + 1)


def test_uploads_are_counted_by_the_minute_before_their_bodies_are_read(shared: World) -> None:
    shared.app.state.service.quota.uploads.per_minute = 2
    read = 0

    async def body() -> Any:
        nonlocal read
        read += 1
        yield b"--b--\r\n"

    async def story() -> list[int]:
        found = []
        async with shared.client("ann") as client:
            for _ in range(3):
                answer = await client.post(
                    "/v1/adapters", content=body(), headers={"content-type": "multipart/form-data; boundary=b"}
                )
                found.append(answer.status_code)
        assert int(answer.headers["retry-after"]) >= 1
        return found

    assert asyncio.run(story()) == [400, 400, 429]
    assert read == 2
