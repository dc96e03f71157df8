"""Training over HTTP with OpenAI's own client: files, jobs, events, checkpoints, and pictures of what was trained."""

import io
import json
import zipfile
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.fleet.house import FAST, House, photos, wait_for
from training.evaluation.judges.faces import DlibFace

METHOD: dict[str, Any] = {"type": "dreambooth_lora", "dreambooth_lora": FAST}


def upload(client: openai.OpenAI, seed: int = 0, count: int = 5, folder: str = "") -> str:
    return client.files.create(file=("rusty.zip", photos(count, seed, folder)), purpose="fine-tune").id


def submit(client: openai.OpenAI, house: House, file: str, id: str = "rusty", **more: Any) -> Any:
    method: Any = METHOD
    return client.fine_tuning.jobs.create(model=house.base, training_file=file, suffix=id, method=method, **more)


def test_from_photos_to_a_picture_with_openais_client(house: House) -> None:
    client = house.client()
    job = submit(client, house, upload(client), seed=3, metadata={"who": "me"})
    assert (job.status, job.object, job.seed, job.metadata) == ("queued", "fine_tuning.job", 3, {"who": "me"})
    job = wait_for(client, job.id, "succeeded", "failed")
    assert (job.status, job.fine_tuned_model) == ("succeeded", f"{house.base}:default/rusty")
    image = client.images.generate(
        model=job.fine_tuned_model, prompt="a photo of sks dog", extra_body={"steps": 2, "seed": 1}
    )
    assert image.data and image.data[0].b64_json
    loads = house.service.loop.stats().adapters["host_loads"]
    assert house.service.loop.stats().adapters["host_hits"] >= 1 and loads == 1  # it was there before it was asked for

    events = client.fine_tuning.jobs.list_events(job.id).data
    assert "published" in events[0].message and events[0].object == "fine_tuning.job.event"
    assert any(event.type == "metrics" and event.data for event in events)
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [one.step_number for one in checkpoints] == [6, 3]
    assert {"likeness", "fidelity", "balance"} <= set(checkpoints[0].metrics.model_dump())
    assert [one.id for one in client.fine_tuning.jobs.list(metadata={"who": "me"})] == [job.id]
    assert list(client.fine_tuning.jobs.list(metadata={"who": "you"})) == []

    (other,) = [one for one in checkpoints if not one.model_dump()["current"]]
    served = house.registry.resolve("default/rusty").version
    path = f"/fine_tuning/jobs/{job.id}/checkpoints/{other.id}"
    shown: Any = client.post(f"{path}/publish", cast_to=object)
    assert shown["kept"] and not shown["current"] and house.registry.resolve("default/rusty").version == served
    same: dict[str, Any] = {"prompt": "a photo of sks dog", "extra_body": {"steps": 2, "seed": 1}}
    assert client.images.generate(model=shown["fine_tuned_model_checkpoint"], **same).data != image.data
    key = f"runs/{job.id}/subjects/rusty/checkpoints/{other.step_number:08d}.safetensors"
    weights = house.storage.get(key)
    house.storage.delete(key)
    house.registry.remove_version("default", "rusty", shown["version"])
    with pytest.raises(openai.ConflictError, match=r"step 3 .* not kept.*keep_checkpoints.*Kept are: 6"):
        client.post(f"{path}/publish", cast_to=object)
    lost: Any = client.fine_tuning.jobs.checkpoints.list(job.id).data[1].model_dump()
    assert not lost["kept"] and lost["version"] is None and lost["metrics"]["likeness"] is not None
    house.storage.put(key, weights)
    client.post(f"/fine_tuning/jobs/{job.id}/checkpoints/{other.id}/current", cast_to=object)
    now = {one.id: one.model_dump() for one in client.fine_tuning.jobs.checkpoints.list(job.id)}
    assert now[other.id]["current"] and now[other.id]["fine_tuned_model_checkpoint"]
    again = client.post(f"/fine_tuning/jobs/{job.id}/checkpoints/{checkpoints[0].id}/current", cast_to=object)
    assert dict(again)["current"] is True  # type: ignore[call-overload]
    assert house.registry.resolve("default/rusty").version == served  # the same step is the same version


