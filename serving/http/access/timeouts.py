"""How long a client may take to send a request: headers within seconds, a body at a minimum speed.

Without them a client could open connections, send nothing and keep them for ever. Waiting for a reply has no limit
here; the engine ends a request at its deadline.
"""

import asyncio

import h11
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 15.0  # from the first byte, or from the connection, to the last header
BODY_S = 30.0  # seconds a body may take,
BODY_BYTES_PER_S = 16 * 1024  # and one more for each of so many bytes received


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, which closes a connection whose request headers do not come.

    Between requests uvicorn's own keep-alive holds; h11 bounds the headers' size.
    """

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: its headers are expected in time."""
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Bytes have come: a request's headers, a body, or both."""
        super().data_received(data)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed: nothing is expected."""
        super().connection_lost(exc)
        self._stop()

    def _await_headers(self) -> None:
        """Starts the timer of the headers, and stops it when they are complete; a part of them does not restart it."""
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._overdue is None:
            self._overdue = self.loop.call_later(HEADERS_S, self._close)

    def _close(self) -> None:
        self._overdue = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()

    def _stop(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None


class _TooSlow(HTTPException):
    """Raised while a body is read; the frameworks between pass HTTPExceptions on."""


class BodyTimeout:
    """Refuses with 408 a request whose body comes too slowly."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        clock = asyncio.get_running_loop().time
        began, came, whole = clock(), 0, False

        async def timed() -> Message:
            nonlocal came, whole
            if whole:  # after the body comes only the disconnect
                return await receive()
            try:
                async with asyncio.timeout_at(began + BODY_S + came / BODY_BYTES_PER_S):
                    message = await receive()
            except TimeoutError:
                told = f"The body came too slowly: {came} bytes in {clock() - began:.0f} s. Send it faster, or smaller."
                raise _TooSlow(408, told, headers={"Connection": "close"}) from None
            came += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            return message

        await self._app(scope, timed, send)
