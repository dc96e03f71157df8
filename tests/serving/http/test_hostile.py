"""What hostile or broken clients and files do to a server, and what nobody else may notice of it."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.http.test_api import World, problem
from training.base.base import Base


@pytest.fixture(scope="module")
def world(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=False)
    yield world
    world.loop.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/images/generations", '{"prompt": "a \\ud800"}'),
        ("/v1/images/generations", '{"prompt": "a", "user": "\\udfff"}'),
        ("/v1/images/generations", '{"prompt": "a", "\\ud800": 1}'),
        ("/sdapi/v1/txt2img", '{"prompt": "a \\ud800"}'),
        ("/sdapi/v1/txt2img", '{"prompt": "a", "sampler_name": "\\ud800"}'),
        ("/sdapi/v1/txt2img", '{"prompt": "a", "override_settings": {"\\ud800": 1}}'),
        ("/sdapi/v1/options", '{"\\ud800": 1}'),
    ],
)
def test_half_a_character_is_a_400(world: World, path: str, body: str) -> None:
    answer = world.call("POST", path, content=body.encode(), headers={"content-type": "application/json"})
    assert problem(answer, 400)["message"]


def test_the_request_id_finds_a_fault_in_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(world.library, "resolve", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR):
        answer = world.images(model="rusty")
    name = answer.headers["x-request-id"]
    assert name in problem(answer, 500)["message"]
    (record,) = [record for record in caplog.records if name in record.getMessage()]
    assert record.exc_info and record.exc_info[0] is ZeroDivisionError


def test_the_request_id_finds_a_failed_generation_in_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(world.loop.engine.finisher, "decode", lambda samples: 1 / 0)
    with caplog.at_level(logging.ERROR):
        whole = world.images(headers={"x-request-id": "one-whole"})
        world.images(headers={"x-request-id": "one-stream"}, stream=True)
    problem(whole, 500)
    for name in ("one-whole", "one-stream"):
        found = [record for record in caplog.records if name in record.getMessage()]
        assert any(record.exc_info and "division" in str(record.exc_info[1]) for record in found), name


def test_a_broken_keys_file_shows_nothing_of_itself(
    tiny: Base, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is let in meanwhile, and all are again once it is whole."""
    shared = World(tiny, tiny_folder, tmp_path, keys=True)
    try:
        keys = tmp_path / "keys.json"
        whole = keys.read_bytes()
        keys.write_bytes(b"SECRET-IN-THE-FILE" + whole)
        answer = shared.call("GET", "/v1/models", "ann")
        assert problem(answer, 503)["code"] == "not_ready" and answer.headers["retry-after"]
        assert "SECRET" not in answer.text and str(tmp_path) not in answer.text
        assert str(keys) in caplog.text
        keys.write_bytes(whole)
        assert shared.call("GET", "/v1/models", "ann").status_code == 200
    finally:
        shared.loop.close()