def test_an_upload_is_checked_at_once(house: House) -> None:
    client = house.client()
    buffer = io.BytesIO(photos(3))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("bad.png", b"no picture")
        archive.writestr("copy.png", archive.read("0.png"))
        archive.writestr("0.txt", "a photo of sks dog on the grass")
        archive.writestr("__MACOSX/._0.png", b"junk")
        archive.writestr("../../escape.png", archive.read("1.png"))
    found = client.files.create(file=("dog.zip", buffer.getvalue()), purpose="fine-tune").model_dump()
    (root,) = found["subjects"]
    assert (root["photos"], root["captions"]) == (5, 1)
    assert root["problems"] == [{"name": "bad.png", "reason": "not an image"}] or "bad.png" in str(root["problems"])
    assert {"identical", "few"} <= {one["kind"] for one in root["warnings"]}
    assert DlibFace.is_installed() or "needs the extra `faces`" in found["unchecked"][0]
    answer = httpx.post(f"{house.url}/v1/files/{found['id']}/captions", json={"class": "dog"})
    assert answer.status_code == 409 and "--caption-model FOLDER" in answer.json()["error"]["message"]
    assert client.files.retrieve(found["id"]).filename == "dog.zip"
    assert [one.id for one in client.files.list(purpose="fine-tune")] == [found["id"]]
    with zipfile.ZipFile(io.BytesIO(client.files.content(found["id"]).read())) as archive:
        assert "0.txt" in archive.namelist() and "escape.png" in archive.namelist()
    with pytest.raises(openai.BadRequestError, match="Too few photos"):
        few = client.files.create(file=("few.zip", photos(2)), purpose="fine-tune").id
        submit(client, house, few)
    assert client.files.delete(found["id"]).deleted
    with pytest.raises(openai.NotFoundError, match="No file"):
        client.files.retrieve(found["id"])


@pytest.mark.parametrize(
    "data, said",
    [
        (b"no archive", "neither a zip nor a tar"),
        (b"PK\x03\x04 broken", "neither a zip nor a tar"),
        (b"", "neither a zip nor a tar"),
    ],
)
def test_what_is_no_archive_is_refused_in_words(house: House, data: bytes, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        house.client().files.create(file=("x.zip", data), purpose="fine-tune")


def test_a_job_that_cannot_be_trained_is_refused_before_it_is_accepted(house: House) -> None:
    client = house.client()
    file = upload(client)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"method": {"type": "dreambooth_lora"}}, "`class` is missing"),
        ({"hyperparameters": {"stepz": 3}}, "Unknown hyperparameter 'stepz'"),
        ({"method": {"type": "dreambooth_lora", "dreambooth_lora": {**FAST, "lora": {"rank": 64}}}}, "does not take"),
        ({"method": {"type": "dreambooth_lora", "dreambooth_lora": {**FAST, "trian": {}}}}, "Did you mean 'train'"),
        ({"training_file": "file-0123"}, "No file"),
        ({"model": "sd9"}, "not on 'sd9'"),
        ({"suffix": "No Good"}, "suffix"),
        ({"priority": 1000}, "priority"),
        ({"hyperparameters": {"batch_size": json.loads("[" * 900 + "]" * 900)}}, "nested"),
        (
            {"method": {"type": "dreambooth_lora", "dreambooth_lora": {"class": json.loads("[" * 900 + "]" * 900)}}},
            "nested",
        ),
    ]
    for change, said in wrong:
        body = {"model": house.base, "training_file": file, "suffix": "rusty", "method": METHOD, **change}
        answer = httpx.post(f"{house.url}/v1/fine_tuning/jobs", json=body)
        assert answer.status_code in (400, 404), answer.text
        assert said in answer.json()["error"]["message"]
    assert list(client.fine_tuning.jobs.list()) == [] and not house.storage.list("runs")


