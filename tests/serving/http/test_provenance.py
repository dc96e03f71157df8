"""Marks over HTTP, on the tiny base: signed files, records of serials, and who may know whose a picture is.

The tiny base's random autoencoder loses what the noise says, so readings are stood in for by `told`; that a real base
reads its own pictures is `test_pocket_reads_its_own_pictures`.
"""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serving.config import EngineSpec, ServeSpec
from serving.engine.loop import EngineLoop
from serving.engine.request import GenerateRequest, NoiseReading
from serving.http.access.tenants import Keys
from serving.http.app import create_app
from serving.local import LocalEngines, make_app, make_engine
from serving.marking.credentials import read_claim
from serving.marking.forms import ImageForm
from serving.marking.marks import Marks
from serving.marking.settings import MarkSpec
from tests.serving.http.test_api import World, problem
from training.base.base import Base
from training.storage.storage import open_storage


class Marked(World):
    """A server with marks and keys, whose engine reads what `told` says."""

    def __init__(self, tiny: Base, folder: Path, storage: Path, **changes: Any) -> None:
        spec = MarkSpec(operator="Ann's pictures", operator_tenant="ops", **changes)
        super().__init__(tiny, folder, storage, keys=True, marks=spec)
        assert self.keys is not None
        self.tokens["admin"] = self.keys.make("ops", ("admin",))[1]
        self.marks = Marks(spec, open_storage(str(storage)))
        self.loop.engine.mark = self.marks.noise
        self.told: NoiseReading | None = None
        self.app = create_app(self.loop.stream, _Told(self), self.library, self.spec, self.keys, self.marks)

    def found(self, tenant: str, seed: int) -> NoiseReading:
        assert self.marks.noise is not None
        serial = self.marks.noise.serial(tenant, seed) & 0xFFFF
        return NoiseReading(serial=serial, words=1, log10=-12.0, z=9.0)


class _Told(LocalEngines):
    def __init__(self, world: Marked) -> None:
        super().__init__(world.loop)
        object.__setattr__(self, "world", world)

    async def read(self, request: GenerateRequest) -> NoiseReading:
        world: Marked = object.__getattribute__(self, "world")
        return world.told or await super().read(request)


@pytest.fixture
def marked(tiny: Base, tiny_folder: Path, tmp_path: Path) -> Iterator[Marked]:
    world = Marked(tiny, tiny_folder, tmp_path)
    yield world
    world.loop.close()


def detect(world: World, data: bytes, tenant: str | None = None, name: str = "a.png") -> Any:
    return world.call("POST", "/v1/detect", tenant, files={"image": (name, data)})


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_each_file_is_signed_and_says_how_it_was_made(marked: Marked, form: ImageForm) -> None:
    version = marked.upload("ann", "rusty", 1)
    answer = marked.images("ann", model="rusty", output_format=form, prompt="a secret dog").json()
    data = base64.b64decode(answer["data"][0]["b64_json"])
    claim = read_claim(data, form)
    assert claim.state == "valid" and claim.signer == "dreamfleet" and claim.facts is not None
    assert claim.facts["operator"] == "Ann's pictures" and claim.facts["base"] == "tiny-epsilon-0"
    assert claim.facts["adapters"] == [{"id": "rusty", "version": version, "weight": 1.0}]
    assert b"trainedAlgorithmicMedia" in data and b"Iptc4xmpExt:DigitalSourceType" in data
    assert b"secret" not in data
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        assert picture.size == (16, 16)


def test_an_edited_picture_says_so(marked: Marked) -> None:
    with Image.new("RGBA", (16, 16), (9, 9, 9, 255)) as picture:
        picture.paste((0, 0, 0, 0), (0, 0, 8, 16))
        out = io.BytesIO()
        picture.save(out, "PNG")
    sent = {"data": {"prompt": "a dog", "steps": "2"}, "files": {"image": ("p.png", out.getvalue())}}
    answer = marked.call("POST", "/v1/images/edits", "ann", **sent).json()
    data = base64.b64decode(answer["data"][0]["b64_json"])
    assert read_claim(data, "png").state == "valid"
    assert data.count(b"compositeWithTrainedAlgorithmicMedia") == 2  # in the manifest and in XMP
    assert b"/trainedAlgorithmicMedia" not in data


def test_one_changed_byte_makes_the_manifest_invalid(marked: Marked) -> None:
    made = marked.images("ann", output_format="jpeg").json()["data"][0]
    data = bytearray(base64.b64decode(made["b64_json"]))
    assert detect(marked, bytes(data)).json()["images"][0]["c2pa"] == "valid"
    data[-9] ^= 1
    assert detect(marked, bytes(data)).json()["images"][0]["c2pa"] == "invalid"


def test_the_manifest_names_the_prompt_where_the_operator_wants_it(
    tiny: Base, tiny_folder: Path, tmp_path: Path
) -> None:
    world = Marked(tiny, tiny_folder, tmp_path, tell_prompt=True)
    data = base64.b64decode(world.images("ann", prompt="a told dog").json()["data"][0]["b64_json"])
    facts = read_claim(data, "png").facts
    assert facts is not None and facts["prompt"] == "a told dog"
    world.loop.close()


