"""The ControlNets and IP-Adapters that requests may name: `GET /v1/controls` and `GET /v1/ip-adapters`."""

import asyncio

from fastapi import APIRouter, Request

from serving.http.images import ERRORS
from serving.http.networks.wire import NetworkList
from serving.http.service import service_of
from training.storage.networks import NetworkKind

router = APIRouter(tags=["images"])


@router.get("/v1/controls", responses=ERRORS)
async def controls(request: Request) -> NetworkList:
    """All ControlNets on the storage and of the embedded bases; `usable` are those for this server's base."""
    return await _all(request, "control")


@router.get("/v1/ip-adapters", responses=ERRORS)
async def ip_adapters(request: Request) -> NetworkList:
    """All IP-Adapters on the storage; whether one fits is found out when it is loaded."""
    return await _all(request, "ip-adapter")


async def _all(request: Request, kind: NetworkKind) -> NetworkList:
    service = service_of(request)
    service.tenant(request)
    return NetworkList(data=await asyncio.to_thread(service.intake.library.networks.all, kind))
