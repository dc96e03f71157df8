"""AUTOMATIC1111's API: what its clients send and ask, what is refused by name, and prompts of any size."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from serving.http.sdapi.prompt import split_prompt
from serving.http.sdapi.samplers import read_sampler
from serving.http.wire import MAX_PROMPT, WornAdapter
from tests.serving.http.test_api import World, pixels, problem
from training.base.base import Base

# what the client `webuiapi` 0.9.17 sends if its user says only a prompt
WEBUIAPI: dict[str, Any] = {
    "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0, "hr_resize_x": 0,
    "hr_resize_y": 0, "hr_checkpoint_name": None, "hr_sampler_name": None, "hr_scheduler": None, "hr_prompt": "",
    "hr_negative_prompt": "", "denoising_strength": 0.7, "firstphase_width": 0, "firstphase_height": 0,
    "prompt": "a dog", "styles": [], "seed": 1, "subseed": -1, "subseed_strength": 0.0, "seed_resize_from_h": 0,
    "seed_resize_from_w": 0, "batch_size": 1, "n_iter": 1, "steps": 2, "cfg_scale": 7.0, "width": 16, "height": 16,
    "restore_faces": False, "tiling": False, "do_not_save_samples": False, "do_not_save_grid": False,
    "negative_prompt": "", "eta": 1.0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1, "override_settings": {},
    "override_settings_restore_afterwards": True, "sampler_name": "Euler a", "scheduler": "automatic",
    "sampler_index": "Euler a", "script_name": None, "script_args": [], "send_images": True, "save_images": False,
    "alwayson_scripts": {"ADetailer": {"args": [False]}, "ControlNet": {"args": []}},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=False)
    world.upload("default", "rusty", 1)
    yield world
    world.loop.close()


def txt2img(world: World, **body: Any) -> httpx.Response:
    return world.call("POST", "/sdapi/v1/txt2img", json={"prompt": "a dog", "seed": 1, "steps": 2, **body})


def picture(side: int = 16, form: str = "PNG") -> str:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(out, form)
    return base64.b64encode(out.getvalue()).decode()


def test_a_clients_defaults_pass(world: World) -> None:
    answer = world.call("POST", "/sdapi/v1/txt2img", json=WEBUIAPI)
    assert answer.status_code == 200, answer.text
    start = {"init_images": [picture()], "resize_mode": 0, "image_cfg_scale": 1.5, "mask_blur": 4,
             "inpainting_fill": 0, "inpaint_full_res": True, "inpaint_full_res_padding": 0,
             "inpainting_mask_invert": 0, "initial_noise_multiplier": 1, "include_init_images": False}  # fmt: skip
    answer = world.call("POST", "/sdapi/v1/img2img", json={**WEBUIAPI, **start})
    assert answer.status_code == 200, answer.text
    assert answer.json()["parameters"]["init_images"] is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mask", picture()),
        ("alwayson_scripts", {"ControlNet": {"args": [{"image": "x", "module": "canny"}]}}),
        ("script_name", "X/Y/Z plot"),
        ("tiling", True),
        ("restore_faces", True),
        ("styles", ["noir"]),
        ("subseed_strength", 0.5),
        ("seed_resize_from_w", 512),
        ("override_settings", {"CLIP_stop_at_last_layers": 2}),
        ("override_settings", {"sd_model_checkpoint": "another"}),
        ("eta", 0.5),
        ("s_churn", 1),
        ("refiner_checkpoint", "another"),
        ("clip_skip", 2),
        ("disable_extra_networks", True),
        ("infotext", "Steps: 4"),
        ("distilled_cfg_scale", 3.5),
    ],
)
def test_what_is_not_done_is_refused_by_name(world: World, field: str, value: object) -> None:
    error = problem(world.call("POST", "/sdapi/v1/txt2img", json={**WEBUIAPI, field: value}), 400)
    assert error["param"] == field and field in error["message"]


def test_several_start_pictures_and_other_ways_to_fit_are_refused(world: World) -> None:
    body = {"init_images": [picture(), picture()], "steps": 2}
    assert problem(world.call("POST", "/sdapi/v1/img2img", json=body), 400)["param"] == "init_images"
    body = {"init_images": [picture()], "steps": 2, "resize_mode": 1}
    assert problem(world.call("POST", "/sdapi/v1/img2img", json=body), 400)["param"] == "resize_mode"


@pytest.mark.parametrize(
    "tag", ["<lora:rusty:1:lbw=OUTALL>", "<lora:rusty:0.5:0.8>", "<lora:rusty:1:1:8>", "<hypernet:rusty:1>"]
)
def test_tags_with_more_than_a_weight_are_refused(world: World, tag: str) -> None:
    assert problem(txt2img(world, prompt=f"a dog {tag}"), 400)["param"] == "prompt"


def test_a_tag_in_the_negative_prompt_is_refused(world: World) -> None:
    assert problem(txt2img(world, negative_prompt="<lora:rusty:1>"), 400)["param"] == "negative_prompt"


def test_tags_of_every_spelling() -> None:
    rusty = WornAdapter(id="rusty", weight=0.5)
    for tag in ("<lora:rusty:0.5>", "<lyco:rusty:0.5>", "<LORA: rusty : 0.5>", "<lora:rusty:0.5:0.5>",
                "<lora:rusty:te=0.5:unet=0.5>"):  # fmt: skip
        assert split_prompt(f"a {tag} dog") == ("a dog", [rusty]), tag
    assert split_prompt("a <lora:rusty> dog")[1] == [WornAdapter(id="rusty", weight=1.0)]
    assert split_prompt("1 < 2 > 0, a <b> c: <3") == ("1 < 2 > 0, a <b> c: <3", [])


def test_prompts_are_read_as_there(world: World) -> None:
    """Brackets are weights on these routes, and on the images call where it says so; else they are drawn."""
    weighted = txt2img(world, prompt="a (red:3) dog").json()["images"][0]
    same = world.images(prompt="a (red:3) dog", prompt_syntax="a1111").json()["data"][0]["b64_json"]
    literal = world.images(prompt="a (red:3) dog").json()["data"][0]["b64_json"]
    assert (pixels(weighted) == pixels(same)).all() and (pixels(weighted) != pixels(literal)).any()
    assert txt2img(world, prompt="a dog AND (snow:0.5) BREAK red").status_code == 200
    for field in ("prompt", "negative_prompt"):
        error = problem(txt2img(world, **{field: "a [dog:cat:0.5]"}), 400)
        assert error["param"] == field and "[dog:cat:0.5]" in error["message"]
    assert problem(world.images(prompt_syntax="compel"), 400)["param"] == "prompt_syntax"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("piece", ["<lora:", "<lora:a", "<", "<a:", "<lora:a:1", " ", "<lora::", ":>"])
def test_reading_tags_takes_linear_time(piece: str) -> None:
    """A quadratic reader takes a quarter of an hour for this megabyte, a linear one a part of a second."""
    assert split_prompt(piece * (2**20 // len(piece)))[1] == []


@pytest.mark.timeout(60)
def test_every_text_field_at_its_largest(world: World) -> None:
    """Every string of every call, as long as a body may be and as long as the field may be: never a 5xx."""
    document = world.call("GET", "/openapi.json").json()
    room = world.spec.limits.body_bytes - 4096
    tried = 0
    for path, calls in document["paths"].items():
        for method, call in calls.items():
            content = call.get("requestBody", {}).get("content", {}).get("application/json")
            if content is None or "$ref" not in content["schema"]:
                continue
            schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
            for name, field in schema["properties"].items():
                for longest in _lengths(field):
                    for piece in ("<lora:", "\ud800", "x" * 64):
                        text = (piece * room)[: min(longest, room) // len(json.dumps(piece)[1:-1]) * len(piece)]
                        body = {"prompt": "a dog", "init_images": [picture()], "steps": 1}
                        body = {key: value for key, value in body.items() if key in schema["properties"]}
                        value: object = [text] if name == "init_images" else text
                        raw = json.dumps({**body, name: value}).encode()
                        head = {"content-type": "application/json"}
                        answer = world.call(method.upper(), path, content=raw, headers=head)
                        assert answer.status_code < 500, (path, name, piece[:8], answer.text[:200])
                        tried += 1
    assert tried >= 60


def _lengths(field: dict[str, Any]) -> list[int]:
    """The longest string of each kind that a field may be, and one that is longer than any; none if it is no text."""
    kinds = [field, *field.get("anyOf", ()), *([field["items"]] if "items" in field else [])]
    texts = [kind for kind in kinds if kind.get("type") == "string" and "enum" not in kind and "const" not in kind]
    return [length for kind in texts for length in (kind.get("maxLength") or _by_pattern(kind), 2**40)]


def _by_pattern(kind: dict[str, Any]) -> int:
    """A text without a length must have a pattern; whatever that is, it is tried with a whole body."""
    assert "pattern" in kind, kind
    return 2**40


def test_every_text_of_every_call_has_a_limit(world: World) -> None:
    """The lengths that the document promises; a prompt's is also the server's own, which is smaller."""
    document = world.call("GET", "/openapi.json").json()
    for name in ("ImagesBody", "WornAdapter", "Txt2ImgBody", "Img2ImgBody"):
        for field in document["components"]["schemas"][name]["properties"].values():
            _lengths(field)
    assert problem(txt2img(world, prompt="x" * 201), 400)["param"] == "prompt"
    assert "characters" in problem(txt2img(world, negative_prompt="<lora:" * (MAX_PROMPT // 6)), 400)["message"]


# -- samplers --


def test_samplers_by_their_other_names() -> None:
    for name, schedule, expected in (
        ("Euler a", None, "euler_a"),
        ("k_euler_ancestral", "Automatic", "euler_a"),
        ("DPM++ 2M Karras", None, "dpm++_2m_karras"),
        ("DPM++ 2M", "Karras", "dpm++_2m_karras"),
        ("k_dpmpp_2m_ka", "", "dpm++_2m_karras"),
        ("euler karras", "automatic", "euler_karras"),
        (None, None, "ddim"),
        (None, "Automatic", "ddim"),
    ):
        assert read_sampler(name, schedule, "ddim") == expected


def test_samplers_that_are_not_served(world: World) -> None:
    assert problem(txt2img(world, sampler_name="DPM++ SDE Karras"), 400)["param"] == "sampler_name"
    assert problem(txt2img(world, sampler_name="DDIM", scheduler="Karras"), 400)["param"] == "scheduler"
    assert problem(txt2img(world, sampler_name="Euler", scheduler="Exponential"), 400)["param"] == "scheduler"
    plain, karras = (
        txt2img(world, sampler_name=name, steps=4).json()["images"][0] for name in ("Euler", "Euler Karras")
    )
    assert (pixels(plain) != pixels(karras)).any()


# -- pictures --


def test_pictures_hold_their_parameters(world: World) -> None:
    body = {"prompt": "a dog <lora:rusty:0.5>", "negative_prompt": "snow, rain", "batch_size": 2, "cfg_scale": 5,
            "sampler_name": "DPM++ 2M Karras"}  # fmt: skip
    answer = txt2img(world, **body).json()
    texts = json.loads(answer["info"])["infotexts"]
    for image, text, seed in zip(answer["images"], texts, (1, 2), strict=True):
        with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
            assert opened.info["parameters"] == text
        prompt, negative, settings = text.split("\n")
        assert prompt == "a dog <lora:rusty:0.5>" and negative == "Negative prompt: snow, rain"
        for part in ("Steps: 2", "Sampler: DPM++ 2M", "Schedule type: Karras", "CFG scale: 5.0", f"Seed: {seed}",
                     "Size: 16x16", "Model: tiny-epsilon-0", "Lora hashes: \"rusty: "):  # fmt: skip
            assert part in settings, part
    same = world.images(adapters=[{"id": "rusty", "weight": 0.5}], negative_prompt="snow, rain", guidance_scale=5.0,
                        scheduler="dpm++_2m_karras", n=2)  # fmt: skip
    assert [one["b64_json"] for one in same.json()["data"]] == answer["images"]


def test_texts_that_are_not_latin_come_back_whole(world: World) -> None:
    answer = txt2img(world, prompt="con chó 犬").json()
    with Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))) as opened:
        assert opened.info["parameters"].startswith("con chó 犬\nSteps: 2")


def test_parameters_are_left_out_where_the_server_is_set_up_so(tiny: Base, tiny_folder: Path, tmp_path: Path) -> None:
    world = World(tiny, tiny_folder, tmp_path, keys=False, picture_parameters=False)
    try:
        answer = txt2img(world).json()
        assert json.loads(answer["info"])["infotexts"] == []
        with Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))) as opened:
            assert "parameters" not in opened.info
    finally:
        world.loop.close()


def test_base64_as_programs_write_it(world: World) -> None:
    """Unpadded, wrapped at 76 characters, as a data URL."""
    plain = picture(17)
    assert plain.endswith("=")
    wrapped = "\r\n".join(plain[start : start + 76] for start in range(0, len(plain), 76))
    body = {"prompt": "a dog", "steps": 2, "seed": 1}
    found = {
        world.call("POST", "/sdapi/v1/img2img", json={**body, "init_images": [text]}).json()["images"][0]
        for text in (plain, plain.rstrip("="), wrapped, f"data:image/png;base64,{wrapped}")
    }
    assert len(found) == 1


def test_denoising_strength_of_nothing_is_one_step(world: World) -> None:
    """As there: the picture through the base's own encoder and decoder, with one step at the least noise."""
    before = world.loop.engine.stats.steps
    for steps in (1, 20, 49):
        body = {"prompt": "a dog", "steps": steps, "seed": 1, "init_images": [picture()], "denoising_strength": 0}
        assert world.call("POST", "/sdapi/v1/img2img", json=body).status_code == 200
    assert world.loop.engine.stats.steps == before + 3


