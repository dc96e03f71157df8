"""The studio's files: whole, small, of one origin, under a strict policy, and part of the package."""

import asyncio
import io
import re
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load

from serving.http.pages import FOLDER
from tests.serving.http.test_api import World, problem
from training.base.base import Base

FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def world(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=True)
    world.upload("ann", "rusty", 1)
    yield world
    world.loop.close()


def get(world: World, path: str, **headers: str) -> httpx.Response:
    return world.call("GET", path, headers=headers)


def policy(response: httpx.Response) -> dict[str, list[str]]:
    parts = (part.split() for part in response.headers["content-security-policy"].split(";"))
    return {name: values for name, *values in parts}


def test_the_page_is_served_without_a_key_under_a_strict_policy(world: World) -> None:
    page = get(world, "/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    found = policy(page)
    assert found["default-src"] == ["'none'"] and found["frame-ancestors"] == ["'none'"]
    assert found["script-src"] == found["style-src"] == found["connect-src"] == ["'self'"]
    assert set(found["img-src"]) == {"'self'", "blob:", "data:"}
    assert (
        "unsafe" not in page.headers["content-security-policy"] and "*" not in page.headers["content-security-policy"]
    )
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    assert "<style" not in page.text and not re.search(r"<script(?![^>]*\ssrc=)|\son[a-z]+=|style=", page.text)


def test_every_file_is_served_with_its_type_and_kept_until_it_changes(world: World) -> None:
    kinds = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
    for file in FILES:
        path = f"/studio/{file.relative_to(FOLDER)}"
        answer = get(world, path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kinds[file.suffix]), path
        assert "content-security-policy" in answer.headers and answer.headers["cache-control"] == "no-cache"
        again = get(world, path, **{"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304 and not again.content


def test_what_is_not_there_is_an_error_in_the_usual_envelope(world: World) -> None:
    for path in ("/studio/nothing.js", "/studio/../app.py", "/studio/%2e%2e/app.py"):
        assert problem(get(world, path), 404)["code"] == "unknown_url"
    assert problem(world.call("POST", "/"), 405)


def test_no_file_names_another_origin_or_writes_markup() -> None:
    for file in FILES:
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(https?|wss?)://|[\"'`(]//|@import|url\(", text), file
        if file.suffix == ".js":
            unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
            assert not re.search(unsafe, text), file
            assert len(text.splitlines()) <= 300, file


def test_scripts_import_what_is_there_and_use_it() -> None:
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        for names, source in re.findall(r"import \{([^}]*)\} from \"([^\"]+)\"", text):
            other = (script.parent / source).resolve()
            assert source.startswith(("./", "../")), (script, source)
            exported = set(re.findall(r"export (?:async )?(?:function\*?|const|class) (\w+)", other.read_text()))
            wanted = {name.split(" as ")[0].strip() for name in names.split(",") if name.strip()}
            assert wanted <= exported, (script.name, source, wanted - exported)
            unused = {name for name in wanted if len(re.findall(rf"\b{name}\b", text)) < 2}
            assert not unused, (script.name, unused)


def test_nothing_lies_about_unused() -> None:
    reached, page = set(), (FOLDER / "index.html").read_text()
    waiting = {FOLDER / name for name in re.findall(r"/studio/([\w./]+)", page)} | {FOLDER / "index.html"}
    while waiting:
        file = waiting.pop()
        reached.add(file)
        sources = re.findall(r"from \"([^\"]+)\"", file.read_text(encoding="utf-8"))
        waiting |= {(file.parent / source).resolve() for source in sources} - reached
    assert reached == set(FILES)


def test_it_is_part_of_the_package() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["serving"]
    covered = {path for pattern in data for path in (ROOT / "serving").glob(pattern)}
    assert set(FILES) <= covered


# -- what the API has for it --


def test_the_base_tells_its_defaults_and_limits(world: World) -> None:
    base, rusty = world.call("GET", "/v1/models", "ann").json()["data"]
    assert base["defaults"] == {
        "size": "16x16", "multiple": 4, "largest_side": 64, "largest_pixels": 64 * 64 * 4, "steps": 30,
        "largest_steps": 50, "guidance_scale": 7.5, "scheduler": "ddim", "negative_prompt": True,
        "largest_n": 4, "largest_adapters": 3,
        "largest_weight": 5.0, "history": False,
    }  # fmt: skip
    assert "defaults" not in rusty


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_an_adapter_is_exported_for_other_programs(world: World, format: str) -> None:
    version = world.call("GET", "/v1/adapters/rusty", "ann").json()["version"]
    path = f"/v1/adapters/rusty/versions/{version}/export"
    answer = world.call("GET", path, "ann", params={"format": format})
    assert answer.status_code == 200, answer.text
    name = re.findall(r'filename="(.*)"', answer.headers["content-disposition"])[0]
    if format == "peft":
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            names = archive.namelist()
        assert name == "rusty-peft.zip" and any(one.endswith("adapter_config.json") for one in names)
    else:
        keys = load(answer.content).keys()
        prefix = "lora_unet_" if format == "kohya" else "unet."
        assert any(key.startswith(prefix) for key in keys) and name.endswith(".safetensors") and "rusty" in name
    assert world.call("GET", path, "bob", params={"format": format}).status_code == 404
    assert problem(world.call("GET", path, "ann", params={"format": "gguf"}), 400)["param"] == "format"


def test_head_is_answered(world: World) -> None:
    async def head() -> httpx.Response:
        async with world.client() as client:
            return await client.head("/")

    assert asyncio.run(head()).status_code == 200
