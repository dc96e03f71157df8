"""`/v1/adapters/{id}/versions/{version}/export`: an adapter as a file for another program."""

import asyncio
import io
import zipfile
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from serving.http.adapters import AdapterId, Version
from serving.http.images import ERRORS
from serving.http.library import Library
from serving.http.service import service_of
from training.adapters.adapter import load_adapter
from training.adapters.formats.formats import Format, export_adapter, label_of

router = APIRouter(tags=["adapters"])


@router.get(
    "/v1/adapters/{id}/versions/{version}/export",
    response_class=Response,
    responses={
        200: {
            "content": {"application/octet-stream": {}, "application/zip": {}},
            "description": "the file; several files as a zip",
        },
        **ERRORS,
    },
)
async def export_version(
    request: Request,
    id: AdapterId,
    version: Version,
    format: Annotated[Format, Query(description="whose file it is to be")] = "diffusers",
) -> Response:
    """A version of an adapter of the caller in another program's format: diffusers, kohya, lora_diffusion or PEFT."""
    service = service_of(request)
    tenant = service.tenant(request)
    name, data = await asyncio.to_thread(_export, service.intake.library, tenant, id, version, format)
    kind = "application/zip" if name.endswith(".zip") else "application/octet-stream"
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "X-Content-Type-Options": "nosniff"}
    return Response(data, media_type=kind, headers=headers)


def _export(library: Library, tenant: str, id: str, version: str, format: Format) -> tuple[str, bytes]:
    """A file's name and content. Raises UnknownAdapter, CorruptAdapter, and AdapterError for what does not fit."""
    resolved, _ = library.files(tenant, id, version)
    adapter = load_adapter(library.registry.weights(resolved))
    if format in ("kohya", "ai_toolkit", "lora_diffusion"):  # these name or count the base's layers
        of = library.outline
        files = export_adapter(adapter, format, of.shapes, label_of(resolved.id, of.facts), of.names)
    else:
        files = export_adapter(adapter, format)
    if len(files) == 1:
        ((name, data),) = files.items()
        return (name if resolved.id in name else f"{resolved.id}-{name}"), data
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return f"{resolved.id}-{format}.zip", packed.getvalue()
