"""AUTOMATIC1111's clients over a socket: `webuiapi` itself, and what chat front ends and a Photoshop plug-in send."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import webuiapi
from PIL import Image, PngImagePlugin

from serving.engine.request import Event, FinishedPicture, GenerateRequest
from serving.http.app import create_app
from serving.http.infotext import infotext, read_infotext
from serving.local import LocalEngines
from tests.serving.http.test_api import World
from tests.serving.http.test_clients import Site
from training.base.base import Base


@pytest.fixture(scope="module")
def site(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=True, picture_parameters=True))
    site.world.upload("ann", "rusty", 1)
    yield site
    site.close()


@pytest.fixture
def http(site: Site) -> Iterator[httpx.Client]:
    """As a client that knows Basic authentication only."""
    with httpx.Client(base_url=site.url, auth=("any", site.world.tokens["ann"]), trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture
def api(site: Site) -> Any:
    parts = urlsplit(site.url)
    found = webuiapi.WebUIApi(host=parts.hostname, port=parts.port, username="any", password=site.world.tokens["ann"])
    found.session.trust_env = False
    return found


def test_webuiapi_reads_every_list_and_draws(api: Any, site: Site) -> None:
    assert api.util_get_model_names() == ["tiny-epsilon-0"] and api.util_get_current_model() == "tiny-epsilon-0"
    assert "Euler a" in api.util_get_sampler_names() and api.util_get_scheduler_names() == ["automatic", "karras"]
    assert [one["name"] for one in api.get_loras()] == ["rusty"]
    for name in ("sd_vae", "upscalers", "latent_upscale_modes", "hypernetworks", "face_restorers", "realesrgan_models",
                 "prompt_styles", "scripts", "embeddings", "memory", "cmd_flags"):  # fmt: skip
        getattr(api, f"get_{name}")()
    api.refresh_checkpoints()
    api.util_set_model("tiny")
    api.util_wait_for_ready(check_interval=0.1)
    body = {"prompt": "a (red:1.2) dog <lora:rusty:0.5>", "negative_prompt": "snow", "seed": 3, "steps": 2,
            "width": 16, "height": 16, "cfg_scale": 7}  # fmt: skip
    drawn = api.txt2img(**body)
    assert drawn.image.size == (16, 16) and drawn.info["all_seeds"] == [3]
    again = api.img2img(images=[drawn.image], denoising_strength=0.5, **body)
    assert again.image.size == (16, 16)
    api.set_options({"sd_model_checkpoint": "tiny-epsilon-0"})
    assert api.get_progress()["state"]["job_count"] == 0
    api.interrupt(), api.skip()


def test_webuiapi_reads_parameters_and_hears_in_words_what_is_not_done(api: Any) -> None:
    out = io.BytesIO()
    text = 'a dog, "red"\nNegative prompt: snow\nSteps: 20, Sampler: Euler a, Size: 8x8, Lora hashes: "a: 1, b: 2"'
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=info)
    with Image.open(out) as picture:
        for refused in (lambda: api.interrogate(picture), lambda: api.extra_single_image(picture)):
            with pytest.raises(RuntimeError, match="This server"):
                refused()
    answer = api.session.post(
        f"{api.baseurl}/png-info", json={"image": base64.b64encode(out.getvalue()).decode()}
    ).json()
    assert answer["info"] == text and answer["parameters"] == {
        "Prompt": 'a dog, "red"', "Negative prompt": "snow", "Steps": "20", "Sampler": "Euler a",
        "Size": "8x8", "Lora hashes": "a: 1, b: 2",
    }  # fmt: skip


def test_a_picture_tells_its_parameters(http: httpx.Client) -> None:
    drawn = http.post("/sdapi/v1/txt2img", json={"prompt": "a dog", "steps": 2, "seed": 5}).json()["images"][0]
    told = http.post("/sdapi/v1/png-info", json={"image": drawn}).json()["parameters"]
    assert (told["Prompt"], told["Seed"], told["Steps"], told["Size"]) == ("a dog", "5", "2", "16x16")
    bad = http.post("/sdapi/v1/png-info", json={"image": "!!!"})
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "image"


def test_sillytavern_connects_and_draws(http: httpx.Client) -> None:
    """What its server sends: a ping, its lists by the fields that it reads, its model, a picture with its defaults."""
    assert http.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "tiny-epsilon-0"
    for name, field in (("upscalers", "name"), ("latent-upscale-modes", "name"), ("sd-vae", "model_name"),
                        ("samplers", "name"), ("schedulers", "name"), ("sd-models", "title")):  # fmt: skip
        assert all(one[field] for one in http.get(f"/sdapi/v1/{name}").json()), name
    assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "tiny-epsilon-0"}).status_code == 200
    idle = http.get("/sdapi/v1/progress").json()
    assert idle["progress"] == 0.0 and idle["state"]["job_count"] == 0
    body = {
        "prompt": "a (red:1.3) dog", "negative_prompt": "snow", "sampler_name": "DDIM", "scheduler": "automatic",
        "steps": 2, "cfg_scale": 7, "width": 16, "height": 16, "restore_faces": False, "enable_hr": False, 
        "hr_upscaler": "Latent", "hr_scale": 1, "hr_additional_modules": [], "denoising_strength": 0.7,
        "hr_second_pass_steps": 0, "seed": 1,
        "override_settings": {"CLIP_stop_at_last_layers": 1}, "override_settings_restore_afterwards": True,
        "clip_skip": 1, "save_images": True, "send_images": True, "do_not_save_grid": False,
        "do_not_save_samples": False,
    }  # fmt: skip
    assert len(http.post("/sdapi/v1/txt2img", json={**body, "url": "http://x", "auth": "a:b"}).json()["images"]) == 1


def test_open_webui_connects_and_draws(http: httpx.Client) -> None:
    """It posts all options back, and its pictures may be without a model."""
    options = http.get("/sdapi/v1/options").json()
    assert http.post("/sdapi/v1/options", json=options).status_code == 200
    models = http.get("/sdapi/v1/sd-models").json()
    assert [(one["title"], one["model_name"]) for one in models] == [("tiny-epsilon-0", "tiny-epsilon-0")]
    body = {"prompt": "a dog", "batch_size": 2, "width": 16, "height": 16, "steps": 2, "cfg_scale": 5.0,
            "sampler_name": "Euler", "scheduler": "Karras"}  # fmt: skip
    answer = http.post("/sdapi/v1/txt2img", json=body).json()
    assert len(answer["images"]) == 2 and json.loads(answer["info"])["steps"] == 2


def test_a_photoshop_plugin_connects_and_draws(http: httpx.Client) -> None:
    """Auto-Photoshop-StableDiffusion-Plugin: it reads lists, sends its own notes along and asks for progress."""
    for name in ("sd-models", "samplers", "options", "upscalers", "hypernetworks", "embeddings", "loras", "sd-vae"):
        assert http.get(f"/sdapi/v1/{name}").status_code == 200
    assert http.post("/sdapi/v1/options", json={"inpainting_mask_weight": 1.0}).status_code == 200
    body = {"prompt": "a dog", "negative_prompt": "", "original_prompt": "a dog", "original_negative_prompt": "",
            "steps": 2, "sampler_index": "Euler a", "width": 16, "height": 16, "denoising_strength": 0.7, "seed": "-1",
            "batch_size": 1, "cfg_scale": "7", "use_sharp_mask": True, "use_prompt_shortcut": False,
            "prompt_shortcut_ui_dict": {"a": "b"}, "uniqueDocumentId": "f3a", "mode": "txt2img", "restore_faces": False,
            "enable_hr": False, "alwayson_scripts": {}}  # fmt: skip
    answer = http.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    assert http.get("/sdapi/v1/progress?skip_current_image=false").json()["progress"] == 0.0
    assert http.post("/sdapi/v1/interrupt").json() == {}


@pytest.mark.parametrize(
    "scripts",
    [
        {},
        {"controlnet": {"args": []}, "ADetailer": {"args": [False, False, {"ad_model": "face_yolov8n.pt"}]}},
        {"ControlNet": {"args": [{"enabled": False, "module": "none", "weight": 1.0}] * 3}},
        {"Refiner": {"args": [False, "", 0.8]}, "Dynamic Thresholding": {"args": [False, 7]}},
    ],
)
def test_extensions_that_are_off_pass(http: httpx.Client, scripts: dict[str, Any]) -> None:
    body = {"prompt": "a dog", "steps": 1, "seed": 1, "alwayson_scripts": scripts}
    answer = http.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "scripts", [{"ADetailer": {"args": [True, False, {"ad_model": "x"}]}}, {"reactor": {"args": [{"enabled": True}]}}]
)
def test_extensions_that_are_on_are_refused_by_name(http: httpx.Client, scripts: dict[str, Any]) -> None:
    answer = http.post("/sdapi/v1/txt2img", json={"prompt": "a dog", "steps": 1, "alwayson_scripts": scripts})
    assert answer.status_code == 400 and next(iter(scripts)) in answer.json()["error"]["message"]


def test_parameters_come_back_as_they_were_written() -> None:
    wanted = GenerateRequest(prompt='a "red", dog\nin: snow', negative_prompt="a: b", width=16, height=8, seed=3,
                             steps=4, guidance_scale=2.5, scheduler="dpm++_2m_karras")  # fmt: skip
    told = read_infotext(infotext(wanted, 3, "base, of mine", "abcdef0123456789"))
    assert told["Prompt"] == wanted.prompt and told["Negative prompt"] == "a: b" and told["Model"] == "base, of mine"
    assert (told["Sampler"], told["Schedule type"], told["CFG scale"], told["Size"]) == (
        "DPM++ 2M",
        "Karras",
        "2.5",
        "16x8",
    )
    assert read_infotext("") == {} and read_infotext("just words: here, no more") == {
        "Prompt": "just words: here, no more"
    }


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["a: ", 'a: "', "a: ,", '"', "\\", "a:"])
def test_reading_parameters_takes_linear_time(piece: str) -> None:
    assert isinstance(read_infotext(piece * (2**18 // len(piece)) + '"'), dict)


def test_a_skipped_call_answers_with_what_is_finished(site: Site) -> None:
    """An engine that has one of two images ready and never makes the other."""
    world = site.world
    image = io.BytesIO()
    Image.new("RGB", (16, 16)).save(image, "PNG")
    told = asyncio.Event()

    async def generate(wanted: GenerateRequest) -> AsyncIterator[Event]:
        if wanted.seed == 1:
            yield FinishedPicture(index=1, seed=2, data=image.getvalue())
        told.set()
        await asyncio.Event().wait()

    app = create_app(generate, LocalEngines(world.loop), world.library, world.spec, world.keys)

    async def skipped(seed: int) -> httpx.Response:
        told.clear()
        head = {"Authorization": f"Bearer {world.tokens['ann']}"}
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=site.url, headers=head) as client:
            body = {"prompt": "a dog", "batch_size": 2, "seed": seed, "steps": 7}
            call = asyncio.create_task(client.post("/sdapi/v1/txt2img", json=body))
            await asyncio.wait_for(told.wait(), 20)
            state = (await client.get("/sdapi/v1/progress")).json()["state"]
            assert (state["job_count"], state["job_no"], state["sampling_steps"]) == (2, int(seed == 1), 7)
            assert (await client.post("/sdapi/v1/skip")).status_code == 200
            return await call

    async def both() -> tuple[httpx.Response, httpx.Response]:
        return await skipped(1), await skipped(5)

    answer, nothing = asyncio.run(both())
    assert answer.status_code == 200 and len(answer.json()["images"]) == 1
    assert json.loads(answer.json()["info"])["all_seeds"] == [2]
    assert nothing.status_code == 499