def test_a_shared_server_writes_no_parameters_of_its_own_accord(marked: Marked, world: World) -> None:
    shared = base64.b64decode(marked.images("ann").json()["data"][0]["b64_json"])
    own = base64.b64decode(world.images().json()["data"][0]["b64_json"])
    assert b"parameters\0" not in shared and b"parameters\0" in own


@pytest.fixture
def world(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tiny, tiny_folder, tmp_path_factory.mktemp("plain"), keys=False)
    yield world
    world.loop.close()


def test_only_owner_and_operator_learn_whose_a_picture_is(marked: Marked) -> None:
    version = marked.upload("ann", "rusty", 1)
    data = base64.b64decode(marked.images("ann", model="rusty", seed=5).json()["data"][0]["b64_json"])
    marked.told = marked.found("ann", 5)
    public = {"file", "made_here", "false_positive", "c2pa", "signer"}
    for nobody in (None, "bob"):
        (seen,) = detect(marked, data, nobody).json()["images"]
        assert seen["made_here"] and seen["c2pa"] == "valid" and seen["false_positive"] < 1e-6
        assert {name for name, value in seen.items() if value is not None} == public
    for owner in ("ann", "admin"):
        (seen,) = detect(marked, data, owner).json()["images"]
        assert seen["adapter"] == "ann/rusty" and seen["adapters"] == [f"ann/rusty@{version}"]
        assert seen["tenant"] == "ann" and seen["time"] and seen["request"]


def test_of_pictures_with_one_serial_the_one_that_looks_alike_is_meant(marked: Marked) -> None:
    marked.upload("ann", "rusty", 1)
    marked.upload("ann", "tabby", 2)
    pictures = {}
    for name in ("rusty", "tabby"):
        answer = marked.images("ann", model=name, seed=5, steps=8)
        pictures[name] = base64.b64decode(answer.json()["data"][0]["b64_json"])
    marked.told = marked.found("ann", 5)
    for name, data in pictures.items():
        assert detect(marked, data, "ann").json()["images"][0]["adapter"] == f"ann/{name}"


def test_an_unmarked_picture_is_not_ours(marked: Marked) -> None:
    out = io.BytesIO()
    Image.effect_noise((16, 16), 60).convert("RGB").save(out, "JPEG")
    (seen,) = detect(marked, out.getvalue(), "ann").json()["images"]
    assert not seen["made_here"] and seen["c2pa"] == "none" and seen["false_positive"] > 1e-6
    assert seen["adapter"] is None


def test_what_is_no_picture_is_refused_by_name(marked: Marked) -> None:
    assert "'notes.txt'" in problem(detect(marked, b"hello", name="notes.txt"), 400)["message"]


def test_callers_without_a_key_are_limited_and_wrong_keys_refused(
    tiny: Base, tiny_folder: Path, tmp_path: Path
) -> None:
    world = Marked(tiny, tiny_folder, tmp_path, detect_per_minute=2)
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "PNG")
    statuses = [detect(world, out.getvalue()).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert detect(world, out.getvalue(), "ann").status_code == 200  # a tenant's own limit
    wrong = world.call("POST", "/v1/detect", headers={"Authorization": "Bearer no"}, files={"image": out.getvalue()})
    problem(wrong, 401)
    problem(world.call("POST", "/v1/detect?thorough=true", files={"image": out.getvalue()}), 401)
    world.loop.close()


def test_unmarked_servers_make_what_the_seed_alone_gives(tiny_folder: Path, tmp_path: Path) -> None:
    """`watermark: none` leaves the noise as it is; without credentials files are the engine's own."""
    spec = ServeSpec(
        base=str(tiny_folder), storage=str(tmp_path), marks=MarkSpec(watermark="none", credentials=False),
        engine=EngineSpec(slots=2, rank=4, device="cpu"),
    )  # fmt: skip
    engine = make_engine(spec)
    assert engine.mark is None
    loop = EngineLoop(engine)
    make_app(spec, loop)
    assert not (tmp_path / "marks").exists()
    loop.close()


def test_pocket_reads_its_own_pictures(tmp_path: Path) -> None:
    """The whole way on the embedded base: made, found, and traced to its request."""
    import asyncio

    import httpx

    spec = ServeSpec(storage=str(tmp_path), engine=EngineSpec(slots=2, rank=4, device="cpu", threads=1))
    loop = EngineLoop(make_engine(spec))
    app = make_app(spec, loop)

    async def go() -> list[Any]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=300) as client:
            asked = {"prompt": "a photo of a dog in the forest", "seed": 4, "n": 2}
            made = (await client.post("/v1/images/generations", json=asked)).json()["data"]
            files = [("image", (f"{one['seed']}.png", base64.b64decode(one["b64_json"]))) for one in made]
            return list((await client.post("/v1/detect", files=files)).json()["images"])

    found = asyncio.run(go())
    loop.close()
    assert all(one["made_here"] and one["c2pa"] == "valid" and one["tenant"] == "default" for one in found)


def test_keys_are_needed_for_nothing_but_names(marked: Marked) -> None:
    assert isinstance(marked.keys, Keys)
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "WEBP")
    assert detect(marked, out.getvalue()).status_code == 200
