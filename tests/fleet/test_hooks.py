"""Webhooks: signed, repeated until they are taken, kept over a restart, never to private addresses."""

import base64
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

import fleet.hooks
from fleet.board import Board
from fleet.hooks import BadHook, Hooks, Message, reach
from serving.http.problems import ApiError
from tests.fleet.house import House, wait_for
from tests.fleet.test_fleet_http import submit, upload
from training.base.base import Base
from training.storage.storage import open_storage

SECRET = "whsec_" + base64.b64encode(b"a secret of 24 bytes ...").decode()


class Listener:
    """Somebody who is told; answers what `answers` says, then 200."""

    def __init__(self) -> None:
        self.heard: list[tuple[bytes, dict[str, str]]] = []
        self.answers: list[int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.heard.append((body, {name.lower(): value for name, value in self.headers.items()}))
                self.send_response(outer.answers.pop(0) if outer.answers else 200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/told"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def wait(self, count: int) -> None:
        until = time.monotonic() + 30
        while len(self.heard) < count and time.monotonic() < until:
            time.sleep(0.02)
        assert len(self.heard) >= count


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def open_house(own_base: Base, tiny_folder: Path, tmp_path: Path) -> Iterator[House]:
    made = House(own_base, tiny_folder, tmp_path / "storage", private_hooks=True)
    yield made
    made.close()


def test_the_end_of_a_job_is_told_signed_and_again_until_it_is_taken(
    open_house: House, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet.hooks, "DELAYS_S", (0.1, 0.1, 0.1))
    listener.answers = [500, 503]
    client = open_house.client()
    job = submit(client, open_house, upload(client), extra_body={"webhook": {"url": listener.url, "secret": SECRET}})
    job = wait_for(client, job.id, "succeeded")
    listener.wait(3)
    body, headers = listener.heard[-1]
    # OpenAI's own verification, which is that of Standard Webhooks
    client.webhooks.verify_signature(body, headers, secret=SECRET)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(body + b" ", headers, secret=SECRET)
    assert headers["webhook-event"] == "fine_tuning.job.succeeded"
    assert f'"fine_tuned_model":"{job.fine_tuned_model}"'.encode() in body
    assert len({heard["webhook-id"] for _, heard in listener.heard}) == 1
    time.sleep(1.0)
    assert len(listener.heard) == 3 and not open_house.storage.list("fleet/hooks")


def test_only_the_events_that_were_asked_for(open_house: House, listener: Listener) -> None:
    client = open_house.client()
    hook = {"url": listener.url, "secret": SECRET, "events": ["fine_tuning.job.failed"]}
    job = submit(client, open_house, upload(client), extra_body={"webhook": hook})
    wait_for(client, job.id, "succeeded")
    time.sleep(1.0)
    assert listener.heard == []


def test_a_message_outlives_its_driver(tmp_path: Path) -> None:
    """It lies on the storage with the time of its next try."""
    storage = open_storage(str(tmp_path))
    message = Message(id="msg_1", event="e", tenant="t", run="gone", kind="job", subject="a")
    storage.put("fleet/hooks/msg_1.json", message.model_dump_json().encode())
    hooks, over = Hooks(storage, Board(storage), private=True), threading.Event()
    thread = threading.Thread(target=hooks.deliver, args=(over, 0.01))
    thread.start()
    until = time.monotonic() + 10
    while storage.list("fleet/hooks") and time.monotonic() < until:  # its run is gone: nobody is left to be told
        time.sleep(0.01)
    over.set()
    thread.join()
    assert not storage.list("fleet/hooks")


def test_messages_are_tried_for_an_hour_at_least() -> None:
    assert sum(fleet.hooks.DELAYS_S) >= 3600 and list(fleet.hooks.DELAYS_S) == sorted(fleet.hooks.DELAYS_S)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/x", "http://localhost:1/x", "http://10.0.0.1", "http://[::1]/", "http://169.254.169.254/",
            "http://[::ffff:127.0.0.1]/", "http://0.0.0.0/", "http://192.168.1.1:8080/", "http://[fe80::1]/"]
)  # fmt: skip
def test_never_to_private_addresses(url: str) -> None:
    with pytest.raises(BadHook, match="private"):
        reach(url, private=False)
    with pytest.raises(ApiError, match="public addresses"):
        fleet.hooks.check_hook(url, private=False)
    fleet.hooks.check_hook(url, private=True)


def test_the_address_that_was_checked_is_the_one_that_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to something else the second time leads nowhere else."""
    found = [(None, None, None, "", ("93.184.216.34", 443))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *given, **named: found)
    assert reach("https://hooks.example/x?y=1", private=False) == (
        "https://hooks.example/x?y=1",
        "hooks.example",
        "https://93.184.216.34:443/x?y=1",
    )
