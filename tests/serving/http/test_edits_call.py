"""`POST /v1/images/edits` and AUTOMATIC1111's masks and hires pass, as their clients send them."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from serving.http.edits import working_size
from tests.families import write_family
from tests.serving.engine.test_edits import LEFT, photo, png, white
from tests.serving.http.test_api import World, pixels, problem
from tests.serving.http.test_clients import Site
from training.base.base import Base, load_base


@pytest.fixture(scope="module")
def site(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=True))
    site.world.upload("ann", "rusty", 1)
    yield site
    site.close()


def clear(picture: Image.Image, box: tuple[int, int, int, int] = LEFT) -> bytes:
    """The picture as a PNG that is transparent in `box`."""
    seen = picture.convert("RGBA")
    seen.putalpha(Image.eval(white(box, *picture.size), lambda value: 255 - value))
    return png(seen)


def edits(site: Site, files: dict[str, Any], tenant: str = "ann", **fields: Any) -> httpx.Response:
    sent = {"prompt": "a dog", "steps": "2", "seed": "1", **fields}
    return site.world.call("POST", "/v1/images/edits", tenant, data=sent, files=files)


def original(picture: Image.Image) -> Any:
    return np.asarray(picture).astype(int)


# -- OpenAI's call


def test_openai_edits_by_a_mask_and_keeps_the_rest_to_the_bit(site: Site) -> None:
    with site.client() as client:
        answer = client.images.edit(
            image=("photo.png", png(photo())),
            mask=("mask.png", clear(photo(seed=9))),
            prompt="a dog",
            model="tiny-epsilon-0:ann/rusty",
            n=2,
            response_format="b64_json",
            extra_body={"seed": 3, "steps": 2, "feather": 0},
        )
    images = [pixels(image.b64_json or "") for image in answer.data or []]
    assert len(images) == 2 and answer.size == "16x16"
    for image in images:
        assert (image[:, 8:] == original(photo())[:, 8:]).all()
        assert np.abs(image[:, :8] - original(photo())[:, :8]).mean() > 5
    assert (images[0] != images[1]).any()


def test_openai_streams_an_edit_by_the_pictures_own_transparency(site: Site) -> None:
    with site.client() as client:
        stream = client.images.edit(
            image=io.BytesIO(clear(photo())), prompt="a dog", stream=True, partial_images=1, extra_body={"steps": 3}
        )
        events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    made: Any = events[-1]
    assert (pixels(made.b64_json)[:, 8:] == original(photo())[:, 8:]).all()


def test_a_picture_of_any_size_keeps_it_unless_another_is_asked_for(site: Site) -> None:
    picture = photo(60, 45)
    mask = clear(photo(60, 45), (0, 0, 20, 20))
    files = {"image": ("p.png", png(picture)), "mask": ("m.png", mask)}
    kept = edits(site, files).json()
    image = pixels(kept["data"][0]["b64_json"])
    assert kept["size"] == "60x45" and image.shape == (45, 60, 3)
    assert (image[20:] == original(picture)[20:]).all() and (image[:20, 20:] == original(picture)[:20, 20:]).all()
    assert edits(site, files, size="32x32").json()["size"] == "32x32"
    part = edits(site, files, only_masked="true", padding="4", size="16x16", fill="fill").json()
    assert part["size"] == "60x45" and (pixels(part["data"][0]["b64_json"])[20:] == original(picture)[20:]).all()


def test_the_size_at_which_a_picture_is_drawn() -> None:
    assert working_size((512, 512), 512, 8) == (512, 512)
    assert working_size((640, 480), 512, 8) == (640, 480)
    assert working_size((1500, 1000), 512, 64) == (640, 448)
    assert working_size((33, 33), 512, 8) == (512, 512)
    assert working_size((8000, 10), 512, 8)[1] == 16


def test_an_edit_wears_a_mix_and_is_made_once_by_its_key(site: Site) -> None:
    files = {"image": ("p.png", clear(photo()))}
    mix = json.dumps([{"id": "rusty", "weight": 0.5}])
    answer = edits(site, files, adapters=mix).json()["data"][0]
    assert answer["adapters"][0]["weight"] == 0.5
    assert answer["b64_json"] != edits(site, files).json()["data"][0]["b64_json"]


def file(data: bytes) -> tuple[str, bytes]:
    return "p.png", data


PLAIN, CLEAR = file(png(photo())), file(clear(photo()))


@pytest.mark.parametrize(
    ("files", "fields", "param", "said"),
    [
        ({"image": PLAIN}, {}, None, "no mask, and the picture has no transparency"),
        ({"image": PLAIN, "mask": file(clear(photo(8, 16)))}, {}, None, "8x16 px and the picture"),
        ({"image": PLAIN, "mask": PLAIN}, {}, None, "mask has no transparency"),
        ({"image": PLAIN, "mask": file(clear(photo(), (0, 0, 0, 0)))}, {}, None, "no transparency"),
        ({"image": file(b"GIF89a.........................")}, {}, "image", "GIF"),
        ({"image[]": CLEAR, "image": CLEAR}, {}, "image", "without reference"),
        ({"mask": CLEAR}, {}, "image", "'image' is missing"),
        ({"image": file(clear(photo(80, 80)))}, {}, "image", "80x80 px"),
        ({"image": CLEAR}, {"hires": '{"scale": 2}'}, "hires", "as a whole"),
        ({"image": CLEAR}, {"fil": "original"}, "fil", "Unknown field 'fil'"),
        ({"image": CLEAR}, {"adapters": "rusty"}, "adapters", "no JSON"),
        ({"image": CLEAR}, {"steps": "many"}, "steps", "steps"),
        ({"image": CLEAR}, {"size": "17x16"}, "size", "multiple of"),
        ({"image": CLEAR, "picture": CLEAR}, {}, "picture", "Files are"),
    ],
)
def test_a_wrong_edit_is_refused_in_words(site: Site, files: Any, fields: Any, param: str | None, said: str) -> None:
    error = problem(edits(site, files, **fields), 400)
    assert said in error["message"] and error["param"] == param


def test_an_edit_needs_a_key(site: Site) -> None:
    answer = site.world.call(
        "POST", "/v1/images/edits", files={"image": ("p.png", clear(photo()))}, data={"prompt": "a"}
    )
    assert answer.status_code == 401


def test_the_form_is_in_the_openapi_document(site: Site) -> None:
    document = site.world.call("GET", "/openapi.json").json()
    form = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "image[]", "mask", "prompt", "only_masked", "feather"} <= set(form["properties"])
    assert "$defs" not in form and "hires" in document["components"]["schemas"]["ImagesBody"]["properties"]


def test_pictures_are_references_where_the_base_takes_them(tmp_path: Path) -> None:
    folder = write_family("klein", tmp_path)
    world = World(load_base(str(folder), device="cpu"), folder, tmp_path / "storage", keys=False)
    first, second = file(png(photo(32, 32))), file(png(photo(40, 24, seed=8)))
    sent = {"prompt": "a dog", "steps": "1", "seed": "1", "guidance_scale": "1", "size": "16x16"}

    def drawn(*files: tuple[str, tuple[str, bytes]], **changes: str) -> dict[str, Any]:
        answer = world.call("POST", "/v1/images/edits", data={**sent, **changes}, files=list(files))
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    try:
        one = drawn(("image", first))
        both = drawn(("image[]", first), ("image[]", second))
        masked = drawn(("image", first), ("mask", file(clear(photo(32, 32)))), size="auto")
        too_many = world.call("POST", "/v1/images/edits", data=sent, files=[("image[]", first)] * 11)
    finally:
        world.loop.close()
    assert one["size"] == "16x16" and one["data"][0]["b64_json"] != both["data"][0]["b64_json"]
    assert both["usage"]["input_tokens_details"]["image_tokens"] == 2 * both["usage"]["output_tokens"]
    image = pixels(masked["data"][0]["b64_json"])
    assert masked["size"] == "32x32" and (image[:, 8:] == original(photo(32, 32))[:, 8:]).all()
    assert "up to 10 reference pictures" in problem(too_many, 400)["message"]


# -- a second pass


def test_a_second_pass_makes_a_larger_picture(site: Site) -> None:
    made = site.world.images("ann", hires={"scale": 1.5, "steps": 4, "strength": 0.5}, size="16x32").json()
    assert made["size"] == "24x48" and pixels(made["data"][0]["b64_json"]).shape == (48, 24, 3)
    for asked, said in (
        ({"scale": 8}, "up to 64"),
        ({"scale": 1.01}, "larger scale"),
        ({"scale": 2, "steps": 99}, "99"),
    ):
        assert said in problem(site.world.images("ann", hires=asked), 400)["message"]


# -- AUTOMATIC1111


def sdapi(site: Site, call: str, **body: Any) -> httpx.Response:
    fields = {"prompt": "a dog", "seed": 1, "steps": 2, **body}
    return site.world.call("POST", f"/sdapi/v1/{call}", "ann", json=fields)


def b64(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


@pytest.mark.parametrize(
    "how",
    [
        {"inpaint_full_res": False, "inpainting_fill": 1},
        {"inpaint_full_res": True, "inpaint_full_res_padding": 4},
        {"inpaint_full_res": False, "inpainting_mask_invert": 1, "inpainting_fill": 2},
    ],
)
def test_img2img_with_a_mask_redraws_it_alone(site: Site, how: dict[str, Any]) -> None:
    picture, mask = photo(48, 48), white((0, 0, 20, 48), 48, 48)
    answer = sdapi(
        site, "img2img", init_images=[b64(picture)], mask=b64(mask), mask_blur=1, width=48, height=48,
        denoising_strength=1.0, **how,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    made, first = pixels(answer.json()["images"][0]), original(picture)
    kept, drawn = (slice(None), slice(26, 48)), (slice(None), slice(0, 14))
    if how.get("inpainting_mask_invert"):
        kept, drawn = drawn, kept
    assert (made[kept] == first[kept]).all() and np.abs(made[drawn] - first[drawn]).mean() > 5
    assert answer.json()["parameters"]["mask"] is None


def test_the_hires_pass_of_txt2img(site: Site) -> None:
    asked = {"enable_hr": True, "hr_scale": 2, "width": 16, "height": 16, "denoising_strength": 0.5}
    for how in ({"hr_upscaler": "Latent"}, {"hr_upscaler": "Lanczos", "hr_second_pass_steps": 2}, {"hr_resize_x": 32}):
        answer = sdapi(site, "txt2img", **asked, **how)
        assert answer.status_code == 200, answer.text
        assert pixels(answer.json()["images"][0]).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("call", "body", "param"),
    [
        ("txt2img", {"enable_hr": True, "hr_upscaler": "ESRGAN_4x"}, "hr_upscaler"),
        ("txt2img", {"enable_hr": True, "hr_prompt": "a cat"}, "hr_prompt"),
        ("txt2img", {"enable_hr": True, "hr_resize_x": 32, "hr_resize_y": 64}, "hr_resize_x"),
        ("txt2img", {"enable_hr": True, "hr_scale": 1}, "hr_scale"),
        ("txt2img", {"mask": "AAAA"}, "mask"),
        ("img2img", {"init_images": [b64(photo())], "enable_hr": True}, "enable_hr"),
        ("img2img", {"init_images": [b64(photo())], "mask": "AAAA"}, "mask"),
        ("img2img", {"init_images": [b64(photo(80, 80))], "mask": b64(white(LEFT, 80, 80))}, "init_images"),
        ("img2img", {"init_images": [b64(photo())], "mask": b64(white(LEFT, 8, 16))}, None),
    ],
)
def test_masks_and_passes_that_cannot_be_are_refused(site: Site, call: str, body: Any, param: str | None) -> None:
    assert problem(sdapi(site, call, **body), 400)["param"] == param
