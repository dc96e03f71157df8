"""The ComfyUI nodes: loaded as ComfyUI loads them, by its conventions, and run as a workflow on a real server."""

import base64
import importlib.util
import inspect
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from tests.serving.http.test_api import World, pixels
from tests.serving.http.test_clients import Site
from training.base.base import Base

PACK = Path(__file__).parents[2] / "tools" / "comfyui"


@pytest.fixture(scope="module")
def pack() -> Iterator[ModuleType]:
    """As ComfyUI's `load_custom_node` does: a module named by its path, imported from its `__init__.py`."""
    name = str(PACK).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    for loaded in [one for one in sys.modules if one.startswith(name)]:
        del sys.modules[loaded]


@pytest.fixture(scope="module")
def site(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=True))
    site.world.upload("ann", "rusty", 1)
    site.world.upload("bob", "bolt", 2, public=True)
    yield site
    site.close()


@pytest.fixture(autouse=True)
def settings(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMFLEET_URL", site.url)
    monkeypatch.setenv("DREAMFLEET_KEY", site.world.tokens["ann"])


def run(pack: ModuleType, workflow: dict[str, Any], saved: list[torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    """ComfyUI's execution of a workflow in API format: a node's linked inputs are others' outputs."""
    results: dict[str, tuple[Any, ...]] = {}
    for id, node in workflow.items():
        inputs = {
            name: results[value[0]][value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        if node["class_type"] == "SaveImage":
            saved.append(inputs["images"])
            continue
        kind = pack.NODE_CLASS_MAPPINGS[node["class_type"]]
        results[id] = getattr(kind(), kind.FUNCTION)(**inputs)
        assert isinstance(results[id], tuple) and len(results[id]) == len(kind.RETURN_TYPES)
    return results


def test_nodes_keep_comfyuis_conventions(pack: ModuleType) -> None:
    assert set(pack.NODE_DISPLAY_NAME_MAPPINGS) == set(pack.NODE_CLASS_MAPPINGS)
    for kind in pack.NODE_CLASS_MAPPINGS.values():
        inputs = kind.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional", "hidden"} and kind.CATEGORY == "dreamfleet"
        named = {name: given for group in inputs.values() for name, given in group.items()}
        parameters = inspect.signature(getattr(kind, kind.FUNCTION)).parameters
        assert set(named) == set(parameters) - {"self"}
        for name, given in named.items():
            assert isinstance(given, tuple) and (isinstance(given[0], str) or given[1]["default"] in given[0]), name
            assert (name in inputs["required"]) == (parameters[name].default is inspect.Parameter.empty), name
        assert all(isinstance(one, str) for one in kind.RETURN_TYPES) and len(kind.RETURN_NAMES) == len(
            kind.RETURN_TYPES
        )
        assert not any("key" in name for name in named)  # workflows are saved in pictures


def test_the_example_workflow_draws(pack: ModuleType, site: Site) -> None:
    saved: list[torch.Tensor] = []
    workflow = json.loads((PACK / "example.json").read_text(encoding="utf-8"))
    for node in workflow.values():
        node["inputs"] |= {"steps": 2} if "steps" in node["inputs"] else {}
    results = run(pack, workflow, saved)
    images, info = results["2"]
    assert images.dtype == torch.float32 and images.shape == (1, 16, 16, 3) and 0 <= images.min() <= images.max() <= 1
    expected = site.world.images("ann", prompt="a photo of a sks dog on the beach", model="rusty", seed=7, steps=2)
    found = pixels(expected.json()["data"][0]["b64_json"])
    assert abs((images[0] * 255).round().int().numpy() - found).max() <= 1
    assert json.loads(info)["data"][0]["adapters"][0]["id"] == "ann/rusty" and "b64_json" not in info
    assert saved[0].shape == images.shape and not torch.equal(saved[0], images)


def test_several_pictures_of_a_mix(pack: ModuleType, site: Site) -> None:
    fleet = {"class_type": "DreamfleetServer", "inputs": {"url": ""}}
    inputs = {"fleet": ["1", 0], "prompt": "a (red:1.2) dog", "adapter": "", "weight": 1.0, "seed": 3, "count": 2,
              "width": 32, "height": 16, "steps": 2, "guidance_scale": 3.0, "scheduler": "euler",
              "more_adapters": "rusty:0.5\n bob/bolt : -0.25\n\n", "prompt_syntax": "a1111"}  # fmt: skip
    results = run(pack, {"1": fleet, "2": {"class_type": "DreamfleetGenerate", "inputs": inputs}}, [])
    images, info = results["2"]
    assert images.shape == (2, 16, 32, 3)
    told = json.loads(info)["data"]
    assert [one["seed"] for one in told] == [3, 4]
    assert [(one["id"], one["weight"]) for one in told[0]["adapters"]] == [("ann/rusty", 0.5), ("bob/bolt", -0.25)]


def test_adapters_are_listed_and_fetched(
    pack: ModuleType, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = pack.NODE_CLASS_MAPPINGS
    (fleet,) = nodes["DreamfleetServer"]().connect("")
    names, details = nodes["DreamfleetAdapters"]().list(fleet)
    assert names.splitlines() == ["ann/rusty", "bob/bolt"] and json.loads(details)[0]["trigger"] == "a sks dog"
    stand_in = ModuleType("folder_paths")
    stand_in.get_folder_paths = lambda kind: [str(tmp_path / kind)]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", stand_in)
    version = site.world.registry.resolve("ann/rusty").version
    fetch = nodes["DreamfleetAdapterFile"]().fetch
    name, path = fetch(fleet, "rusty", "kohya")
    assert Path(path) == tmp_path / "loras" / name and name == f"kohya-rusty-{version[:12]}.safetensors"
    assert all(key.startswith("lora_") for key in load(Path(path).read_bytes()))
    Path(path).write_bytes(b"there")
    assert fetch(fleet, "rusty", "kohya") == (name, path) and Path(path).read_bytes() == b"there"
    _, elsewhere = fetch(fleet, "rusty", "diffusers", str(tmp_path / "own"))
    assert any(key.startswith("unet.") for key in load(Path(elsewhere).read_bytes()))
    assert [one.name for one in (tmp_path / "own").iterdir()] == [Path(elsewhere).name]


def test_errors_are_the_servers_sentences(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = pack.NODE_CLASS_MAPPINGS
    (fleet,) = nodes["DreamfleetServer"]().connect("")
    given: dict[str, Any] = {"prompt": "x", "adapter": "", "weight": 1.0, "seed": 0, "count": 1, "width": 0,
                             "height": 0, "steps": 1, "guidance_scale": 0.0, "scheduler": "the base's own"}  # fmt: skip
    draw = nodes["DreamfleetGenerate"]().draw
    for changes, part in (
        ({"adapter": "nobody"}, "nobody"),
        ({"width": 20, "height": 18}, "multiple of 4"),
        ({"width": 16}, "both"),
        ({"more_adapters": "rusty:much"}, "no weight"),
    ):
        with pytest.raises(Exception, match=part):
            draw(fleet, **{**given, **changes})
    with pytest.raises(Exception, match="bob/bolt|bolt"):
        nodes["DreamfleetAdapterFile"]().fetch(fleet, "bob/bolt", "kohya", "/nowhere")
    with pytest.raises(Exception, match="cannot be reached"):
        nodes["DreamfleetAdapters"]().list(nodes["DreamfleetServer"]().connect("http://127.0.0.1:9")[0])
    monkeypatch.setenv("DREAMFLEET_KEY", "wrong")
    with pytest.raises(Exception, match="API key"):
        nodes["DreamfleetAdapters"]().list(nodes["DreamfleetServer"]().connect("")[0])


def test_a_key_goes_to_the_address_that_it_was_set_with_alone(pack: ModuleType, site: Site) -> None:
    (own,) = pack.NODE_CLASS_MAPPINGS["DreamfleetServer"]().connect(f"{site.url}/")
    (other,) = pack.NODE_CLASS_MAPPINGS["DreamfleetServer"]().connect("https://elsewhere.example")
    assert own.key and not other.key


def test_pictures_are_images_and_back(pack: ModuleType) -> None:
    nodes = sys.modules[f"{pack.__name__}.nodes"]
    image = torch.rand(2, 4, 6, 3)
    back = nodes.image_of(base64.b64decode(nodes.png_of(image)))
    assert back.shape == (1, 4, 6, 3) and float((back - image[:1]).abs().max()) <= 0.5 / 255 + 1e-6
    out = io.BytesIO()
    Image.new("L", (3, 2), 255).save(out, "PNG")
    assert torch.equal(nodes.image_of(out.getvalue()), torch.ones(1, 2, 3, 3))
