"""What is added to Ray Serve's HTTP proxy, which still runs when the ingress has died.

Serve calls `guard` in the proxy's process if the environment variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names
it.
"""

import json
import logging

import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")  # the log of the process that this runs in
RETRY_AFTER_S = 2
_BODY = json.dumps(
    {
        "error": {
            "message": "The server is restarting a part of itself; try again.",
            "type": "server_error",
            "param": None,
            "code": "not_ready",
        }
    }
).encode()
_HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(_BODY)).encode()),
    (b"retry-after", str(RETRY_AFTER_S).encode()),
]


def guard() -> list[Middleware]:
    """Gives this process' HTTP server the timeouts of `serving.http.access`; returns the proxy's further middleware."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = "serving.http.access.timeouts:TimedProtocol"
    return [Middleware(LostIngress)]


class LostIngress:
    """Replies 503 in OpenAI's shape with `Retry-After` where Serve itself fails.

    The app's own replies are JSON, 5xx too, and pass unchanged.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = lost = False

        async def told(message: Message) -> None:
            nonlocal begun, lost
            if message["type"] == "http.response.start":
                lost = message["status"] >= 500 and not _is_json(message)
                begun = begun or not lost
            if not lost:
                await send(message)

        try:
            await self._app(scope, receive, told)
        except Exception:
            if begun:  # part of the reply has been sent: the connection can only be broken off
                raise
            logger.exception("the proxy failed")
        if not begun:
            await send({"type": "http.response.start", "status": 503, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": _BODY})


def _is_json(start: Message) -> bool:
    return any(name.lower() == b"content-type" and b"json" in value for name, value in start.get("headers", ()))
