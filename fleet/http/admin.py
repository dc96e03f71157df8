"""`/v1/tenants` and `/v1/keys`: what an admin may see and set."""

import asyncio
import secrets
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Path, Request

from fleet.http.account import KeyInfo, KeyPage, TenantInfo, TenantPage
from fleet.http.bodies import KeyBody, QuotaBody
from fleet.http.context import FleetContext, check_admin, fleet_of, key_of
from serving.http.access.tenants import Key, Keys, derived
from serving.http.images import ERRORS
from serving.http.once import Once, digest, id_once
from serving.http.problems import ApiError
from serving.http.service import service_of
from training.manifest.subject import ID_PATTERN
from training.run.accepted import waiting_of
from training.run.turns import TenantQuota, read_quotas, write_quota
from training.run.usage import month_used

router = APIRouter(tags=["admin"])
Tenant = Annotated[str, Path(pattern=rf"^{ID_PATTERN}$", max_length=63)]


@router.get("/v1/tenants", responses=ERRORS)
async def list_tenants(request: Request) -> TenantPage:
    """All tenants with their quotas and what they have used this month. For admins."""
    check_admin(request)
    return await asyncio.to_thread(_tenants, fleet_of(request), service_of(request).keys)


@router.put("/v1/tenants/{tenant}/quota", responses=ERRORS)
async def set_quota(request: Request, tenant: Tenant, body: QuotaBody) -> TenantInfo:
    """Sets what a tenant may take; what is left out is not bounded. For admins."""
    check_admin(request)
    fleet = fleet_of(request)
    quota = TenantQuota.model_validate(body.model_dump())
    await asyncio.to_thread(write_quota, fleet.board.storage, tenant, quota)
    return await asyncio.to_thread(_tenant, fleet, tenant, quota, 0.0)


@router.get("/v1/keys", responses=ERRORS)
async def list_keys(request: Request) -> KeyPage:
    """All keys, without their secrets. For admins."""
    keys = _keys(request)
    return KeyPage(data=[_shown(key) for key in await asyncio.to_thread(keys.all)])


@router.post("/v1/keys", responses=ERRORS)
async def make_key(request: Request, body: KeyBody, idempotency_key: Once = None) -> KeyInfo:
    """Makes a key; its secret is in this answer only, and in that to the same request again. For admins."""
    keys = _keys(request)
    expires = None if body.expires_at is None else datetime.fromtimestamp(body.expires_at, UTC)
    if expires is not None and expires <= datetime.now(UTC):
        raise ApiError(400, f"expires_at {body.expires_at} has passed.", param="expires_at")
    secret = await asyncio.to_thread(_secret, request, body, idempotency_key)
    scopes = tuple(dict.fromkeys(body.scopes))
    key, token = await asyncio.to_thread(keys.make, body.tenant, scopes, expires, secret)
    return _shown(key).model_copy(update={"key": token})


@router.delete("/v1/keys/{id}", responses=ERRORS)
async def revoke_key(request: Request, id: Annotated[str, Path(max_length=40)]) -> KeyInfo:
    """Revokes a key. For admins."""
    keys = _keys(request)
    if id not in {key.name for key in await asyncio.to_thread(keys.all)}:
        raise ApiError(404, f"No key '{id}'.", code="key_not_found")
    return _shown(await asyncio.to_thread(keys.revoke, id))


def _secret(request: Request, body: KeyBody, idempotency_key: str | None) -> str | None:
    """The token of a key that is made under an `Idempotency-Key`: the same request, sent again, has it again.

    It is made of the caller's own token, which the server does not keep, and of a random part, which the caller does
    not have: neither alone tells it. Raises KeyReused for another caller or another body.
    """
    if idempotency_key is None:
        return None
    service, caller = service_of(request), key_of(request)
    assert caller is not None  # `_keys` has checked
    asked = digest("key", caller.name, body.model_dump_json())
    part = id_once(fleet_of(request).board.storage, caller.tenant, idempotency_key, asked, secrets.token_hex(32))
    return derived(service.token(request), part)


def _keys(request: Request) -> Keys:
    """The server's keys. Raises ApiError: 403 for others than admins, 409 without keys."""
    check_admin(request)
    keys = service_of(request).keys
    if keys is None:
        raise ApiError(
            409, "The server was started without --keys: it has one tenant and no keys.", code="server_without_keys"
        )
    return keys


def _tenants(fleet: FleetContext, keys: Keys | None) -> TenantPage:
    fleet.usage.flush()
    used, quotas = month_used(fleet.board.storage), read_quotas(fleet.board.storage)
    names = {*used, *quotas, *(key.tenant for key in keys.all())} if keys else {*used, *quotas, "default"}
    return TenantPage(
        data=[_tenant(fleet, name, quotas.get(name, TenantQuota()), used.get(name, 0.0)) for name in sorted(names)]
    )


def _tenant(fleet: FleetContext, name: str, quota: TenantQuota, used: float) -> TenantInfo:
    return TenantInfo(
        id=name,
        quota=QuotaBody.model_validate(quota.model_dump()),
        waiting=waiting_of(fleet.board.storage, name),
        device_seconds=round(used, 1),
    )


def _shown(key: Key) -> KeyInfo:
    return KeyInfo(
        id=key.name,
        tenant=key.tenant,
        scopes=list(key.scopes),
        state="revoked" if key.revoked else "expired" if key.expired else "active",
        created=key.created,
        expires=key.expires,
    )