# -- what clients ask before --


def test_every_list_that_clients_ask_for_is_there(world: World) -> None:
    found = {
        name: world.call("GET", f"/sdapi/v1/{name}")
        for name in (
            "upscalers",
            "latent-upscale-modes",
            "schedulers",
            "sd-vae",
            "scripts",
            "cmd-flags",
            "embeddings",
            "hypernetworks",
            "prompt-styles",
            "face-restorers",
            "memory",
            "samplers",
            "sd-models",
            "script-info",
            "extensions",
            "realesrgan-models",
            "loras",
            "options",
            "progress",
        )  # fmt: skip
    }
    assert {name: answer.status_code for name, answer in found.items()} == dict.fromkeys(found, 200)
    assert [one["name"] for one in found["samplers"].json()] == ["DDIM", "Euler", "Euler a", "DPM++ 2M"]
    assert [one["label"] for one in found["schedulers"].json()] == ["Automatic", "Karras"]
    assert found["upscalers"].json()[0]["name"] == "None"
    assert found["scripts"].json() == {"txt2img": [], "img2img": []}
    assert found["embeddings"].json() == {"loaded": {}, "skipped": {}}
    assert found["sd-models"].json()[0]["model_name"] == "tiny-epsilon-0"
    for listed in found["samplers"].json():
        for name in (listed["name"], *listed["aliases"]):
            assert txt2img(world, sampler_name=name, steps=1).status_code == 200, name


def test_options_are_the_same_for_everybody(world: World) -> None:
    options = world.call("GET", "/sdapi/v1/options").json()
    assert options["sd_model_checkpoint"] == "tiny-epsilon-0"
    assert world.call("POST", "/sdapi/v1/options", json=options).status_code == 200
    error = problem(world.call("POST", "/sdapi/v1/options", json={"sd_model_checkpoint": "another"}), 400)
    assert error["param"] == "sd_model_checkpoint" and "tiny-epsilon-0" in error["message"]
    assert problem(world.call("POST", "/sdapi/v1/options", json={"jpeg_quality": 80}), 400)["param"] == "jpeg_quality"
