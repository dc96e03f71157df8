"""OpenAI's shape to the letter: error codes, usage, the OpenAPI document, /docs."""

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from openai.types.image_gen_completed_event import ImageGenCompletedEvent
from openai.types.images_response import ImagesResponse

from serving.engine.request import MAX_SEED
from tests.serving.http.test_api import World, events, problem
from training.base.base import Base


@pytest.fixture(scope="module")
def world(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=False)
    yield world
    world.loop.close()


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"model": "ghost"}, "model", "model_not_found"),
        ({"model": "other:ghost"}, "model", "model_not_found"),
        ({"adapters": [{"id": "ghost"}]}, "adapters", "adapter_not_found"),
        ({"prompt": None}, "prompt", "invalid_type"),
        ({"promt": "x"}, "promt", "unknown_parameter"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 5}, "n", "integer_above_max_value"),
        ({"n": "many"}, "n", "invalid_type"),
        ({"guidance_scale": -0.5}, "guidance_scale", "decimal_below_min_value"),
        ({"output_compression": 101}, "output_compression", "integer_above_max_value"),
        ({"prompt": "x" * 201}, "prompt", "string_above_max_length"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"size": "big"}, "size", "invalid_value"),
        ({"size": "22x20"}, "size", "invalid_value"),
    ],
)
def test_codes(world: World, body: dict[str, Any], param: str, code: str) -> None:
    answer = world.images(**body)
    error = problem(answer, 404 if "not_found" in code else 400)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


def test_codes_beside_the_body(world: World) -> None:
    missing = world.call("POST", "/v1/images/generations", json={})
    assert problem(missing, 400)["code"] == "missing_required_parameter"
    nowhere = problem(world.call("POST", "/v1/chat", json={}), 404)
    assert nowhere["code"] == "unknown_url" and "POST /v1/chat" in nowhere["message"]
    answer = world.call("PUT", "/v1/models")
    assert problem(answer, 405)["code"] == "method_not_supported" and answer.headers["allow"] == "GET"
    both = world.call("PUT", "/v1/adapters/rusty")
    assert both.headers["allow"] == "DELETE, GET, PATCH" and "DELETE, GET, PATCH" in both.text
    with world.app.state.service.quota.requests.one("default"):
        world.app.state.service.quota.requests.at_once = 1
        full = problem(world.images(), 429)
    world.app.state.service.quota.requests.at_once = 4
    assert (full["type"], full["code"]) == ("requests", "rate_limit_exceeded")


def test_a_transparent_background_is_refused_in_words(world: World) -> None:
    error = problem(world.images(background="transparent"), 400)
    assert error["param"] == "background" and "Allowed: 'opaque' and 'auto'" in error["message"]
    assert world.images(background="auto").json()["background"] == "opaque"


def test_usage_counts_tokens_of_text_and_cells_of_images(world: World) -> None:
    fields: dict[str, Any] = {"prompt": "a photo of a dog", "negative_prompt": "a cat", "size": "32x16", "n": 2}
    answer = world.images(**fields).json()
    assert answer["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"text_tokens": 7, "image_tokens": 0},
        "output_tokens": 256,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": 256},
        "total_tokens": 263,
    }
    ImagesResponse.model_validate(answer, strict=True)
    made = [data for _, data in events(world.images(**fields, stream=True))]
    for one in made:
        ImageGenCompletedEvent.model_validate(one, strict=True)
    for name, total in answer["usage"].items():
        if isinstance(total, int):
            assert sum(one["usage"][name] for one in made) == total
    start = world.images(image=answer["data"][0]["b64_json"], size="32x16").json()["usage"]
    assert start["input_tokens_details"]["image_tokens"] == 128


def test_every_route_tells_its_405_and_how_to_send_a_key(world: World) -> None:
    document = world.call("GET", "/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    assert {one["scheme"] for one in schemes.values()} == {"bearer", "basic"}
    for path, calls in document["paths"].items():
        for call in calls.values():
            assert "405" in call["responses"], path
            assert ("security" in call) == path.startswith(("/v1/", "/sdapi/", "/controlnet/")), path


def test_the_largest_seed_of_the_document_is_one_that_is_taken(world: World) -> None:
    """An OpenAPI document holds limits as floats: as it is written, and as a float, it is the same whole number."""
    document = world.call("GET", "/openapi.json").json()
    told = []
    for name in ("ImagesBody", "Txt2ImgBody"):
        seed = document["components"]["schemas"][name]["properties"]["seed"]
        told += [one["maximum"] for one in seed.get("anyOf", [seed]) if "maximum" in one]
    assert [int(one) for one in told] == [MAX_SEED] * 2 and {Decimal(repr(one)) for one in told} == {MAX_SEED}
    assert world.images(seed=int(told[0])).json()["data"][0]["seed"] == MAX_SEED
    problem(world.images(seed=MAX_SEED + 1), 400)


def test_docs_load_nothing_from_elsewhere(world: World) -> None:
    page = world.call("GET", "/docs").text
    assert not re.findall(r"""["'](?:https?:)?//""", page)
    assert '"validatorUrl": null' in page
    loaded = re.findall(r"""(?:src|href)="([^"]+)""", page)
    assert len(loaded) == 3
    for path in loaded:
        assert world.call("GET", path).status_code == 200
    style = next(path for path in loaded if path.endswith(".css"))
    assert not re.findall(r"url\(['\"]?https?:", world.call("GET", style).text)
    problem(world.call("GET", "/redoc"), 404)
