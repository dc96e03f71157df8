"""The HTTP contract over a real engine on the tiny base: images, streams, adapters, tenants, errors, limits."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
import torch
from fastapi import FastAPI
from PIL import Image
from safetensors.torch import save

from serving.config import Limits, ServeSpec
from serving.engine.engine import Engine
from serving.engine.loop import EngineLoop
from serving.engine.tiers.fetcher import Fetcher
from serving.http.access.tenants import Keys
from serving.http.app import create_app
from serving.http.library import Library
from serving.http.wire import ImagesBody
from serving.local import LocalEngines
from tests.serving.company import random_adapter, small
from training.adapters.adapter import Adapter, save_adapter
from training.base.base import Base
from training.base.files.folder import EMBEDDED
from training.base.files.outline import outline
from training.storage.networks import NetworkFolders
from training.storage.registry import Registry
from training.storage.storage import open_storage

LIMITS = Limits(
    images=4, steps=50, side_px=64, pixels=64 * 64 * 4, prompt_chars=200, adapters=3, weight=5.0, body_bytes=200_000,
    upload_bytes=300_000, deadline_s=60, tenant_running=4, tenant_per_minute=100_000,
)  # fmt: skip


class World:
    """A server on a storage of its own, and the keys of two tenants."""

    def __init__(self, tiny: Base, folder: Path, storage: Path, keys: bool, **changes: Any) -> None:
        self.base = tiny
        self.spec = ServeSpec(
            base=str(folder), storage=str(storage), engine=small(queue=6), limits=LIMITS, refresh_s=0.05, **changes
        )
        self.registry = Registry(open_storage(str(storage)))
        networks = NetworkFolders(self.registry.storage, EMBEDDED)
        engine = Engine(tiny, self.spec.engine, Fetcher(self.registry), open_network=networks.folder)
        self.loop = EngineLoop(engine)
        self.library = Library(self.registry, outline(str(folder)), refresh_s=0.05, serves=self.spec.serves)
        self.keys = Keys(storage / "keys.json") if keys else None
        self.tokens = {name: self.keys.make(name)[1] for name in ("ann", "bob")} if self.keys else {}
        self.app: FastAPI = create_app(self.loop.stream, LocalEngines(self.loop), self.library, self.spec, self.keys)

    def upload(self, tenant: str, id: str, seed: int, public: bool = False) -> str:
        data = save_adapter(random_adapter(self.base, seed))
        return self.library.upload(tenant, id, data, self.spec.engine, public=public, trigger="a sks dog").version

    def client(self, tenant: str | None = None, host: str = "127.0.0.1") -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.tokens[tenant]}"} if tenant else {}
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=True)
        return httpx.AsyncClient(transport=transport, base_url=f"http://{host}", headers=headers, timeout=60)

    def call(self, method: str, path: str, tenant: str | None = None, **rest: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self.client(tenant) as client:
                return await client.request(method, path, **rest)

        return asyncio.run(send())

    def images(self, tenant: str | None = None, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        fields = {"prompt": "a dog", "steps": 2, "seed": 1, **body}
        return self.call("POST", "/v1/images/generations", tenant, json=fields, headers=headers or {})


@pytest.fixture
def world(tiny: Base, tiny_folder: Path, tmp_path: Path) -> Iterator[World]:
    """No keys: one tenant, this machine only."""
    world = World(tiny, tiny_folder, tmp_path, keys=False)
    yield world
    world.loop.close()


@pytest.fixture
def shared(tiny: Base, tiny_folder: Path, tmp_path: Path) -> Iterator[World]:
    """Two tenants with keys."""
    world = World(tiny, tiny_folder, tmp_path, keys=True)
    yield world
    world.loop.close()


def pixels(b64: str) -> Any:
    with Image.open(io.BytesIO(base64.b64decode(b64))) as opened:
        return numpy.asarray(opened.convert("RGB")).astype(int)


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# -- images --


def test_an_image_of_an_adapter(world: World) -> None:
    version = world.upload("default", "rusty", 1)
    answer = world.images(model="tiny-epsilon-0:default/rusty").json()
    (image,) = answer["data"]
    assert image["seed"] == 1 and answer["size"] == "16x16"
    assert image["adapters"] == [{"id": "default/rusty", "version": version, "weight": 1.0}]
    assert pixels(image["b64_json"]).shape == (16, 16, 3)
    for same in ({"model": "rusty"}, {"adapters": [{"id": "rusty"}]}, {"model": f"rusty@{version[:8]}"}):
        assert world.images(**same).json()["data"][0]["b64_json"] == image["b64_json"]
    plain = world.images().json()["data"][0]
    assert plain["adapters"] == [] and plain["b64_json"] != image["b64_json"]


def test_a_mix_several_images_and_formats(world: World) -> None:
    world.upload("default", "rusty", 1)
    world.upload("default", "bolt", 2)
    mix = [{"id": "rusty", "weight": 0.5}, {"id": "bolt", "weight": -0.25}]
    answer = world.images(adapters=mix, n=3, size="32x16", output_format="webp", scheduler="euler_a").json()
    assert [image["seed"] for image in answer["data"]] == [1, 2, 3] and answer["output_format"] == "webp"
    assert pixels(answer["data"][0]["b64_json"]).shape == (16, 32, 3)
    both = world.images(model="rusty", adapters=[{"id": "bolt", "weight": 2}]).json()["data"][0]
    assert [one["weight"] for one in both["adapters"]] == [1.0, 2.0]


def test_without_a_seed_each_request_has_its_own_and_it_makes_the_image_again(world: World) -> None:
    one, two = (world.images(seed=None).json()["data"][0] for _ in range(2))
    assert one["seed"] != two["seed"]
    assert world.images(seed=one["seed"]).json()["data"][0]["b64_json"] == one["b64_json"]


def test_image_to_image(world: World) -> None:
    start = world.images(seed=5).json()["data"][0]["b64_json"]
    little = world.images(image=start, strength=0.5).json()["data"][0]["b64_json"]
    url = world.images(image=f"data:image/png;base64,{start}", strength=0.5).json()["data"][0]["b64_json"]
    assert little == url != world.images().json()["data"][0]["b64_json"]
    assert problem(world.images(image="!!!"), 400)["param"] == "image"
    nothing = problem(world.images(image=base64.b64encode(b"nothing").decode()), 400)
    assert nothing["param"] == "image" and "not an image" in nothing["message"]


def events(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_stream_has_previews_and_the_same_image(world: World) -> None:
    world.upload("default", "rusty", 1)
    whole = world.images(model="rusty", steps=8).json()["data"][0]
    found = events(world.images(model="rusty", steps=8, stream=True, partial_images=2))
    assert [name for name, _ in found] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [data["type"] for _, data in found] == [name for name, _ in found]
    assert [data["partial_image_index"] for _, data in found[:2]] == [0, 1]
    assert found[2][1]["b64_json"] == whole["b64_json"] and found[2][1]["adapters"] == whole["adapters"]
    assert pixels(found[0][1]["b64_json"]).shape == (16, 16, 3)


def test_concurrent_requests_give_what_each_alone_gives(world: World) -> None:
    """Within 1/255: the batch is another, so the last bits are."""
    names = ["rusty", "bolt", "dash"]
    for seed, name in enumerate(names):
        world.upload("default", name, seed)
    wanted: list[dict[str, Any]] = [{"model": name, "seed": 3, "steps": 4 + i} for i, name in enumerate(names)]
    wanted.append({"seed": 3, "steps": 4})
    alone = [world.images(**body).json()["data"][0]["b64_json"] for body in wanted]

    async def together() -> list[httpx.Response]:
        async with world.client() as client:
            bodies = [{"prompt": "a dog", **body} for body in wanted]
            return await asyncio.gather(*(client.post("/v1/images/generations", json=body) for body in bodies))

    for response, expected in zip(asyncio.run(together()), alone, strict=True):
        found = response.json()["data"][0]["b64_json"]
        assert abs(pixels(found) - pixels(expected)).max() <= 1
    assert len(set(alone)) == 4


# -- errors --


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"prompt": None}, "prompt", "'prompt'"),
        ({"promt": "x"}, "promt", "Unknown field 'promt'"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 5}, "n", "at most 4"),
        ({"size": "big"}, "size", "size"),
        ({"size": "20x20"}, "size", "multiple of 4"),
        ({"size": "18x16"}, "size", "multiple of 4"),
        ({"size": "128x16"}, "size", "up to 64"),
        ({"size": "64x64", "n": 4, "steps": 51}, "steps", "at most 50"),
        ({"prompt": "x" * 201}, "prompt", "at most 200"),
        ({"prompt": "x\0"}, "prompt", "null"),
        ({"response_format": "file"}, "response_format", "b64_json"),
        ({"output_format": "gif"}, "output_format", "png"),
        ({"guidance_scale": -1}, "guidance_scale", "greater"),
        ({"scheduler": "magic"}, "scheduler", "ddim"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"partial_images": 1}, "partial_images", "stream"),
        ({"partial_images": 4, "stream": True}, "partial_images", "less than"),
        ({"adapters": [{"id": "../../etc"}]}, "adapters.0.id", "pattern"),
        ({"adapters": [{"id": "a", "path": "/x"}]}, "adapters.0.path", "Unknown field"),
        ({"strength": 0}, "strength", "greater"),
    ],
)
def test_a_wrong_field_is_named(world: World, body: dict[str, Any], param: str, part: str) -> None:
    if body.get("size") == "20x20":
        body = {"size": "22x20"}
    error = problem(world.images(**body), 400)
    assert error["param"] == param and part in error["message"] and error["type"] == "invalid_request_error"


def test_weights_out_of_range(world: World) -> None:
    world.upload("default", "rusty", 1)
    assert problem(world.images(adapters=[{"id": "rusty", "weight": 5.5}]), 400)["param"] == "adapters"
    assert problem(world.images(adapters=[{"id": "rusty"}] * 4), 400)["param"] == "adapters"


def test_what_is_unknown_is_404(world: World) -> None:
    assert problem(world.images(model="ghost"), 404)["code"] == "model_not_found"
    assert problem(world.images(model="tiny-epsilon-0:ghost"), 404)["param"] == "model"
    assert problem(world.images(model="other-base:rusty"), 404)["code"] == "model_not_found"
    assert problem(world.images(adapters=[{"id": "ghost"}]), 404)["param"] == "adapters"
    assert problem(world.images(model="ghost", stream=True), 404)["code"] == "model_not_found"
    assert problem(world.call("GET", "/v1/nowhere"), 404)
    assert problem(world.call("PUT", "/v1/models"), 405)


def test_many_requests_for_an_unknown_adapter(world: World) -> None:
    async def flood() -> list[httpx.Response]:
        async with world.client() as client:
            call = [client.post("/v1/images/generations", json={"prompt": "x", "model": "ghost"}) for _ in range(30)]
            return await asyncio.gather(*call)

    for response in asyncio.run(flood()):
        problem(response, 404)
    assert world.loop.engine.stats.requests == 0


def test_bodies_that_are_too_large_or_no_json(world: World) -> None:
    path = "/v1/images/generations"
    assert problem(world.call("POST", path, content=b"x" * 300_000), 413)["code"] == "body_too_large"

    async def drip() -> AsyncIterator[bytes]:  # no Content-Length
        for _ in range(30):
            yield b"x" * 10_000

    assert problem(world.call("POST", path, content=drip()), 413)
    assert (
        "not JSON"
        in problem(world.call("POST", path, content=b"{", headers={"content-type": "application/json"}), 400)["message"]
    )
    assert problem(world.call("POST", path, content=b"prompt=x"), 400)


def test_a_full_queue_says_when_to_come_again(world: World) -> None:
    async def flood() -> list[httpx.Response]:
        async with world.client() as client:
            body = {"prompt": "x", "n": 4, "steps": 50}
            return await asyncio.gather(*(client.post("/v1/images/generations", json=body) for _ in range(4)))

    refused = [response for response in asyncio.run(flood()) if response.status_code != 200]
    assert refused
    for response in refused:
        error = problem(response, 429)
        assert error["code"] == "rate_limit_exceeded" and int(response.headers["retry-after"]) >= 1


def test_a_tenants_own_limits(world: World) -> None:
    async def flood() -> list[int]:
        async with world.client() as client:
            body = {"prompt": "x", "steps": 30}
            found = await asyncio.gather(*(client.post("/v1/images/generations", json=body) for _ in range(6)))
            return [response.status_code for response in found]

    assert sorted(asyncio.run(flood())) == [200] * 4 + [429] * 2


def test_an_adapter_of_another_base_is_refused(world: World) -> None:
    world.upload("default", "rusty", 1)
    world.library.base_hash = "0" * 64
    assert problem(world.images(model="rusty"), 400)["code"] == "wrong_base"


def test_a_fault_tells_the_client_nothing_of_ours(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.library, "resolve", lambda *_: 1 / 0)
    error = problem(world.images(model="rusty"), 500)
    assert "division" not in error["message"] and error["type"] == "server_error"


# -- retries --


def test_an_idempotency_key_makes_a_request_once(world: World) -> None:
    async def twice() -> list[httpx.Response]:
        async with world.client() as client:
            headers = {"Idempotency-Key": "k1"}
            call = [
                client.post("/v1/images/generations", json={"prompt": "x", "steps": 3}, headers=headers)
                for _ in range(3)
            ]
            return await asyncio.gather(*call)

    found = asyncio.run(twice())
    assert len({response.text for response in found}) == 1
    assert world.loop.engine.stats.requests == 1

    # the event loop of a server lives on; the tests' does not, so the kept answer is asked for within one
    async def other() -> httpx.Response:
        async with world.client() as client:
            await client.post(
                "/v1/images/generations", json={"prompt": "x", "steps": 1}, headers={"Idempotency-Key": "k2"}
            )
            return await client.post("/v1/images/generations", json={"prompt": "y"}, headers={"Idempotency-Key": "k2"})

    assert problem(asyncio.run(other()), 422)["code"] == "idempotency_error"


# -- adapters --


def test_upload_show_list_replace_delete(world: World) -> None:
    data = save_adapter(random_adapter(world.base, 1))
    made = world.call("POST", "/v1/adapters", files={"file": data}, data={"id": "rusty", "trigger": "a sks dog"})
    assert made.status_code == 201, made.text
    shown = world.call("GET", "/v1/adapters/rusty").json()
    assert shown == made.json() and shown["rank"] == 4 and shown["card"]["sha256"] == shown["version"]
    assert shown["card"]["targets"] == ["to_k", "to_out.0", "to_q", "to_v"]
    assert [one["id"] for one in world.call("GET", "/v1/adapters").json()["data"]] == ["rusty"]
    models = world.call("GET", "/v1/models").json()
    assert [one["id"] for one in models["data"]] == ["tiny-epsilon-0", "tiny-epsilon-0:default/rusty"]
    assert world.call("GET", "/v1/models/tiny-epsilon-0:default/rusty").json() == models["data"][1]
    before = world.images(model="rusty").json()["data"][0]
    again = save_adapter(random_adapter(world.base, 2))
    assert world.call("POST", "/v1/adapters", files={"file": again}, data={"id": "rusty"}).status_code == 201
    after = world.images(model="rusty").json()["data"][0]
    assert after["adapters"][0]["version"] != shown["version"] and after["b64_json"] != before["b64_json"]
    old = world.images(model=f"rusty@{shown['version']}").json()["data"][0]
    assert old["b64_json"] == before["b64_json"]
    assert (
        world.call("POST", "/v1/adapters", files={"file": data}, data={"id": "rusty"}).json()["version"]
        == shown["version"]
    )
    assert world.images(model="rusty").json()["data"][0]["b64_json"] == before["b64_json"]
    gone = world.call("DELETE", "/v1/adapters/rusty")
    assert gone.json() == {"id": "rusty", "object": "adapter", "deleted": True}
    problem(world.images(model="rusty"), 404)
    problem(world.call("GET", "/v1/adapters/rusty"), 404)
    problem(world.call("DELETE", "/v1/adapters/rusty"), 404)


def _bad_files(base: Base) -> dict[str, tuple[bytes, str]]:
    good = random_adapter(base, 1)
    key, low = next(iter(good.modules.items()))
    tensors = {f"{key}.lora.down.weight": low.down, f"{key}.lora.up.weight": low.up}
    return {
        "not safetensors": (b"PK\x03\x04 a pickle", "safetensors"),
        "empty": (b"", "safetensors"),
        "no adapter": (save({"hello.weight": low.down, "world.weight": low.up}), "format"),
        "embedding": (save({"hello": low.down[:, :5].contiguous()}), "width 32"),
        "words": (save({"hello": torch.zeros(9, 32)}), "at most 8"),
        "unmatched": (
            save(
                {
                    **tensors,
                    "unet.nowhere.lora.down.weight": low.down.clone(),
                    "unet.nowhere.lora.up.weight": low.up.clone(),
                }
            ),
            "nowhere",
        ),
        "shape": (save({**tensors, f"{key}.lora.down.weight": low.down[:, :3].contiguous()}), key),
        "rank": (save_adapter(random_adapter(base, 1, rank=9)), "rank"),
        "infinite": (save({**tensors, f"{key}.lora.up.weight": low.up * float("inf")}), "infinite"),
        "half": (save({f"{key}.lora.down.weight": low.down}), key),
    }


def test_bad_uploads_are_refused_and_nothing_is_stored(world: World) -> None:
    for name, (data, part) in _bad_files(world.base).items():
        error = problem(world.call("POST", "/v1/adapters", files={"file": data}, data={"id": "bad"}), 400)
        assert part.lower() in error["message"].lower() and error["param"] == "file", (name, error)
    assert problem(world.call("POST", "/v1/adapters", files={"file": b"x"}, data={"id": "../x"}), 400)["param"] == "id"
    assert problem(world.call("POST", "/v1/adapters", data={"id": "x"}), 400)["param"] == "file"
    assert problem(world.call("POST", "/v1/adapters", files={"file": b"x" * 500_000}, data={"id": "x"}), 413)
    assert world.call("GET", "/v1/adapters").json()["data"] == []
    assert world.registry.storage.list() == []


def test_a_layer_that_the_server_does_not_adapt(world: World) -> None:
    key, low = next(iter(random_adapter(world.base, 1, targets=("conv_in",), text=False).modules.items()))
    narrow = world.spec.engine.model_copy(update={"targets": ("to_q",)})
    with pytest.raises(Exception, match="does not adapt"):
        world.library.upload("default", "x", save_adapter(Adapter({key: low})), narrow, public=False, trigger="")


def test_a_publication_is_followed_within_seconds_and_flights_finish_on_their_version(world: World) -> None:
    """Law 6, as the server sees it: another process publishes to the storage."""
    first = world.upload("default", "rusty", 1)

    async def story() -> tuple[dict[str, Any], dict[str, Any]]:
        async with world.client() as client:
            body = {"prompt": "a dog", "model": "rusty", "seed": 1}
            assert (await client.post("/v1/images/generations", json={**body, "steps": 1})).status_code == 200
            flight = asyncio.create_task(client.post("/v1/images/generations", json={**body, "steps": 50}))
            while not world.loop.engine.scheduler.running:
                await asyncio.sleep(0.005)
            other = Library(Registry(open_storage(world.spec.storage)), world.library.outline)
            data = save_adapter(random_adapter(world.base, 2))
            second = (
                await asyncio.to_thread(
                    lambda: other.upload("default", "rusty", data, world.spec.engine, public=False, trigger="")
                )
            ).version
            await asyncio.sleep(0.1)
            new = await client.post("/v1/images/generations", json={**body, "steps": 1})
            assert new.json()["data"][0]["adapters"][0]["version"] == second != first
            return (await flight).json(), new.json()

    flight, _ = asyncio.run(story())
    assert flight["data"][0]["adapters"][0]["version"] == first
    expected = world.images(model=f"rusty@{first}", steps=50).json()["data"][0]["b64_json"]
    assert abs(pixels(flight["data"][0]["b64_json"]) - pixels(expected)).max() <= 1


# -- tenants --


def test_keys(shared: World) -> None:
    for call in (
        lambda: shared.images(),
        lambda: shared.call("GET", "/v1/models"),
        lambda: shared.call("GET", "/sdapi/v1/loras"),
        lambda: shared.call("GET", "/v1/models", headers={"Authorization": "Bearer dfk_wrong"}),
    ):
        error = problem(call(), 401)
        assert error["type"] == "invalid_request_error" and error["code"] == "invalid_api_key"
    assert shared.call("GET", "/v1/models", "ann").status_code == 200
    basic = base64.b64encode(f"any:{shared.tokens['ann']}".encode()).decode()
    assert shared.call("GET", "/sdapi/v1/loras", headers={"Authorization": f"Basic {basic}"}).status_code == 200
    assert shared.call("GET", "/healthz").status_code == 200


def test_a_revoked_key_is_refused_at_once(shared: World) -> None:
    assert shared.keys is not None
    name = next(key.name for key in shared.keys.all() if key.tenant == "ann")
    assert shared.images("ann").status_code == 200
    shared.keys.revoke(name)
    problem(shared.images("ann"), 401)
    assert shared.images("bob").status_code == 200


def test_anothers_adapter_does_not_exist(shared: World) -> None:
    version = shared.upload("ann", "rusty", 1)
    assert shared.images("ann", model="rusty").status_code == 200
    for name in ("ann/rusty", f"ann/rusty@{version}", "rusty", "tiny-epsilon-0:ann/rusty"):
        stranger, missing = (
            shared.images("bob", model=name),
            shared.images("bob", model=name.replace("rusty", "nobody")),
        )
        assert problem(stranger, 404)["message"].replace("rusty", "nobody") == problem(missing, 404)["message"]
    problem(shared.images("bob", model="ann/rusty", stream=True), 404)
    problem(shared.images("bob", adapters=[{"id": "ann/rusty"}]), 404)
    problem(shared.call("POST", "/sdapi/v1/txt2img", "bob", json={"prompt": "x <lora:ann/rusty:1>"}), 404)
    problem(shared.call("GET", "/v1/adapters/ann/rusty", "bob"), 404)
    problem(shared.call("GET", "/v1/models/tiny-epsilon-0:ann/rusty", "bob"), 404)
    problem(shared.call("DELETE", "/v1/adapters/rusty", "bob"), 404)
    for path in ("/v1/adapters", "/v1/models", "/sdapi/v1/loras"):
        assert "rusty" not in shared.call("GET", path, "bob").text and "rusty" in shared.call("GET", path, "ann").text


def test_a_public_adapter_is_everybodys_to_use_and_its_owners_to_delete(shared: World) -> None:
    shared.upload("ann", "rusty", 1, public=True)
    mine = shared.images("ann", model="rusty").json()["data"][0]["b64_json"]
    assert (pixels(shared.images("bob", model="ann/rusty").json()["data"][0]["b64_json"]) == pixels(mine)).all()
    assert "ann/rusty" in shared.call("GET", "/v1/models", "bob").text
    problem(shared.call("DELETE", "/v1/adapters/rusty", "bob"), 404)
    assert shared.call("DELETE", "/v1/adapters/rusty", "ann").status_code == 200


def test_two_tenants_adapters_of_one_id(shared: World) -> None:
    shared.upload("ann", "rusty", 1)
    shared.upload("bob", "rusty", 2)
    found = {name: shared.images(name, model="rusty").json()["data"][0] for name in ("ann", "bob")}
    assert found["ann"]["b64_json"] != found["bob"]["b64_json"]
    assert found["bob"]["adapters"][0]["id"] == "bob/rusty"


def test_without_keys_only_this_machine_is_answered(world: World) -> None:
    async def rebound() -> httpx.Response:
        async with world.client(host="evil.example") as client:
            return await client.get("/v1/models")

    assert "localhost only" in problem(asyncio.run(rebound()), 401)["message"]


def test_keys_are_kept_hashed(shared: World, tmp_path: Path) -> None:
    text = (tmp_path / "keys.json").read_text()
    assert all(token not in text for token in shared.tokens.values())
    assert (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600


# -- what nobody says --


def test_a_request_that_says_little_gets_what_the_base_recommends(
    tiny: Base, tiny_folder: Path, tmp_path: Path, world: World
) -> None:
    facts = tiny.facts
    plain = {"prompt": "a dog"}
    other = World(tiny, tiny_folder, tmp_path / "other", keys=False, steps=3, guidance_scale=0.0, scheduler="euler")
    expected = {
        world: (facts.steps, facts.guidance_scale, facts.sampler),
        other: (3, 0.0, "euler"),
    }
    for one, settings in expected.items():
        intake = one.app.state.service.intake
        wanted = intake.images("default", ImagesBody.model_validate(plain), "1")
        assert (wanted.steps, wanted.guidance_scale, wanted.scheduler) == settings
        text = one.call("POST", "/sdapi/v1/txt2img", json={**plain, "seed": 1}).json()["info"]
        assert f"Steps: {settings[0]}, " in text and f"CFG scale: {settings[1]}" in text
    other.loop.close()


# -- AUTOMATIC1111 --


def test_txt2img_with_tags(world: World) -> None:
    world.upload("default", "rusty", 1)
    body = {"prompt": "a dog <lora:rusty:0.5>", "seed": 1, "steps": 2, "cfg_scale": 5, "sampler_name": "DPM++ 2M",
            "restore_faces": False, "override_settings": {}, "batch_size": 2}  # fmt: skip
    answer = world.call("POST", "/sdapi/v1/txt2img", json=body).json()
    info = json.loads(answer["info"])
    assert len(answer["images"]) == 2 and info["all_seeds"] == [1, 2]
    same = world.images(adapters=[{"id": "rusty", "weight": 0.5}], scheduler="dpm++_2m", n=2, guidance_scale=5.0)
    assert [one["b64_json"] for one in same.json()["data"]] == answer["images"]
    start = {"init_images": [answer["images"][0]], "prompt": "a dog", "steps": 4, "denoising_strength": 0.5}
    assert len(world.call("POST", "/sdapi/v1/img2img", json=start).json()["images"]) == 1


@pytest.mark.parametrize(
    ("prompt", "status"),
    [("<lora:ghost:1>", 404), ("<lora:rusty:heavy>", 400), ("<lora:../x:1>", 400), ("<lora:rusty:nan>", 400)],
)
def test_wrong_tags(world: World, prompt: str, status: int) -> None:
    problem(world.call("POST", "/sdapi/v1/txt2img", json={"prompt": prompt}), status)


def test_progress_and_interrupt(world: World) -> None:
    async def story() -> None:
        async with world.client() as client:
            assert (await client.get("/sdapi/v1/progress")).json()["progress"] == 0
            task = asyncio.create_task(client.post("/sdapi/v1/txt2img", json={"prompt": "a dog", "steps": 50}))
            seen: list[float] = []
            while not task.done() and len(seen) < 3:
                state = (await client.get("/sdapi/v1/progress")).json()
                if state["progress"] > 0:
                    seen.append(state["progress"])
                    assert state["current_image"]
                await asyncio.sleep(0.01)
            assert seen == sorted(seen) and seen
            await task
            long = asyncio.create_task(
                client.post("/sdapi/v1/txt2img", json={"prompt": "a dog", "steps": 50, "batch_size": 4})
            )
            await wait_for(lambda: bool(world.loop.engine.scheduler.running))
            await client.post("/sdapi/v1/interrupt")
            assert problem(await long, 499)["code"] == "interrupted"
            await wait_for(lambda: not world.loop.engine.jobs)

    asyncio.run(story())


async def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("never came true")


# -- operation --


def test_health_is_honest(world: World) -> None:
    assert world.call("GET", "/healthz").json() == {"status": "ok", "base": "tiny-epsilon-0"}
    world.loop.close()
    assert world.call("GET", "/healthz").status_code == 503
    assert problem(world.images(), 503)["code"] == "not_ready"


def test_metrics(world: World) -> None:
    world.upload("default", "rusty", 1)
    world.images(model="rusty")
    world.images(model="ghost")
    text = world.call("GET", "/metrics").text
    for line in (
        'dreamfleet_images_total{replica="local"} 1.0',
        'dreamfleet_steps_total{replica="local"} 2.0',
        'dreamfleet_rows_total{replica="local"} 4.0',
        'dreamfleet_http_requests_total{method="POST",route="/v1/images/generations",status="404"} 1.0',
        'dreamfleet_adapter_events_total{event="slot_loads",replica="local"} 1.0',
        'dreamfleet_stage_seconds_total{replica="local",stage="denoise"}',
        'dreamfleet_slots{replica="local"} 8.0',
    ):
        assert line in text, line
    assert "rusty" not in text and "ghost" not in text


def test_every_answer_has_a_request_id(world: World) -> None:
    assert world.call("GET", "/healthz", headers={"x-request-id": "abc"}).headers["x-request-id"] == "abc"
    odd = world.call("GET", "/nowhere", headers={"x-request-id": "a b\x01"}).headers["x-request-id"]
    assert len(odd) == 24


def test_openapi_is_complete(world: World) -> None:
    document = world.call("GET", "/openapi.json").json()
    body = document["components"]["schemas"]["ImagesBody"]
    assert body["examples"] and body["additionalProperties"] is False
    call = document["paths"]["/v1/images/generations"]["post"]
    assert {"200", "400", "401", "404", "413", "422", "429", "500", "503", "504"} <= set(call["responses"])
    assert "text/event-stream" in call["responses"]["200"]["content"]
    assert all(one.get("summary") for path in document["paths"].values() for one in path.values())
