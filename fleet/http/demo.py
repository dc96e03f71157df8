"""`POST /v1/demo`: the subjects that come with dreamfleet, trained like anybody's: for a look at it without photos."""

import asyncio
import io
import zipfile
from pathlib import Path
from typing import Any

import yaml
from fastapi import APIRouter, Request

from fleet.http.bodies import RunBody
from fleet.http.context import fleet_of
from fleet.http.wire import RunInfo
from fleet.showing import run_info
from serving.http.images import ERRORS
from serving.http.once import Once
from serving.http.problems import ApiError
from serving.http.service import service_of

router = APIRouter(tags=["training"])
FOLDER = Path(__file__).resolve().parents[2] / "manifests" / "demo"
SAMPLE_EVERY = 50  # steps: somebody looks on


@router.post("/v1/demo", responses=ERRORS)
async def train_demo(request: Request, idempotency_key: Once = None) -> RunInfo:
    """Submits the demo's manifest with its photos, as a run of the caller. Only for the base that it is made for."""
    fleet, tenant = fleet_of(request), service_of(request).tenant(request)
    manifest, photos = await asyncio.to_thread(_demo, fleet.desk.name)
    key = None if idempotency_key is None else f"{idempotency_key} photos"
    file = await asyncio.to_thread(fleet.desk.files.add, tenant, "demo.zip", photos, key)
    manifest["defaults"]["train"].setdefault("sample_every", SAMPLE_EVERY)
    for subject in manifest["subjects"]:
        subject["images"] = f"{file.id}/{subject['id']}"
    look = await asyncio.to_thread(
        fleet.desk.submit_run, tenant, RunBody.model_validate({"manifest": manifest}), idempotency_key
    )
    return run_info(look, await asyncio.to_thread(fleet.board.standing))


def _demo(base: str) -> tuple[dict[str, Any], bytes]:
    """The demo's manifest, and a zip with a folder of photos for each of its subjects. Raises ApiError 404."""
    try:
        manifest = yaml.safe_load((FOLDER / "manifest.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ApiError(
            404, "This installation comes without the demo's photos; they are in the repository.", code="no_demo"
        ) from None
    if manifest["base"] != base:
        raise ApiError(
            404,
            f"The demo's subjects are drawn for the base '{manifest['base']}'; this fleet has '{base}'.",
            code="no_demo",
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for subject in manifest["subjects"]:
            for file in sorted((FOLDER / subject["images"]).iterdir()):
                archive.write(file, f"{subject['id']}/{file.name}")
    return manifest, buffer.getvalue()