def test_the_same_key_makes_one_job(house: House) -> None:
    client = house.client()
    file = upload(client)
    first = submit(client, house, file, extra_headers={"Idempotency-Key": "once"})
    again = submit(client, house, file, extra_headers={"Idempotency-Key": "once"})
    assert first.id == again.id
    with pytest.raises(openai.UnprocessableEntityError):
        submit(client, house, file, id="other", extra_headers={"Idempotency-Key": "once"})
    assert len(list(client.fine_tuning.jobs.list())) == 1


def test_pause_resume_and_cancel(house: House) -> None:
    client = house.client()
    long: Any = {"max_steps": 100_000}
    file = upload(client)
    job = submit(client, house, file, hyperparameters=long)
    wait_for(client, job.id, "running")
    assert client.fine_tuning.jobs.pause(job.id).status in ("paused", "running")
    wait_for(client, job.id, "paused")
    client.fine_tuning.jobs.resume(job.id)
    wait_for(client, job.id, "running")
    with pytest.raises(openai.ConflictError, match="is used by"):
        client.files.delete(file)
    client.fine_tuning.jobs.cancel(job.id)
    wait_for(client, job.id, "cancelled")
    with pytest.raises(openai.ConflictError, match="has ended"):
        client.fine_tuning.jobs.cancel(job.id)
    client.files.delete(file)


def test_a_whole_manifest_and_its_events(house: House) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for seed, folder in enumerate(("rusty", "tabby")):
            with zipfile.ZipFile(io.BytesIO(photos(5, seed))) as inner:
                for name in inner.namelist():
                    archive.writestr(f"images/{folder}/{name}", inner.read(name))
    manifest = {
        "version": 1,
        "name": "pets",
        "base": house.base,
        "defaults": FAST,
        "subjects": [{"id": "rusty", "images": "images/rusty"}, {"id": "tabby", "images": "images/tabby"}],
    }
    form = {"manifest": yaml.safe_dump(manifest)}
    answer = httpx.post(f"{house.url}/v1/runs", data=form, files={"photos": ("p.zip", buffer.getvalue())}, timeout=60)
    assert answer.status_code == 200, answer.text
    run = answer.json()
    assert run["id"].startswith("pets-") and sum(run["counts"].values()) == 2
    with httpx.stream("GET", f"{house.url}/v1/runs/{run['id']}/events?stream=true", timeout=120) as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    told = [json.loads(line[6:])["message"] for line in lines[:-1]]
    assert sum("published" in line for line in told) == 2
    assert httpx.get(f"{house.url}/v1/runs/{run['id']}").json()["status"] == "done"
    subjects = httpx.get(f"{house.url}/v1/runs/{run['id']}/subjects").json()["data"]
    assert [(one["id"], one["status"]) for one in subjects] == [("rusty", "succeeded"), ("tabby", "succeeded")]
    assert [one["id"] for one in httpx.get(f"{house.url}/v1/runs").json()["data"]] == [run["id"]]
    usage = httpx.get(f"{house.url}/v1/usage").json()
    assert usage["total"]["training_steps"] == 12 and usage["total"]["device_seconds"] > 0


@pytest.mark.parametrize("images", ["/etc", "s3://bucket/photos", "storage:files/default", "file:///etc"])
def test_a_manifest_reads_uploads_only(house: House, images: str) -> None:
    manifest = {
        "version": 1,
        "name": "x",
        "base": house.base,
        "subjects": [{"id": "a", "class": "dog", "images": images}],
    }
    answer = httpx.post(f"{house.url}/v1/runs", json={"manifest": manifest})
    assert answer.status_code == 400 and "give the id of an uploaded file" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "manifest, said",
    [
        ("a: &a [1, 1]\nb: [*a, *a]", "aliases"),
        ("[" * 5000, "nested"),
        ("a: [1", "not valid YAML"),
        ({"a": json.loads("[" * 900 + "]" * 900)}, "nested"),
        ("x" * 2_000_001, "2000000"),
    ],
)
def test_a_manifest_that_would_take_the_server_down_is_refused(house: House, manifest: Any, said: str) -> None:
    answer = httpx.post(f"{house.url}/v1/runs", json={"manifest": manifest}, timeout=60)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text


