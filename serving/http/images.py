"""`POST /v1/images/generations`: OpenAI's images call, whole or as server-sent events."""

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serving.engine.pictures.codec import measure
from serving.engine.request import Event, FinishedPicture, GenerateRequest
from serving.errors import GenerationFailed
from serving.http.intake import usage_of, used
from serving.http.library import Library
from serving.http.problems import describe
from serving.http.replies import Replies
from serving.http.service import Service, request_id, service_of, unless_gone
from serving.http.wire import CompletedImage, ErrorAnswer, ImageData, ImagesAnswer, ImagesBody, PartialImage

router = APIRouter(tags=["images"])
EventKind = Literal["image_generation", "image_edit"]  # what stream events are called by
HEAD_START_S = 1.0  # an error within so many seconds is an HTTP status, also of a stream
KEEP_ALIVE_S = 10.0
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "a field is wrong; `param` names it",
        401: "no or wrong key",
        403: "the key lacks a scope, or a web page of another origin asks",
        404: "unknown model or adapter",
        405: "the path allows other methods; see `Allow`",
        410: "an adapter was withdrawn: consent was taken back, or the operator took it off",
        409: "the version is the one that is served",
        413: "the body is too large",
        422: "the adapter cannot be loaded, or the idempotency key was used for another request",
        429: "too much is waiting, see `Retry-After`; or a quota is used up (`insufficient_quota`)",
        499: "the call was interrupted",
        500: "a fault of the server",
        503: "starting or draining",
        504: "not done within the deadline",
    }.items()
}
STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


@router.post(
    "/v1/images/generations",
    response_model=ImagesAnswer,
    responses={200: {"content": STREAM, "description": "the images, or their events with `stream`"}, **ERRORS},
)
async def generate_images(
    request: Request,
    body: ImagesBody,
    idempotency_key: Annotated[
        str | None, Header(max_length=255, description="a request with the same key is made once")
    ] = None,
) -> Response:
    """Makes images of a prompt, wearing any mix of adapters."""
    service = service_of(request)
    tenant = service.tenant(request)
    wanted = await asyncio.to_thread(service.intake.images, tenant, body, request_id(request))
    digest = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
    return await respond(request, service, wanted, body, idempotency_key, digest, "image_generation")


async def respond(
    request: Request,
    service: Service,
    wanted: GenerateRequest,
    body: ImagesBody,
    idempotency_key: str | None,
    digest: str,
    kind: EventKind,
) -> Response:
    """The images that are wanted, or their events. `digest`: of all that was sent, for replies by key."""
    if body.stream:
        return await _streamed(request, service, wanted, body, kind)
    site = str(request.base_url)
    if idempotency_key is None:
        return await _answer(await unless_gone(request, _collect(service, wanted)), wanted, body, service, site)

    async def make() -> Response:
        return await _answer(await _collect(service, wanted), wanted, body, service, site)

    replies: Replies[Response] = request.app.state.replies
    return await unless_gone(request, replies.once(wanted.tenant, idempotency_key, digest, make))


async def _collect(service: Service, wanted: GenerateRequest) -> list[FinishedPicture]:
    async with aclosing(service.events(wanted)) as events:
        pictures = [event async for event in events if isinstance(event, FinishedPicture)]
    if len(pictures) != wanted.count:
        raise GenerationFailed(f"{len(pictures)} of {wanted.count} images came.")
    return sorted(pictures, key=lambda picture: picture.index)


async def _answer(
    pictures: list[FinishedPicture], wanted: GenerateRequest, body: ImagesBody, service: Service, site: str
) -> Response:
    linked = wanted.linked
    data = [
        ImageData(
            id=picture.history_id,
            b64_json=None if linked else base64.b64encode(picture.data).decode(),
            url=await asyncio.to_thread(service.keeper.link, picture, wanted, site) if linked else None,
            seed=picture.seed,
            adapters=used(wanted),
            revised_prompt=wanted.prompt if wanted.prompt != body.prompt else None,
        )
        for picture in pictures
    ]
    answer = ImagesAnswer(
        created=int(time.time()),
        data=data,
        model=body.model or service.intake.library.base,
        size=_size_of(pictures[0].data),
        output_format=wanted.output_format,
        usage=usage_of(wanted, service.intake.library, range(wanted.count)),
    )
    return JSONResponse(answer.model_dump(mode="json"))


def _size_of(data: bytes) -> str:
    return "x".join(map(str, measure(data, "picture")))


async def _streamed(
    request: Request, service: Service, wanted: GenerateRequest, body: ImagesBody, kind: EventKind
) -> Response:
    """Starts the work; what fails at once is an HTTP error, what fails later an event."""
    events = service.events(wanted)
    first = asyncio.ensure_future(anext(events))
    try:
        await unless_gone(request, asyncio.wait({first}, timeout=HEAD_START_S))
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        await asyncio.wait({first})
        await events.aclose()
        raise
    return StreamingResponse(
        _server_sent(first, events, wanted, service.intake.library, body.prompt, kind),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store"},
    )


async def _server_sent(
    first: "asyncio.Task[Event]",
    events: AsyncGenerator[Event, None],
    wanted: GenerateRequest,
    library: Library,
    prompt: str,
    kind: EventKind,
) -> AsyncGenerator[bytes, None]:
    pending = first
    try:
        while True:
            await asyncio.wait({pending}, timeout=KEEP_ALIVE_S)
            if not pending.done():
                yield b": still working\n\n"
                continue
            try:
                event = pending.result()
            except StopAsyncIteration:
                return
            name, data = _as_event(event, wanted, library, prompt, kind)
            yield f"event: {name}\ndata: {data}\n\n".encode()
            pending = asyncio.ensure_future(anext(events))
    except Exception as error:
        yield f"event: error\ndata: {json.dumps(describe(error).body())}\n\n".encode()
    finally:
        pending.cancel()
        await asyncio.wait({pending})
        await events.aclose()


def _as_event(event: Event, wanted: GenerateRequest, library: Library, prompt: str, kind: EventKind) -> tuple[str, str]:
    image = base64.b64encode(event.data).decode()
    size, now = _size_of(event.data), int(time.time())
    if isinstance(event, FinishedPicture):
        completed = CompletedImage(
            type="image_edit.completed" if kind == "image_edit" else "image_generation.completed",
            id=event.history_id,
            b64_json=image,
            image_index=event.index,
            seed=event.seed,
            adapters=used(wanted),
            revised_prompt=wanted.prompt if wanted.prompt != prompt else None,
            created_at=now,
            size=size,
            output_format=wanted.output_format,
            usage=usage_of(wanted, library, (event.index,)),
        )
        return completed.type, completed.model_dump_json()
    partial = PartialImage(
        type="image_edit.partial_image" if kind == "image_edit" else "image_generation.partial_image",
        b64_json=image,
        partial_image_index=event.number,
        image_index=event.index,
        step=event.step,
        steps=event.steps,
        created_at=now,
        size=size,
        output_format=wanted.output_format,
    )
    return partial.type, partial.model_dump_json()
