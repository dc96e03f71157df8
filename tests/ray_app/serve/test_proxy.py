"""What Serve's proxy says where the ingress says nothing."""

import asyncio
from typing import Any

import httpx
import pytest
import uvicorn.config
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ray_app.serve.proxy import LostIngress, guard
from serving.http.access.timeouts import TimedProtocol


def ask(app: ASGIApp) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=LostIngress(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.get("/")

    return asyncio.run(call())


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    return


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("the actor died")


@pytest.mark.parametrize(
    "app", [silent, broken, PlainTextResponse("actor died", 500), PlainTextResponse("unavailable", 503)]
)
def test_a_fault_of_serves_own_is_a_503_in_openais_shape(app: Any) -> None:
    answer = ask(app)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "actor" not in answer.text


@pytest.mark.parametrize(
    "app",
    [
        JSONResponse({"error": {"message": "ours"}}, 500),
        PlainTextResponse("no such route", 404),
        StreamingResponse(iter([b"data: 1\n\n", b"data: 2\n\n"]), media_type="text/event-stream"),
    ],
)
def test_other_answers_pass_as_they_are(app: Any) -> None:
    answer = ask(app)
    assert answer.status_code == app.status_code and "retry-after" not in answer.headers
    assert answer.text in ('{"error":{"message":"ours"}}', "no such route", "data: 1\n\ndata: 2\n\n")


def test_the_proxys_server_has_our_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    assert str(guard()) == "[Middleware(LostIngress)]"
    config = uvicorn.Config(silent, log_config=None)
    config.load()
    assert config.http_protocol_class is TimedProtocol
