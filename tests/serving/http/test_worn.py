"""Regions and weights of adapters over HTTP: what they draw, what the reply says, and what is refused with a reason."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serving.http.test_api import World, pixels, problem
from training.base.base import Base

PROMPT = "a sks dog and a sks cat on the beach"


@pytest.fixture(scope="module")
def world(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=False)
    world.upload("default", "rusty", 1)
    world.upload("default", "tabby", 2)
    yield world
    world.loop.close()


def mask(grey: int, size: tuple[int, int] = (16, 16), width: int = 0) -> str:
    """A picture of one grey, `size` pixels; black is added on the right up to `width`."""
    picture, out = Image.new("L", (max(width, size[0]), size[1])), io.BytesIO()
    picture.paste(grey, (0, 0, *size))
    picture.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def drawn(world: World, *adapters: dict[str, Any]) -> Any:
    return pixels(world.images(prompt=PROMPT, adapters=adapters).json()["data"][0]["b64_json"])


def same(one: Any, other: Any) -> bool:
    """But for the last bit of a pixel."""
    return int(abs(one - other).max()) <= 1


def test_regions_draw_what_they_must_equal(world: World) -> None:
    """The trigger 'a sks dog' is in the prompt: its tokens are the words of a region that names none."""
    whole, bare = drawn(world, {"id": "rusty"}), drawn(world)
    nothing = {"id": "rusty", "region": {"mask": "data:image/png;base64," + mask(0), "words": []}}
    assert same(drawn(world, nothing), bare)
    assert same(drawn(world, nothing, {"id": "tabby"}), drawn(world, {"id": "tabby"}))
    half = drawn(world, {"id": "rusty", "region": {"box": [0, 0, 0.5, 1], "words": ["a sks dog"]}})
    assert same(half, drawn(world, {"id": "rusty", "region": {"box": [0, 0, 0.5, 1]}}))
    masked = {"id": "rusty", "region": {"mask": mask(255, (8, 16), 16), "feather": 0, "words": ["a sks dog"]}}
    assert same(drawn(world, masked), drawn(world, {"id": "rusty", "region": {"box": [0, 0, 0.5, 1], "feather": 0}}))
    assert not same(half, whole) and not same(half, bare)


def test_weights_over_the_steps_and_of_the_text_encoder_are_told_in_the_reply(world: World) -> None:
    spans = [{"from": 0.0, "to": 0.5, "weight": 1.0}, {"from": 0.5, "to": 1.0, "weight": 1.0}]
    answer = world.images(prompt=PROMPT, adapters=[{"id": "rusty", "weight": spans[::-1]}]).json()["data"][0]
    assert answer["adapters"][0]["weight"] == spans and "text_encoder_weight" not in answer["adapters"][0]
    assert same(pixels(answer["b64_json"]), drawn(world, {"id": "rusty"}))
    worn = {"id": "rusty", "weight": 0.5, "text_encoder_weight": 0.25}
    answer = world.images(prompt=PROMPT, adapters=[worn]).json()["data"][0]
    assert answer["adapters"][0]["text_encoder_weight"] == 0.25
    body = {"prompt": f"{PROMPT} <lora:rusty:0.25:0.5>", "seed": 1, "steps": 2}
    tag = pixels(world.call("POST", "/sdapi/v1/txt2img", json=body).json()["images"][0])
    assert same(tag, pixels(answer["b64_json"]))
    assert not same(tag, drawn(world, {"id": "rusty", "weight": 0.5}))


@pytest.mark.parametrize(
    ("worn", "sentence"),
    [
        ({"region": {"box": [0.5, 0, 1.5, 1]}}, "outside of the picture: .* as shares, 0 to 1"),
        ({"region": {"box": [8, 0, 16, 16]}}, r"in pixels it would be \[0.5, 0, 1, 1\]"),
        ({"region": {"box": [0.5, 0, 0.5, 1]}}, "is empty: right must be above left"),
        ({"region": {"mask": mask(255, (8, 16))}}, "its mask has 8x16 pixels; it must have the picture's 16x16"),
        ({"region": {"mask": "AAAA"}}, "cannot be used"),
        ({"region": {"mask": mask(255), "box": [0, 0, 1, 1]}}, "a 'box' and a 'mask'"),
        ({"region": {}}, "says nothing"),
        ({"region": {"words": ["red toy"]}}, "names the words 'red toy', which are not in the prompt 'a sks dog and"),
        ({"region": {"box": [0, 0, 1]}}, "box"),
        ({"weight": []}, "'adapters.0.weight.list': Tuple should have at least 1 item"),
        ({"weight": "much"}, "'adapters.0.weight.number': Input should be a valid number"),
        ({"region": {"prompt": "a cat"}}, "a 'prompt' but no place in the picture"),
        ({"weight": [{"from": 0.5, "to": 0.5, "weight": 1}]}, "'to' must be above 'from'"),
        (
            {"weight": [{"from": 0, "to": 0.6, "weight": 1}, {"from": 0.5, "to": 1, "weight": 1}]},
            "two weights are for the steps from 0.5 on",
        ),
        ({"weight": [{"from": 0, "to": 1, "weight": -6}]}, "weight of 'rusty' is -6"),
        ({"text_encoder_weight": 7}, "weight of 'rusty' is 7"),
    ],
)
def test_what_cannot_be_worn_is_refused_in_a_sentence(world: World, worn: dict[str, Any], sentence: str) -> None:
    error = problem(world.images(prompt=PROMPT, adapters=[{"id": "rusty", **worn}]), 400)
    assert error["param"].startswith("adapters")
    assert re.search(sentence, error["message"]), error["message"]
