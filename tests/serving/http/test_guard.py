"""Who may ask: web pages, host names, keys and their scopes; all before a body is read."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.http.access.tenants import Keys, Scope
from serving.http.app import create_app
from serving.local import LocalEngines
from tests.serving.company import random_adapter
from tests.serving.http.test_api import World, problem
from training.adapters.adapter import save_adapter
from training.base.base import Base

PAGE = "https://studio.example"


@pytest.fixture(scope="module")
def world(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """No keys: this machine only."""
    world = World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=False)
    yield world
    world.loop.close()


@pytest.fixture(scope="module")
def shared(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two tenants with keys."""
    world = World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=True)
    yield world
    world.loop.close()


def ask(world: World, method: str, path: str, headers: dict[str, str], **rest: Any) -> httpx.Response:
    return world.call(method, path, headers=headers, **rest)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://evil.example:80"},
        {"origin": "http://localhost:3000"},
        {"origin": "null"},
        {"origin": "http://[::1"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_no_web_page_writes_to_a_server_without_keys(world: World, headers: dict[str, str]) -> None:
    data = save_adapter(random_adapter(world.base, 1))
    form: dict[str, Any] = {"files": {"file": data}, "data": {"id": "rusty"}}
    for method, path, body in (
        ("POST", "/v1/adapters", form),
        ("DELETE", "/v1/adapters/rusty", {}),
        ("POST", "/v1/images/generations", {"content": b"{}", "headers": {}}),
        ("POST", "/sdapi/v1/interrupt", {}),
    ):
        body.pop("headers", None)
        assert problem(ask(world, method, path, headers, **body), 403)["code"] == "origin_not_allowed"
    assert world.call("GET", "/v1/adapters").json()["data"] == []


def test_our_own_page_and_programs_may_write(world: World) -> None:
    body = {"prompt": "a dog", "steps": 1}
    for headers in (
        {},
        {"origin": "http://127.0.0.1"},
        {"origin": "http://127.0.0.1:80", "sec-fetch-site": "same-origin"},
    ):
        assert ask(world, "POST", "/v1/images/generations", headers, json=body).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "testserver", "[", ""]
)
def test_a_name_that_was_pointed_here_is_not_answered(world: World, host: str) -> None:
    """DNS rebinding: the page has its own origin, and its name leads to this machine."""
    headers = {"host": host, "origin": f"http://{host}"}
    for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/v1/nowhere"):
        assert "localhost only" in problem(ask(world, "GET", path, headers), 401)["message"]
    assert ask(world, "GET", "/healthz", headers).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_this_machines_names(world: World, host: str) -> None:
    assert ask(world, "GET", "/v1/models", {"host": host}).status_code == 200


def test_cors_is_off_until_an_origin_is_named(world: World) -> None:
    preflight = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    off = ask(world, "OPTIONS", "/v1/images/generations", preflight)
    assert off.status_code == 405 and "access-control-allow-origin" not in off.headers
    spec = world.spec.model_copy(update={"cors": (PAGE,)})
    app = create_app(world.loop.stream, LocalEngines(world.loop), world.library, spec)

    async def story() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
            allowed = await client.options("/v1/images/generations", headers=preflight)
            assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == PAGE
            for headers, status in (({"origin": PAGE}, 400), ({"origin": "https://evil.example"}, 403)):
                answer = await client.post("/v1/images/generations", json={"promt": ""}, headers=headers)
                assert answer.status_code == status
                assert answer.headers.get("access-control-allow-origin") == (PAGE if status == 400 else None)

    asyncio.run(story())


def test_with_keys_a_page_needs_the_key_and_a_remembered_password_does_not_do(shared: World) -> None:
    evil = {"origin": "https://evil.example"}
    assert shared.images("ann", headers=evil).status_code == 200  # no browser sends a bearer token by itself
    answer = shared.call("POST", "/sdapi/v1/interrupt", headers=evil, auth=("ann", shared.tokens["ann"]))
    assert problem(answer, 403)["code"] == "origin_not_allowed"
    assert shared.call("POST", "/sdapi/v1/interrupt", auth=("ann", shared.tokens["ann"])).status_code == 200


def test_the_key_is_checked_before_a_byte_of_the_body_is_read(shared: World) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield b"x" * 1000

    async def story() -> None:
        headers = {"content-type": "multipart/form-data; boundary=b", "authorization": "Bearer dfk_wrong"}
        async with shared.client() as client:
            for path in ("/v1/adapters", "/v1/images/generations", "/sdapi/v1/img2img", "/v1/nowhere"):
                assert problem(await client.post(path, content=body(), headers=headers), 401)

    asyncio.run(story())
    assert read == 0


def test_what_a_key_is_good_for(shared: World) -> None:
    assert shared.keys is not None
    data = save_adapter(random_adapter(shared.base, 1))
    cases: tuple[tuple[tuple[Scope, ...], bool, bool], ...] = (
        (("images",), True, False),
        (("train",), False, True),
        (("admin",), True, True),
        (("images", "train"), True, True),
    )
    for scopes, may_draw, may_put in cases:
        bearer = {"authorization": f"Bearer {shared.keys.make('cat', scopes)[1]}"}
        drawn = shared.images(headers=bearer)
        put = shared.call("POST", "/v1/adapters", headers=bearer, files={"file": data}, data={"id": "rusty"})
        changed = shared.call("PATCH", "/v1/adapters/rusty", headers=bearer, json={"trigger": "x"})
        assert (drawn.status_code, put.status_code) == (200 if may_draw else 403, 201 if may_put else 403)
        assert changed.status_code == (200 if may_put else 403)
        for refused in (answer for answer in (drawn, put, changed) if answer.status_code == 403):
            assert problem(refused, 403)["code"] == "missing_scope" and "this call needs" in refused.text
        assert shared.call("GET", "/v1/models", headers=bearer).status_code == 200


def test_a_key_expires(shared: World) -> None:
    assert shared.keys is not None
    soon, gone = datetime.now(UTC) + timedelta(hours=1), datetime.now(UTC) - timedelta(seconds=1)
    tokens = [shared.keys.make("cat", expires=end)[1] for end in (soon, gone)]
    good, late = ({"authorization": f"Bearer {token}"} for token in tokens)
    assert shared.call("GET", "/v1/models", headers=good).status_code == 200
    assert "has expired" in problem(shared.call("GET", "/v1/models", headers=late), 401)["message"]


def test_a_key_of_a_file_without_scopes_draws_and_uploads(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    _, token = keys.make("ann")
    file = json.loads((tmp_path / "keys.json").read_text())
    for name in ("scopes", "expires"):
        del file["keys"][0][name]
    (tmp_path / "keys.json").write_text(json.dumps(file))
    key = keys.find(token)
    assert key is not None and key.may("images") and key.may("train") and not key.may("admin")
