"""Whatever a client sends within or beside the OpenAPI document, the answer is never a 500 and always ours.

Bodies are drawn from the document itself: right types at their edges, wrong types, missing and unknown fields.
"""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.http.test_api import World
from training.base.base import Base

Schema = dict[str, Any]
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**63,
    1.5,
    1e308,
    "",
    "x",
    "\0",
    "💥" * 50,
    "../..",
    [],
    [None],
    {},
    {"id": 1},
)
ROUNDS = 20


@pytest.fixture(scope="module")
def world(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=False)
    world.upload("default", "rusty", 1)
    yield world
    world.loop.close()


class Draw:
    """Values of a schema, mostly right."""

    def __init__(self, document: Schema, seed: int) -> None:
        self._document = document
        self._choose = random.Random(seed)

    def value(self, schema: Schema) -> Any:
        choose = self._choose
        if choose.random() < 0.1:
            return choose.choice(ODD)
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return self.value(self._document["components"]["schemas"][name])
        if "anyOf" in schema:
            return self.value(choose.choice(schema["anyOf"]))
        if "enum" in schema or "const" in schema:
            return choose.choice(schema.get("enum", [schema.get("const")]))
        return getattr(self, f"_{schema.get('type', 'string')}")(schema)

    def _object(self, schema: Schema) -> Schema:
        wanted = {
            name: self.value(field)
            for name, field in schema.get("properties", {}).items()
            if name in schema.get("required", ()) or self._choose.random() < 0.3
        }
        if self._choose.random() < 0.1:
            wanted["surprise"] = 1
        return wanted

    def _array(self, schema: Schema) -> list[Any]:
        return [self.value(schema.get("items", {})) for _ in range(self._choose.randint(0, 3))]

    def _integer(self, schema: Schema) -> int:
        low, high = schema.get("minimum", 0), schema.get("maximum", 64)
        return self._choose.choice((low, high, self._choose.randint(low, min(high, low + 8)), low - 1, high + 1))

    def _number(self, schema: Schema) -> float:
        return self._choose.choice((0.0, 0.5, 1.0, 7.5, -1.0, 1e9))

    def _string(self, schema: Schema) -> str:
        return self._choose.choice(
            ("a dog", "rusty", "default/rusty", "ghost", "16x16", "8x24", "auto", "<lora:rusty:1>", "AAAA")
        )

    def _boolean(self, schema: Schema) -> bool:
        return self._choose.random() < 0.5

    def _null(self, schema: Schema) -> None:
        return None


def test_no_body_and_no_path_makes_a_500(world: World) -> None:
    document = world.call("GET", "/openapi.json").json()

    async def story() -> dict[int, int]:
        seen: dict[int, int] = {}
        async with world.client() as client:
            for seed in range(ROUNDS):
                draw = Draw(document, seed)
                for path, calls in document["paths"].items():
                    for method, call in calls.items():
                        answer = await _send(client, draw, path, method, call)
                        told = (seed, method, path, answer.text[:300])
                        assert answer.status_code < 500, told
                        if answer.status_code >= 400:
                            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, told
                        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        return seen

    seen = asyncio.run(story())
    assert seen[200] > 50 and seen[400] > 30 and seen[404] > 5  # it does reach behind the validation


async def _send(client: httpx.AsyncClient, draw: Draw, path: str, method: str, call: Schema) -> httpx.Response:
    for parameter in call.get("parameters", ()):
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", str(draw.value(parameter["schema"])).strip("/.\0") or "x")
    content = call.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        body = draw.value(content["application/json"]["schema"])
        if isinstance(body, dict) and isinstance(body.get("steps"), int):
            body["steps"] = min(body["steps"], 3)  # enough to see a fault, and quick
        return await client.request(method, path, json=body)
    if "multipart/form-data" in content:
        return await client.request(
            method, path, files={"file": b"nothing"}, data={"id": str(draw.value({"type": "string"}))}
        )
    return await client.request(method, path)
