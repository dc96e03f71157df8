"""Kept pictures: links that expire, each tenant's history, its limits, and what a revocation leaves of it."""

import asyncio
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from PIL import Image

from serving.engine.request import AdapterRef, AdapterUse, FinishedPicture, GenerateRequest
from serving.http.app import create_app
from serving.http.history.keeping import asked_of
from serving.http.history.links import Links
from serving.http.problems import ApiError
from serving.local import LocalEngines
from tests.serving.http.test_api import World, pixels, problem
from training.base.base import Base
from training.storage.erasure import held, revoke
from training.storage.pictures import KeptPicture, PictureStore, new_id
from training.storage.storage import LocalStorage, NotFound, StorageFull

HISTORY = "/v1/images/history"


@pytest.fixture(scope="module")
def keeping(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two tenants, and a history."""
    world = World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=True, history=True)
    world.upload("ann", "rusty", 1, public=True)
    world.upload("ann", "bolt", 2)
    yield world
    world.loop.close()


@pytest.fixture(scope="module")
def plain(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """No history; links last a minute."""
    world = World(
        tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=True, link_s=60, site="https://fleet.example/"
    )
    world.upload("ann", "rusty", 1)
    yield world
    world.loop.close()


def path_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}"


def history(world: World, tenant: str, **query: Any) -> dict[str, Any]:
    answer = world.call("GET", HISTORY, tenant, params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


# -- links --


def test_a_link_is_the_picture_and_needs_no_key(plain: World) -> None:
    whole = plain.images("ann", model="rusty", n=2).json()["data"]
    linked = plain.images("ann", model="rusty", n=2, response_format="url").json()["data"]
    for one, other in zip(whole, linked, strict=True):
        assert (
            "b64_json" not in other and "url" not in one and "id" not in {*one, *other} and other["seed"] == one["seed"]
        )
        assert other["url"].startswith("https://fleet.example/v1/images/files/links/ann/")
        answer = plain.call("GET", path_of(other["url"]))
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
        assert answer.headers["x-content-type-options"] == "nosniff"
        with Image.open(io.BytesIO(answer.content)) as opened:
            assert opened.size == (16, 16)
    assert problem(plain.call("GET", HISTORY, "ann"), 404)["code"] == "history_off"
    assert plain.registry.storage.list("pictures/history") == []


def test_a_link_cannot_be_changed_and_ends(plain: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = plain.images("ann", response_format="url", output_format="webp").json()["data"]
    url = path_of(one["url"])
    query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    assert time.time() < int(query["expires"]) <= time.time() + 60
    for changed in (
        url.replace("/ann/", "/bob/"),
        url.replace(query["expires"], str(int(query["expires"]) + 9)),
        url.replace(".webp", ".png"),
        url.replace("/links/", "/history/"),
        url.replace(query["signature"], "0" * 64),
    ):
        assert problem(plain.call("GET", changed), 403)["code"] == "link_invalid", changed
    assert plain.call("GET", url).status_code == 200
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    assert problem(plain.call("GET", url), 403)["code"] == "link_expired"
    plain.app.state.service.keeper.tidy_all()
    assert plain.registry.storage.list("pictures") == []


def test_streams_and_links_exclude_one_another(plain: World) -> None:
    assert problem(plain.images("ann", response_format="url", stream=True), 400)["param"] == "response_format"


def test_links_of_another_service_are_not_valid(tmp_path: Path) -> None:
    ours, theirs = (Links(LocalStorage(str(tmp_path / name)), 60.0) for name in ("ours", "theirs"))
    url = ours.url("links", "ann", "a.png", "http://127.0.0.1:8000/")
    query = parse_qs(urlsplit(url).query)
    ours.check("links/ann/a.png", int(query["expires"][0]), query["signature"][0])
    with pytest.raises(ApiError, match="not valid"):
        theirs.check("links/ann/a.png", int(query["expires"][0]), query["signature"][0])


# -- the history --


def test_the_history_tells_what_made_each_picture(keeping: World) -> None:
    mix = [{"id": "rusty", "weight": 0.5}, {"id": "bolt", "weight": -0.25}]
    body: dict[str, Any] = {"prompt": "a (red:1.2) dog", "prompt_syntax": "a1111", "negative_prompt": "snow",
            "adapters": mix, "n": 2, "size": "32x16", "guidance_scale": 3.0, "scheduler": "euler_a",
            "seed": 40}  # fmt: skip
    made = keeping.images("ann", **body).json()["data"]
    page = history(keeping, "ann", limit=2)
    entries = sorted(page["data"], key=lambda one: int(one["index"]))
    assert page["last_id"] == page["data"][-1]["id"] and len({one["request"] for one in entries}) == 1
    for one, picture in zip(entries, made, strict=True):
        assert (one["prompt"], one["negative_prompt"], one["size"], one["seed"]) == (
            body["prompt"],
            "snow",
            "32x16",
            picture["seed"],
        )
        assert (one["steps"], one["guidance_scale"], one["scheduler"]) == (2, 3.0, "euler_a")
        assert one["id"] == picture["id"]
        assert one["adapters"] == picture["adapters"] and one["settings"] == {"prompt_syntax": "a1111"}
        kept = keeping.call("GET", path_of(one["url"]))
        assert len(kept.content) == one["bytes"]
        with Image.open(io.BytesIO(kept.content)) as opened:
            found = opened.convert("RGB").tobytes()
        assert found == bytes(pixels(picture["b64_json"]).astype("uint8").tobytes())
    assert keeping.call("GET", f"{HISTORY}/{entries[0]['id']}", "ann").json()["seed"] == 40


def test_every_call_that_makes_pictures_is_in_it_and_no_picture_that_was_sent(keeping: World) -> None:
    start = keeping.images("ann").json()["data"][0]["b64_json"]
    body = {"prompt": "a dog", "steps": 2, "seed": 7, "init_images": [start], "denoising_strength": 0.5}
    assert keeping.call("POST", "/sdapi/v1/img2img", "ann", json=body).status_code == 200
    (newest,) = history(keeping, "ann", limit=1)["data"]
    assert (
        newest["seed"] == 7 and newest["settings"]["image"] is True and abs(newest["settings"]["strength"] - 0.5) < 0.01
    )
    assert keeping.images("ann", stream=True, seed=8).status_code == 200
    assert history(keeping, "ann", limit=1)["data"][0]["seed"] == 8


def test_pages_deletions_and_other_tenants(keeping: World) -> None:
    keeping.call("DELETE", HISTORY, "bob")
    for seed in range(5):
        keeping.images("bob", seed=seed)
    first = history(keeping, "bob", limit=2)
    rest = history(keeping, "bob", limit=9, after=first["last_id"])
    assert [one["seed"] for one in (*first["data"], *rest["data"])] == [4, 3, 2, 1, 0]
    assert first["has_more"] and not rest["has_more"]
    gone = first["data"][0]
    for method in ("GET", "DELETE"):
        assert problem(keeping.call(method, f"{HISTORY}/{gone['id']}", "ann"), 404)["code"] == "picture_not_found"
    assert keeping.call("DELETE", f"{HISTORY}/{gone['id']}", "bob").json()["deleted"] is True
    assert keeping.call("DELETE", f"{HISTORY}/{gone['id']}", "bob").status_code == 404
    assert problem(keeping.call("GET", path_of(gone["url"])), 404)["code"] == "picture_not_found"
    assert keeping.call("DELETE", HISTORY, "bob").json()["deleted"] == 4
    assert history(keeping, "bob")["data"] == [] and history(keeping, "ann", limit=1)["data"]
    assert keeping.registry.storage.list("pictures/history/bob") == []


def test_another_server_on_the_storage_has_the_same_history(keeping: World) -> None:
    keeping.images("bob", seed=77)
    other = create_app(keeping.loop.stream, LocalEngines(keeping.loop), keeping.library, keeping.spec, keeping.keys)
    (entry,) = history(keeping, "bob", limit=1)["data"]

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=other)
        head = {"Authorization": f"Bearer {keeping.tokens['bob']}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            listed = await client.get(HISTORY, headers=head, params={"limit": 1})
            return [listed, await client.get(path_of(entry["url"]))]

    listed, file = asyncio.run(ask())
    assert listed.json()["data"][0]["id"] == entry["id"] and len(file.content) == entry["bytes"]


def test_a_history_that_cannot_be_written_costs_nobody_the_picture(
    keeping: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageFull("no space left")

    monkeypatch.setattr(PictureStore, "keep", full)
    assert keeping.images("ann").status_code == 200
    assert problem(keeping.images("ann", response_format="url"), 503)["code"] == "storage"


def test_a_revocation_erases_the_pictures_that_wear_the_adapter(keeping: World) -> None:
    """Also another tenant's; the others stay. A link to one ends as well."""
    for tenant, model in (("bob", "ann/rusty"), ("ann", "rusty"), ("ann", "bolt")):
        assert keeping.images(tenant, model=model, seed=5).status_code == 200
    storage = keeping.registry.storage
    url = path_of(history(keeping, "bob", limit=1)["data"][0]["url"])
    exported = held(storage, "ann", "rusty")
    assert any(key.startswith("pictures/history/ann/") for key in exported)
    assert not any(key.startswith("pictures/history/bob/") for key in exported)
    receipt = revoke(storage, "ann", "rusty", by="ann", reason="revoked")
    assert any(key.startswith("pictures/history/bob/") for key in receipt.keys)
    left = [one for tenant in ("ann", "bob") for one in history(keeping, tenant, limit=100)["data"]]
    assert left and not any("rusty" in worn["id"] for one in left for worn in one["adapters"])
    assert any(worn["id"] == "ann/bolt" for one in left for worn in one["adapters"])
    assert keeping.call("GET", url).status_code in (404, 410)


def test_a_picture_that_is_finished_while_its_adapter_is_revoked_is_not_kept(keeping: World) -> None:
    """The engine may be done just before; the check after the writing is what closes the gap."""
    storage, keeper = keeping.registry.storage, keeping.app.state.service.keeper
    revoke(storage, "ann", "late", by="ann", reason="revoked")
    use = AdapterUse(ref=AdapterRef(tenant="ann", id="late", version="0" * 12))
    wanted = GenerateRequest(
        tenant="ann", prompt="a dog", width=16, height=16, seed=1, steps=1, guidance_scale=1.0, adapters=(use,)
    )
    kept = asyncio.run(keeper.keep(FinishedPicture(index=0, seed=1, data=b"png"), wanted))
    assert kept.kept == "" and list(PictureStore(storage).wearing(["ann/late"])) == []


# -- limits --


def entry(tenant: str, now: float, size: int, shelf: Any = "history") -> KeptPicture:
    return KeptPicture(id=new_id(now), shelf=shelf, tenant=tenant, time=now, form="png", bytes=size, seed=1, index=0,
                       base="tiny", base_hash="0" * 12)  # fmt: skip


def test_what_is_too_old_or_too_much_goes_oldest_first(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    pictures = PictureStore(storage)
    now = 2_000_000_000.0
    for hours in range(6):
        pictures.keep(entry("ann", now - hours * 3600, 1000), bytes(1000))
    pictures.keep(entry("ann", now - 1800, 10, "links"), bytes(10))
    pictures.keep(entry("bob", now - 50 * 3600, 1000), bytes(1000))
    storage.put(f"pictures/history/ann/{new_id(now - 90 * 3600)}/picture.png", b"no entry: its writer was killed")
    lasts: dict[Any, float] = {"history": 4.5 * 3600, "links": 600.0}
    assert pictures.tidy("ann", lasts_s=lasts, most_bytes=10**9, now=now) == 3
    assert pictures.tidy("ann", lasts_s=lasts, most_bytes=3 * 1400, now=now) == 2
    found, more = pictures.page("ann", None, 9)
    assert [round((now - one.time) / 3600) for one in found] == [0, 1, 2] and not more
    assert pictures.tenants() == ["ann", "bob"] and len(pictures.page("bob", None, 9)[0]) == 1


def test_a_damaged_entry_is_passed_over(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    pictures = PictureStore(storage)
    one = entry("ann", time.time(), 1)
    pictures.keep(one, b"x")
    bad = new_id(time.time() + 1)
    storage.put(f"pictures/history/ann/{bad}/entry.json", b"{")
    assert [found.id for found in pictures.page("ann", None, 9)[0]] == [one.id]
    with pytest.raises(NotFound):
        pictures.find("history", "ann", bad)
    assert list(pictures.wearing(["ann/rusty"])) == [] and pictures.clear("ann") == 2


def test_what_was_asked_holds_no_picture_and_no_field_of_the_server() -> None:
    wanted = GenerateRequest(prompt="x", width=16, height=16, seed=1, steps=1, guidance_scale=1.0, image=b"123",
                             request_id="r", tenant="ann", linked=True)  # fmt: skip
    assert asked_of(wanted) == {
        "prompt": "x",
        "width": 16,
        "height": 16,
        "steps": 1,
        "guidance_scale": 1.0,
        "image": True,
    }
