"""ControlNets and IP-Adapters over HTTP: listed, named in requests of both APIs, and refused in words."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving.engine.pictures.canny import canny
from tests.controls import control_for, write_control
from tests.ip_adapters import write_ip_adapter
from tests.serving.engine.test_control import photo, png
from tests.serving.http.test_api import World, pixels, problem
from training.base.base import Base


def sent(picture: Image.Image) -> str:
    return base64.b64encode(png(picture)).decode()


PHOTO = sent(photo(1, 16))
EDGES = sent(Image.fromarray(canny(np.asarray(photo(1, 16)))))


@pytest.fixture(scope="module")
def world(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server with one ControlNet of its base, one of another, and an IP-Adapter."""
    storage = tmp_path_factory.mktemp("storage")
    write_control(control_for(tiny, 0), storage, "edges")
    other = write_control(control_for(tiny, 1), storage, "foreign") / "config.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"cross_attention_dim": 1024}))
    write_ip_adapter(tiny, storage, "plus", 1, plus=True)
    made = World(tiny, tiny_folder, storage, keys=False)
    yield made
    made.loop.close()


def shown(b64: str) -> bytes:
    """What a picture shows, without what its file tells."""
    return bytes(pixels(b64).astype(np.uint8))


def drawn(world: World, **control: Any) -> bytes:
    answer = world.images(size="16x16", control=[{"model": "edges", **control}])
    assert answer.status_code == 200, answer.text
    return shown(answer.json()["data"][0]["b64_json"])


def test_controls_are_listed_with_why_one_is_not_for_the_base(world: World) -> None:
    found = {one["id"]: one for one in world.call("GET", "/v1/controls").json()["data"]}
    assert found["edges"]["usable"] and found["edges"]["reason"] is None and found["edges"]["bytes"] > 1000
    assert not found["foreign"]["usable"] and "cross_attention_dim: 1024" in found["foreign"]["reason"]
    assert world.call("GET", "/controlnet/model_list").json() == {
        "model_list": [f"edges [{found['edges']['version'][:8]}]"]
    }
    assert world.call("GET", "/controlnet/module_list").json()["module_list"] == ["none", "canny"]
    assert world.call("GET", "/controlnet/version").json() == {"version": 2}
    assert world.call("GET", "/controlnet/settings").json() == {"control_net_unit_count": 4}
    assert world.call("GET", "/controlnet/control_types").json()["control_types"]["All"]["model_list"][0] == "None"


def test_edges_are_made_of_the_picture_where_asked(world: World) -> None:
    plain = shown(world.images(size="16x16").json()["data"][0]["b64_json"])
    made = drawn(world, image=EDGES)
    assert made == drawn(world, image=PHOTO, preprocess="canny") != plain
    assert made != drawn(world, image=PHOTO) and drawn(world, image=EDGES, scale=0) == plain
    assert (
        world.images(size="16x16", control=[{"model": "edges", "image": EDGES}]).json()["usage"][
            "input_tokens_details"
        ]["image_tokens"]
        == 64
    )


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"model": "canny"}, "control.0.model", "no ControlNet 'canny'. There are: edges"),
        ({"model": "foreign"}, "control.0.model", "another base"),
        ({"image": None}, "control.0.image", "image"),
        ({"image": "AAAA"}, "control.0.image", "JPEG, PNG or WebP"),
        ({"scale": 3}, "control.0.scale", "less than or equal to 2"),
        ({"start": 0.8, "end": 0.2}, "control.0.start", "end before it begins"),
        ({"preprocess": "depth"}, "control.0.preprocess", "canny"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(world: World, changes: dict[str, Any], param: str, words: str) -> None:
    error = problem(world.images(control=[{"model": "edges", "image": EDGES, **changes}]), 400)
    assert error["param"] == param and words in error["message"]


def test_no_more_are_allowed_than_the_device_holds(world: World) -> None:
    error = problem(world.images(control=[{"model": "edges", "image": EDGES}] * 5), 400)
    assert error["param"] == "control" and "at most 4" in error["message"]


def test_a_picture_stands_in_place_of_words(world: World) -> None:
    (found,) = world.call("GET", "/v1/ip-adapters").json()["data"]
    assert found["id"] == "plus" and found["usable"] and found["object"] == "ip-adapter"
    plain, worded = (
        world.images(size="16x16", image_prompts=one) for one in (None, [{"model": "plus", "image": PHOTO}])
    )
    first, second = (shown(one.json()["data"][0]["b64_json"]) for one in (plain, worded))
    assert first != second
    error = problem(world.images(image_prompts=[{"model": "face", "image": PHOTO}]), 400)
    assert error["param"] == "image_prompts.0.model" and "There are: plus" in error["message"]
    error = problem(world.images(image_prompts=[{"model": "plus", "image": "AAAA"}]), 400)
    assert error["param"] == "image_prompts.0.image"


def unit(**changes: Any) -> dict[str, Any]:
    """What webuiapi sends for a unit."""
    return {
        "image": EDGES, "module": "none", "model": "edges [12345678]", "weight": 1.0, "guidance_start": 0.0,
        "guidance_end": 1.0, "resize_mode": "Just Resize", "control_mode": 0, "processor_res": 64, "lowvram": False,
        "threshold_a": -1, "threshold_b": -1, "pixel_perfect": False, **changes,
    }  # fmt: skip


def sd(world: World, path: str = "txt2img", units: Any = None, **changes: Any) -> Any:
    body = {"prompt": "a dog", "steps": 2, "seed": 1, "width": 16, "height": 16, "cfg_scale": 7.5, **changes}
    return world.call("POST", f"/sdapi/v1/{path}", json=body | {"alwayson_scripts": {"ControlNet": {"args": units}}})


def test_units_of_automatic1111s_extension_are_the_same_request(world: World) -> None:
    made = drawn(world, image=EDGES, scale=0.5, end=0.5)
    answer = sd(world, units=[unit(weight=0.5, guidance_end=0.5), unit(enabled=False), unit(model="None", image=None)])
    assert shown(answer.json()["images"][0]) == made
    assert "ControlNet 0:" in json.loads(answer.json()["info"])["infotexts"][0]
    as_canny = sd(world, units=[unit(image=PHOTO, module="canny", weight=0.5, guidance_end=0.5, resize_mode=1)])
    assert shown(as_canny.json()["images"][0]) == made
    own = {"init_images": [EDGES], "denoising_strength": 1.0}
    given, taken = (shown(sd(world, "img2img", [unit(image=one)], **own).json()["images"][0]) for one in (EDGES, None))
    assert given == taken


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "no 'image'"),
        ({"module": "openpose"}, "Known: none, canny"),
        ({"control_mode": 2}, "'control_mode'"),
        ({"resize_mode": "Crop and Resize", "image": sent(photo(1, 16).crop((0, 0, 16, 8)))}, "'resize_mode'"),
        ({"weight": 9}, "'weight' of a ControlNet unit"),
        ({"effective_region_mask": EDGES}, "does nothing with it"),
        ({"model": "depth"}, "no ControlNet 'depth'"),
    ],
)
def test_units_that_ask_for_something_else_are_refused(world: World, changes: dict[str, Any], words: str) -> None:
    assert words in problem(sd(world, units=[unit(**changes)]), 400)["message"]
