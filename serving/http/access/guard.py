"""Who may call, checked before any of a body is read: Host and Origin, then the key and its scopes.

A server without keys trusts every program on its machine, so it must guard against web pages in a browser there: any
page can send requests to a loopback address, and can make its own name resolve to it (DNS rebinding). Knows nothing
about what the routes do.
"""

import ipaddress
from contextlib import AbstractContextManager, ExitStack, nullcontext

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope as AsgiScope, Send

from serving.errors import Refused
from serving.http.access.tenants import Scope
from serving.http.history.links import SIGNED
from serving.http.problems import ApiError, describe
from serving.http.service import Service, service_of

OPEN = "/healthz"  # load balancers ask by address
KEYED = ("/v1/", "/sdapi/", "/controlnet/")
FREE = ("/v1/detect", "/v1/reports")  # no key is needed; one that is sent must be valid
UPLOAD = "/v1/adapters"
UPLOADS = (UPLOAD, "/v1/files")
TRAINING = ("/v1/adapters", "/v1/consents", "/v1/demo", "/v1/files", "/v1/fine_tuning", "/v1/runs")
ADMIN = ("/v1/tenants", "/v1/keys")
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """Refuses callers that are not allowed, and uploads beyond a tenant's quota."""

    def __init__(self, app: ASGIApp, cors: tuple[str, ...] = ()) -> None:
        self._app = app
        self._cors = frozenset(origin.lower() for origin in cors)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as stack:
            try:
                stack.enter_context(self._admit(Request(scope)))
            except (ApiError, Refused) as error:
                problem = describe(error)
                await JSONResponse(problem.body(), problem.status, headers=problem.headers)(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _admit(self, request: Request) -> AbstractContextManager[None]:
        """A context manager that counts the request while it runs. Raises ApiError, QueueFull."""
        service, path = service_of(request), request.scope["path"]
        if path == OPEN:
            return nullcontext()
        self._check_page(service, request)
        if not path.startswith(KEYED) or path.startswith(SIGNED) and request.method in _READING:
            return nullcontext()
        if path in FREE and request.method == "POST":
            service.caller(request)
            return nullcontext()
        tenant = service.tenant(request, needed(request.method, path))
        return service.quota.upload(tenant) if request.method == "POST" and path in UPLOADS else nullcontext()

    def _check_page(self, service: Service, request: Request) -> None:
        """Raises ApiError for a web page of an origin that is neither this server's nor in `cors`."""
        host = request.headers.get("host", "").lower()
        if service.keys is None and not is_loopback(_name(host)):
            raise ApiError(
                401,
                f"This server has no keys, so it replies to localhost only, not to '{host[:100]}'. Make keys with "
                "`dreamfleet keys make TENANT --keys FILE` and start it with `--keys FILE`.",
                code="invalid_api_key",
            )
        vouched = service.keys is None or request.headers.get("authorization", "").lower().startswith("basic ")
        origin = request.headers.get("origin", "").lower()
        foreign = origin != "" and _address(origin.partition("://")[2]) != _address(host)
        foreign = foreign or request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if vouched and foreign and origin not in self._cors and request.method not in _READING:
            raise ApiError(
                403,
                f"A web page of '{origin[:100] or 'another site'}' may not change anything on this server. To allow "
                "it, name its origin in the server's `cors` setting.",
                code="origin_not_allowed",
            )


def needed(method: str, path: str) -> Scope | None:
    """The scope that a call needs; None: any key will do."""
    if path.startswith(ADMIN):
        return "admin"
    if method in _READING:
        return None
    return "train" if path.startswith(TRAINING) else "images"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """The name in a Host header: without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _address(host: str) -> str:
    """A host with its port, as it is written where the port is the usual one."""
    return host.removesuffix(":80").removesuffix(":443")
