"""The server as its clients meet it: a real socket, the official OpenAI client, `python -m serving`."""

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from click.testing import CliRunner

from serving.__main__ import main
from serving.http.access import timeouts
from serving.http.access.guard import is_loopback
from serving.http.access.timeouts import TimedProtocol
from tests.serving.http.test_api import World
from training.base.base import Base
from training.errors import UserError


class Site:
    """A world behind uvicorn on a loopback port."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(world.app, http=TimedProtocol, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
        self.world.loop.close()

    def client(self, tenant: str = "ann", key: str | None = None) -> openai.OpenAI:
        token = key or self.world.tokens[tenant]
        http = openai.DefaultHttpxClient(trust_env=False)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=60, http_client=http)


@pytest.fixture(scope="module")
def site(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=True))
    site.world.upload("ann", "rusty", 1)
    yield site
    site.close()


def test_openai_generates(site: Site) -> None:
    with site.client() as client:
        answer = client.images.generate(model="tiny-epsilon-0:ann/rusty", prompt="a dog", n=2, size="32x32")
        images = [image.b64_json or "" for image in answer.data or []]
        assert len(images) == 2 and base64.b64decode(images[0]).startswith(b"\x89PNG")
        mixed = client.images.generate(
            prompt="a dog", extra_body={"adapters": [{"id": "rusty", "weight": 0.5}], "seed": 3, "steps": 2}
        )
        assert mixed.data and mixed.data[0].model_extra and mixed.data[0].model_extra["seed"] == 3


def test_openai_gets_links(site: Site) -> None:
    """Whoever has a link gets the picture: no key is sent along."""
    with site.client() as client:
        answer = client.images.generate(prompt="a dog", response_format="url", extra_body={"steps": 2})
    url = (answer.data or [])[0].url or ""
    assert url.startswith(f"{site.url}/v1/images/files/")
    assert httpx.get(url, trust_env=False).content.startswith(b"\x89PNG")


def test_openai_streams(site: Site) -> None:
    with site.client() as client:
        stream = client.images.generate(model="rusty", prompt="a dog", stream=True, partial_images=2)
        kinds = [event.type for event in stream]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


def test_openai_lists_models(site: Site) -> None:
    with site.client() as client:
        assert [model.id for model in client.models.list()] == ["tiny-epsilon-0", "tiny-epsilon-0:ann/rusty"]
        assert client.models.retrieve("tiny-epsilon-0").owned_by == "dreamfleet"


def test_openais_own_exceptions(site: Site) -> None:
    with site.client() as client, site.client(key="wrong") as stranger, site.client("bob") as bob:
        with pytest.raises(openai.NotFoundError) as missing:
            bob.images.generate(model="ann/rusty", prompt="a dog")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as bad:
            client.images.generate(prompt="a dog", n=99)
        assert bad.value.param == "n"
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with ExitStack() as busy:
            for _ in range(4):
                busy.enter_context(site.world.app.state.service.quota.request("ann"))
            with pytest.raises(openai.RateLimitError) as full:
                client.images.generate(prompt="a dog")
        assert full.value.response.headers["retry-after"] == "1"


def test_an_error_within_a_stream_raises(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = site.world.loop.engine
    monkeypatch.setattr(engine.finisher, "decode", lambda samples: 1 / 0)
    with site.client() as client, pytest.raises(openai.APIError, match="Generating failed"):
        for _ in client.images.generate(prompt="a dog", stream=True, partial_images=3):
            pass


def test_a_dropped_connection_cancels(site: Site) -> None:
    engine = site.world.loop.engine
    before = engine.stats.cancelled
    for stream in (False, True):
        body = {
            "prompt": "a dog",
            "steps": 50,
            "n": 4,
            "size": "64x64",
            "stream": stream,
            "partial_images": 1 if stream else None,
        }
        key = {"Authorization": f"Bearer {site.world.tokens['ann']}"}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{site.url}/v1/images/generations", json=body, headers=key, timeout=0.3, trust_env=False)
    end = time.monotonic() + 20
    while engine.stats.cancelled < before + 2 or engine.jobs:
        assert time.monotonic() < end
        time.sleep(0.05)


def _closed(site: Site, *pieces: bytes, pause_s: float = 0.1) -> bytes:
    """What a server says to a client that sends `pieces`, one after another, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", int(site.url.rpartition(":")[2])), 10) as client:
        said = b""
        for piece in pieces:
            client.sendall(piece)
            client.settimeout(pause_s)
            with suppress(TimeoutError):
                said += client.recv(65536)
        client.settimeout(20)
        with suppress(ConnectionError):
            while more := client.recv(65536):
                said += more
        return said


HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.mark.parametrize(
    "pieces", [(), (HEAD[:30],), (HEAD, b"A: b\r\n", b"C: d\r\n")], ids=["silent", "half-a-line", "drip"]
)
def test_a_connection_without_headers_is_closed(
    site: Site, monkeypatch: pytest.MonkeyPatch, pieces: tuple[bytes, ...]
) -> None:
    monkeypatch.setattr(timeouts, "HEADERS_S", 0.3)
    assert _closed(site, *pieces) == b""


def test_a_second_request_on_a_connection_has_its_time_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "HEADERS_S", 0.3)
    said = _closed(site, b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", HEAD, pause_s=2)
    assert said.count(b"HTTP/1.1") == 1 and b"200 OK" in said


def test_a_body_that_does_not_come_is_a_408(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "BODY_S", 0.3)
    key = f"Authorization: Bearer {site.world.tokens['ann']}\r\n".encode()
    kind = b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    said = _closed(site, HEAD + key + kind, b"{", b'"prompt"', b": ")
    assert said.startswith(b"HTTP/1.1 408") and b"too slowly" in said and b'"invalid_request_error"' in said


def test_waiting_for_an_answer_has_no_limit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than headers and body may take together."""
    monkeypatch.setattr(timeouts, "HEADERS_S", 0.05)
    monkeypatch.setattr(timeouts, "BODY_S", 0.05)
    with site.client() as client:
        answer = client.images.generate(prompt="a dog", n=2, size="64x64", extra_body={"steps": 20})
    assert answer.data and len(answer.data) == 2


def _run(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "serving", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_the_module_serves_until_it_is_stopped(tiny_folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with _run("--storage", str(tmp_path), "--base", str(tiny_folder), "--port", str(port), "--threads", "1") as server:
        try:
            end = time.monotonic() + 90
            while True:
                try:
                    answer = httpx.post(
                        f"http://127.0.0.1:{port}/v1/images/generations",
                        json={"prompt": "a dog"},
                        trust_env=False,
                        timeout=30,
                    )
                    break
                except httpx.ConnectError:
                    assert server.poll() is None and time.monotonic() < end
                    time.sleep(0.2)
            assert answer.status_code == 200
        finally:
            server.send_signal(signal.SIGINT)
            _, err = server.communicate(timeout=30)
    assert server.returncode == 0 and "Traceback" not in err, err


def test_no_open_server_without_keys() -> None:
    refused = CliRunner().invoke(main, ["--host", "0.0.0.0"])
    assert isinstance(refused.exception, UserError) and "loopback only" in str(refused.exception)


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("box", False)]
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