def test_what_is_another_tenants_does_not_exist(two: House) -> None:
    ann, bob = two.client("ann"), two.client("bob")
    file = upload(ann)
    job = submit(ann, two, file)
    for call in (
        lambda: bob.files.retrieve(file),
        lambda: bob.files.delete(file),
        lambda: bob.files.content(file),
        lambda: submit(bob, two, file),
        lambda: bob.fine_tuning.jobs.retrieve(job.id),
        lambda: bob.fine_tuning.jobs.cancel(job.id),
        lambda: bob.fine_tuning.jobs.list_events(job.id),
        lambda: bob.fine_tuning.jobs.checkpoints.list(job.id),
        lambda: bob.get(f"/fine_tuning/jobs/{job.id}/samples", cast_to=object),
        lambda: bob.get(f"/runs/{job.id}", cast_to=object),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert list(bob.files.list()) == [] and list(bob.fine_tuning.jobs.list()) == []
    wait_for(ann, job.id, "succeeded")
    seen = httpx.get(f"{two.url}/v1/fleet", headers={"Authorization": f"Bearer {two.tokens['bob']}"}).json()
    assert all(lane["subjects"] == [] for lane in seen["lanes"])
    usage = httpx.get(f"{two.url}/v1/usage", headers={"Authorization": f"Bearer {two.tokens['bob']}"}).json()
    assert usage["data"] == []


def test_scopes_quotas_and_admins(two: House) -> None:
    def call(method: str, path: str, token: str, **rest: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}", **rest.pop("headers", {})}
        return httpx.request(method, f"{two.url}{path}", headers=headers, **rest)

    drawing = two.admin("ann", ("images",))
    assert call("GET", "/v1/files", drawing).status_code == 200
    assert call("POST", "/v1/fine_tuning/jobs", drawing, json={}).status_code == 403
    ann, admin = two.tokens["ann"], two.admin("ann")
    for path in ("/v1/tenants", "/v1/keys"):
        assert call("GET", path, ann).status_code == 403
    assert call("PUT", "/v1/tenants/ann/quota", admin, json={"waiting": 1}).status_code == 200
    tenants = {one["id"]: one for one in call("GET", "/v1/tenants", admin).json()["data"]}
    assert set(tenants) == {"ann", "bob"} and tenants["ann"]["quota"]["waiting"] == 1
    client = two.client("ann")
    file = upload(client)
    long: Any = {"max_steps": 100_000}
    job = submit(client, two, file, hyperparameters=long)
    with pytest.raises(openai.RateLimitError, match="at most 1 may be"):
        submit(client, two, file, id="second")
    with pytest.raises(openai.PermissionDeniedError):
        submit(client, two, file, id="second", extra_body={"priority": 5})
    client.fine_tuning.jobs.cancel(job.id)
    made = call("POST", "/v1/keys", admin, json={"tenant": "carl", "scopes": ["images"]}).json()
    assert call("GET", "/v1/me", made["key"]).json()["tenant"] == "carl"
    once: dict[str, Any] = {"json": {"tenant": "carl", "scopes": ["images"]}, "headers": {"Idempotency-Key": "one"}}
    first, again = (call("POST", "/v1/keys", admin, **once).json() for _ in range(2))
    assert first == again and call("GET", "/v1/me", again["key"]).json()["key"] == first["id"] != made["id"]
    assert call("POST", "/v1/keys", two.admin("ann"), **once).status_code == 422  # another admin's
    kept = b"".join(two.storage.get(key) for key in two.storage.list("idempotency"))
    assert first["key"].encode() not in kept and len(call("GET", "/v1/keys", admin).json()["data"]) == 7
    assert call("DELETE", f"/v1/keys/{made['id']}", admin).json()["state"] == "revoked"
    assert call("GET", "/v1/me", made["key"]).status_code == 401
