"""Whatever a client sends to the fleet, within or beside the OpenAPI document: never a 5xx, and the answer is ours."""

import random
from typing import Any

import httpx

from tests.fleet.house import FAST, House
from tests.fleet.test_fleet_http import submit, upload
from tests.serving.http.test_fuzz import ODD, Draw, Schema

ROUNDS = 12
OURS = ("/v1/files", "/v1/fine_tuning", "/v1/runs", "/v1/usage", "/v1/fleet", "/v1/me", "/v1/tenants", "/v1/keys")


def test_no_body_and_no_path_makes_a_5xx(house: House) -> None:
    client = house.client()
    file = upload(client)
    long: Any = {"max_steps": 100_000}
    job = submit(client, house, file, hyperparameters=long).id
    known = {"id": [file, job, "ghost"], "subject": ["rusty"], "tenant": ["default"], "checkpoint": ["ftckpt-00000001"]}
    seen: dict[int, int] = {}
    with httpx.Client(base_url=house.url, timeout=60) as http:
        document = http.get("/openapi.json").json()
        paths = [path for path in document["paths"] if path.startswith(OURS)]
        assert len(paths) > 25
        for seed in range(ROUNDS):
            draw, choose = Draw(document, seed), random.Random(seed)
            for path in paths:
                for method, call in document["paths"][path].items():
                    answer = send(http, draw, choose, path, method, call, known)
                    told = (seed, method, path, answer.text[:300])
                    assert answer.status_code < 500, told
                    if answer.status_code >= 400:
                        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, told
                    seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
    assert seen[200] > 50 and seen[400] > 20 and seen[404] > 50


def send(
    http: httpx.Client,
    draw: Draw,
    choose: random.Random,
    path: str,
    method: str,
    call: Schema,
    known: dict[str, list[str]],
) -> httpx.Response:
    query: dict[str, Any] = {}
    for parameter in call.get("parameters", ()):
        name = parameter["name"]
        value = str(draw.value(parameter["schema"])).strip("/.\0") or "x"
        if parameter["in"] == "path":
            value = choose.choice(known[name]) if name in known and choose.random() < 0.7 else value
            path = path.replace(f"{{{name}}}", value)
        elif parameter["in"] == "query" and name != "stream" and choose.random() < 0.4:
            query[name] = value
    content = call.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        body = draw.value(content["application/json"]["schema"]) if path != "/v1/runs" else a_run(choose)
        if isinstance(body, dict) and "training_file" in body and choose.random() < 0.7:
            body["training_file"] = choose.choice(known["id"])
            body["method"] = {"type": "dreambooth_lora", "dreambooth_lora": odd_settings(choose)}
        return http.request(method, path, json=body, params=query)
    if "multipart/form-data" in content:
        data = choose.choice([b"", b"nothing", b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, b"ustar" * 200])
        return http.request(method, path, files={"file": ("x.zip", data)}, data={"purpose": "fine-tune"}, params=query)
    return http.request(method, path, params=query)


def odd_settings(choose: random.Random) -> Schema:
    """A subject's settings with something odd in them."""
    settings: Schema = {**FAST, "train": dict(FAST["train"]), "prior": dict(FAST["prior"])}
    where = choose.choice([settings, settings["train"], settings["prior"]])
    where[choose.choice([*where, "surprise"])] = choose.choice(ODD)
    return settings


def a_run(choose: random.Random) -> Any:
    """A body of a run, in which something is odd."""
    manifest: Any = {"version": 1, "name": "x", "subjects": [{"id": "a", "class": "dog", "images": "file-1"}]}
    where = choose.choice([manifest, manifest["subjects"][0]])
    where[choose.choice([*where, "defaults", "surprise"])] = choose.choice(ODD)
    return choose.choice([{"manifest": manifest}, {"manifest": choose.choice(ODD)}, choose.choice(ODD)])
