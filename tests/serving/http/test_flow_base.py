"""A server on a flow-matching base: its samplers, its defaults, and what has no meaning on it."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from serving.http.intake import Intake
from serving.http.problems import ApiError
from serving.http.wire import ImagesBody
from tests.families import write_family
from tests.serving.http.test_api import World, pixels, problem
from training.base.base import load_base


@pytest.fixture(scope="module", params=["z-image", "flux"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = write_family(request.param, tmp_path_factory.mktemp("flow"))
    world = World(load_base(str(folder), device="cpu"), folder, tmp_path_factory.mktemp("storage"), keys=False)
    yield world
    world.loop.close()


def test_a_request_takes_the_bases_own_sampler_and_guidance(world: World) -> None:
    plain = world.images()
    assert plain.status_code == 200, plain.text
    facts = world.base.facts
    named = world.images(scheduler="euler", guidance_scale=facts.guidance_scale)
    assert named.json()["data"][0]["b64_json"] == plain.json()["data"][0]["b64_json"]
    other = world.images(guidance_scale=facts.guidance_scale + 3)
    assert other.json()["data"][0]["b64_json"] != plain.json()["data"][0]["b64_json"]


def test_a_sampler_of_another_process_is_refused_by_name(world: World) -> None:
    said = problem(world.images(scheduler="ddim"), 400)["message"]
    assert "'ddim'" in said and "euler, euler_a, dpm++_2m" in said
    assert problem(world.images(scheduler="euler_karras"), 400)["param"] == "scheduler"


def test_clients_are_told_the_samplers_of_the_base(world: World) -> None:
    listed = world.call("GET", "/sdapi/v1/samplers").json()
    assert [one["name"] for one in listed] == ["Euler", "Euler a", "DPM++ 2M"]
    assert [one["label"] for one in world.call("GET", "/sdapi/v1/schedulers").json()] == ["Automatic"]
    answer = world.call("POST", "/sdapi/v1/txt2img", json={"prompt": "a dog", "steps": 2, "sampler_name": "DDIM"})
    assert "euler, euler_a, dpm++_2m" in answer.text and answer.status_code == 400


def test_a_size_beyond_the_positions_of_the_base_is_refused(world: World) -> None:
    most = world.base.facts.max_side_px
    if most is None:
        return
    facts = replace(world.library.outline.facts, max_side_px=32)
    library = copy.copy(world.library)
    library.outline = replace(world.library.outline, facts=facts)
    body = ImagesBody.model_validate({"prompt": "a dog", "size": "64x32"})
    with pytest.raises(ApiError, match="width is 64; .* must be a multiple of 4 up to 32"):
        Intake(world.spec, library).images("default", body, "1")
    assert most == 64 * 2 * 2


def test_a_negative_prompt_is_refused_where_the_base_takes_none(world: World) -> None:
    answer = world.images(negative_prompt="red")
    if world.base.facts.negative:
        assert answer.status_code == 200
    else:
        error = problem(answer, 400)
        assert error["param"] == "negative_prompt" and "draws without one" in error["message"]


def test_a_prompt_that_is_too_long_is_refused(tmp_path: Path) -> None:
    folder = write_family("z-image", tmp_path)
    world = World(load_base(str(folder), device="cpu"), folder, tmp_path / "storage", keys=False)
    try:
        said = problem(world.images(prompt="\u00e9" * 200), 400)["message"]
    finally:
        world.loop.close()
    assert "at most 1" in said


def test_weights_and_joined_prompts_are_refused_where_a_language_model_reads_them(world: World) -> None:
    for prompt in ("a (red:1.3) dog", "a dog BREAK snow", "a dog AND a cat"):
        error = problem(world.images(prompt=prompt, prompt_syntax="a1111"), 400)
        assert error["param"] == "prompt" and "language model" in error["message"]
    escaped = world.call("POST", "/sdapi/v1/txt2img", json={"prompt": r"a \(red\) dog", "steps": 2, "seed": 1})
    plain = world.images(prompt="a (red) dog").json()["data"][0]["b64_json"]
    assert (pixels(escaped.json()["images"][0]) == pixels(plain)).all()
