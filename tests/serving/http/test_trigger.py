"""The trigger of an adapter is added to a prompt that lacks it, where the server is set so, and the answer says it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.http.test_api import World
from training.base.base import Base


@pytest.fixture
def world(tiny: Base, tiny_folder: Path, tmp_path: Path) -> Iterator[World]:
    made = World(tiny, tiny_folder, tmp_path, keys=False, add_trigger=True)
    made.upload("default", "rusty", 1)  # its trigger is "a sks dog"
    yield made
    made.loop.close()


def test_a_prompt_without_the_trigger_gets_it_and_is_told(world: World) -> None:
    added = world.images(model="rusty", prompt="on the beach").json()["data"][0]
    assert added["revised_prompt"] == "a sks dog, on the beach"
    said = world.images(model="rusty", prompt="a sks dog, on the beach").json()["data"][0]
    assert "revised_prompt" not in said and said["b64_json"] == added["b64_json"]
    assert "revised_prompt" not in world.images(model="rusty", prompt="A SKS dog in snow").json()["data"][0]
    assert "revised_prompt" not in world.images(prompt="on the beach").json()["data"][0]
    away = world.images(prompt="on the beach", adapters=[{"id": "rusty", "weight": -1.0}]).json()["data"][0]
    assert "revised_prompt" not in away


def test_a_stream_and_other_clients_are_told_too(world: World) -> None:
    streamed = world.images(model="rusty", prompt="on the beach", stream=True).text
    (line,) = [line for line in streamed.splitlines() if "image_generation.completed" in line and "data:" in line]
    assert json.loads(line.removeprefix("data: "))["revised_prompt"] == "a sks dog, on the beach"
    body = {"prompt": "snow <lora:rusty:1>", "steps": 2, "seed": 1}
    info = json.loads(world.call("POST", "/sdapi/v1/txt2img", json=body).json()["info"])
    assert info["prompt"] == "a sks dog, snow"
    assert (
        json.loads(world.call("POST", "/sdapi/v1/txt2img", json={**body, "prompt": "snow"}).json()["info"])["prompt"]
        == "snow"
    )


def test_by_default_a_prompt_is_used_as_it_is(tiny: Base, tiny_folder: Path, tmp_path: Path) -> None:
    plain = World(tiny, tiny_folder, tmp_path, keys=False)
    try:
        plain.upload("default", "rusty", 1)
        assert "revised_prompt" not in plain.images(model="rusty", prompt="on the beach").json()["data"][0]
    finally:
        plain.loop.close()
