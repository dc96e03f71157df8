"""`/v1/files/{id}/captions`: what a model proposes as captions of uploaded photos, for a person to correct."""

import asyncio

from fastapi import APIRouter, Request

from fleet.http.bodies import CaptionsBody
from fleet.http.context import FleetContext, fleet_of
from fleet.http.files import FileId
from fleet.http.wire import CaptionInfo, CaptionPage
from serving.http.images import ERRORS
from serving.http.service import service_of

router = APIRouter(tags=["training"])


@router.post("/v1/files/{id}/captions", responses=ERRORS)
async def propose_captions(request: Request, id: FileId, body: CaptionsBody) -> CaptionPage:
    """Asks the configured model for a caption of each photo, in the words of the subject. Nothing is kept."""
    fleet, tenant = fleet_of(request), service_of(request).tenant(request)
    with fleet.captions.asked.one(tenant):
        return await asyncio.to_thread(_proposed, fleet, tenant, id, body)


def _proposed(fleet: FleetContext, tenant: str, id: str, body: CaptionsBody) -> CaptionPage:
    model = fleet.captions.model()
    photos = fleet.desk.files.photos(tenant, id, body.folder, body.names)
    found = fleet.captions.propose(body, photos)
    data = [CaptionInfo(name=one.name, caption=one.caption, error=one.problem) for one in found]
    return CaptionPage(model=model.name, data=data)
