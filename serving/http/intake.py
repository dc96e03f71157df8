"""From what a client sent to what an engine can do: names resolved, defaults filled in, limits checked.

Every refusal is an `ApiError` that names the field. It reads the registry, which blocks, so it runs on a thread.
"""

import base64
import binascii
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from serving.config import ServeSpec
from serving.engine.pictures.codec import count
from serving.engine.request import AdapterRef, AdapterUse, ControlUse, GenerateRequest, Hires, ImagePromptUse
from serving.engine.syntax import is_plain, read_negative, read_prompt
from serving.errors import Refused
from serving.http.hires import check_hires, second_pass
from serving.http.library import Library
from serving.http.networks.shelf import ReadPicture
from serving.http.networks.wire import ControlBody, ImagePromptBody
from serving.http.problems import ApiError
from serving.http.wire import ImagesBody, TokenDetails, TokenUsage, UsedAdapter, WornAdapter
from training.base.facts import Facts, SamplerName
from training.storage.version import Resolved, UnknownAdapter

Worn = tuple[Resolved, float]  # an adapter's version, and its weight


@dataclass(frozen=True, slots=True)
class Intake:
    """Makes engine requests for one base."""

    spec: ServeSpec
    library: Library

    @property
    def facts(self) -> Facts:
        """Sizes and recommendations of the base."""
        return self.library.outline.facts

    @property
    def steps(self) -> int:
        """Denoising steps of a request that names none."""
        return self.facts.steps if self.spec.steps is None else self.spec.steps

    @property
    def guidance_scale(self) -> float:
        """The guidance of a request that names none."""
        return self.facts.guidance_scale if self.spec.guidance_scale is None else self.spec.guidance_scale

    @property
    def scheduler(self) -> SamplerName:
        """The sampler of a request that names none."""
        return self.spec.scheduler or self.facts.sampler

    def images(self, tenant: str, body: ImagesBody, request_id: str) -> GenerateRequest:
        """The engine's request of an OpenAI images body. Raises ApiError."""
        if body.partial_images and not body.stream:
            raise ApiError(400, "'partial_images' needs 'stream': true.", param="partial_images")
        if body.response_format == "url" and body.stream:
            raise ApiError(
                400, "'response_format' is 'url', but streams carry 'b64_json'. Leave one out.", param="response_format"
            )
        if body.background == "transparent":
            raise ApiError(
                400,
                "'background' is 'transparent', but images of this server are opaque. Allowed: 'opaque' and 'auto'.",
                param="background",
            )
        self.library.load_tokenizer()  # on this thread, so that counting tokens later does not hold up the event loop
        width, height = self._size(body.size)
        worn = self.worn(tenant, body.model, body.adapters or ())
        steps = body.steps or self.steps
        return self.checked(
            GenerateRequest(
                request_id=request_id,
                tenant=tenant,
                prompt=self.told(self.prompt(body.prompt, "prompt"), worn),
                negative_prompt=self.prompt(body.negative_prompt or "", "negative_prompt"),
                prompt_syntax=body.prompt_syntax or "plain",
                adapters=uses(worn),
                width=width,
                height=height,
                count=body.n or 1,
                seed=any_seed() if body.seed is None else body.seed,
                steps=steps,
                guidance_scale=self.guidance_scale if body.guidance_scale is None else body.guidance_scale,
                scheduler=body.scheduler or self.scheduler,
                image=None if body.image is None else read_picture_field(body.image, "image", width, height),
                strength=body.strength or 0.8,
                hires=None if body.hires is None else second_pass(body.hires, (width, height), steps, self.facts),
                controls=self.controls(body.control or (), width, height),
                image_prompts=self.image_prompts(body.image_prompts or (), width, height),
                previews=body.partial_images or 0,
                output_format=body.output_format or "png",
                linked=body.response_format == "url",
                output_quality=95 if body.output_compression is None else body.output_compression,
                deadline_s=self.spec.limits.deadline_s,
            )
        )

    def checked(self, request: GenerateRequest) -> GenerateRequest:
        """`request`, if it is within the limits and has a meaning on the base. Raises ApiError.

        Where a base draws without guidance the request's is 1, which is off.
        """
        limits = self.spec.limits
        _at_most(request.count, limits.images, "n")
        _at_most(request.steps, limits.steps, "steps")
        _at_most(len(request.adapters), limits.adapters, "adapters", "adapters in a request")
        self._check_sides(request, "size")
        if request.hires is not None:
            _at_most(request.hires.steps, limits.steps, "hires.steps")
            self._check_sides(request.hires, "hires")
            check_hires(request.hires, (request.width, request.height), "hires")
        _at_most(request.pixels * request.count, limits.pixels, "size", "pixels in a request")
        if request.scheduler not in self.facts.samplers:
            raise ApiError(
                400,
                f"The scheduler '{request.scheduler}' is not for base '{self.library.base}'. Use one of "
                f"{', '.join(self.facts.samplers)}.",
                param="scheduler",
            )
        if request.negative_prompt and not self.facts.negative:
            raise ApiError(
                400,
                f"'negative_prompt' is {request.negative_prompt[:40]!r}, but base '{self.library.base}' draws without "
                "one. Leave it out.",
                param="negative_prompt",
            )
        self._check_syntax(request)
        if request.hires is not None and request.controls:
            raise ApiError(
                400,
                "A second pass (`hires`) has another size than the pictures of `control`, and is not steered by them. "
                "Send one of the two.",
                param="hires",
            )
        for use in request.adapters:
            if abs(use.weight) > limits.weight:
                raise ApiError(
                    400,
                    f"The weight of '{use.ref.id}' is {use.weight}; allowed is -{limits.weight} to {limits.weight}.",
                    param="adapters",
                )
        return request if self.facts.guidance != "none" else request.model_copy(update={"guidance_scale": 1.0})

    def _check_sides(self, picture: GenerateRequest | Hires, param: str) -> None:
        """Raises ApiError for a size that the base cannot draw, or that is beyond the limits."""
        most = min(self.spec.limits.side_px, self.facts.max_side_px or self.spec.limits.side_px)
        for side, name in ((picture.width, "width"), (picture.height, "height")):
            if side % self.facts.multiple_px or side > most:
                where = " of the second pass" if isinstance(picture, Hires) else ""
                raise ApiError(
                    400,
                    f"The {name}{where} is {side}; on base '{self.library.base}' it must be a multiple of "
                    f"{self.facts.multiple_px} up to {most}.",
                    param=param,
                )

    def _check_syntax(self, request: GenerateRequest) -> None:
        """Raises ApiError for prompts that cannot be read, or ask for what the base has not."""
        for field, read in (("prompt", read_prompt), ("negative_prompt", read_negative)):
            try:
                asks = not is_plain(read(getattr(request, field), request.prompt_syntax))
            except Refused as error:
                raise ApiError(400, str(error), param=field) from None
            if asks and not self.facts.emphasis:
                raise ApiError(
                    400,
                    f"'{field}' gives words weights or joins prompts, and base '{self.library.base}' encodes prompts "
                    "by a language model, which has no such thing. Say it in words; write \\( and \\[ for brackets.",
                    param=field,
                )

    def model(self, tenant: str, model: str) -> Resolved | None:
        """The version that a model name means now; None if it is the base. Raises ApiError."""
        named = self._named_by(model)
        return self._resolve(tenant, named, "model") if named else None

    def worn(self, tenant: str, model: str | None, worn: Sequence[WornAdapter]) -> tuple[Worn, ...]:
        """The versions that a model name and a mix mean now, with their weights. Raises ApiError."""
        named = self._named_by(model)
        mix = [*([(named, 1.0, "model")] if named else []), *((one.id, one.weight, "adapters") for one in worn)]
        return tuple((self._resolve(tenant, name, param), weight) for name, weight, param in mix)

    def controls(
        self, asked: Sequence[ControlBody], width: int, height: int, field: str = "control"
    ) -> tuple[ControlUse, ...]:
        """The ControlNets of a request for images of that size, as the engine takes them. Raises ApiError."""
        _at_most(len(asked), self.spec.engine.networks, field, "ControlNets")
        return tuple(self.library.networks.controls(asked, _reading(width, height), field))

    def image_prompts(self, asked: Sequence[ImagePromptBody], width: int, height: int) -> tuple[ImagePromptUse, ...]:
        """The pictures in place of words of a request, as the engine takes them. Raises ApiError."""
        _at_most(len(asked), self.spec.engine.networks, "image_prompts", "pictures in place of words")
        return tuple(self.library.networks.image_prompts(asked, _reading(width, height)))

    def told(self, prompt: str, worn: Sequence[Worn]) -> str:
        """`prompt`, with the triggers that it lacks before it, if the server adds them."""
        if not self.spec.add_trigger:
            return prompt
        triggers = dict.fromkeys(one.trigger for one, weight in worn if weight > 0 and one.trigger)
        lacking = [trigger for trigger in triggers if trigger.casefold() not in prompt.casefold()]
        return ", ".join(part for part in (*lacking, prompt) if part)

    def _named_by(self, model: str | None) -> str | None:
        """The adapter that a model name holds; None if it is the base."""
        if model in (None, "", self.library.base):
            return None
        base, colon, adapter = str(model).partition(":")
        if not colon:
            return base
        if base != self.library.base:
            raise ApiError(
                404,
                f"The base '{base}' is not served here; this server has '{self.library.base}'.",
                param="model",
                code="model_not_found",
            )
        return adapter

    def _resolve(self, tenant: str, name: str, param: str) -> Resolved:
        try:
            return self.library.resolve(tenant, name)
        except UnknownAdapter as error:
            code = "model_not_found" if param == "model" else "adapter_not_found"
            raise ApiError(404, str(error), param=param, code=code) from None
        except Refused as error:
            raise ApiError(400, str(error), param=param, code="wrong_base") from None

    def prompt(self, prompt: str, field: str) -> str:
        """`prompt`, if it is within the limits. Raises ApiError."""
        limit = self.spec.limits.prompt_chars
        if len(prompt) > limit:
            raise ApiError(
                400,
                f"'{field}' has {len(prompt)} characters; at most {limit} are allowed.",
                param=field,
                code="string_above_max_length",
            )
        if "\0" in prompt:
            raise ApiError(400, f"'{field}' holds a null character.", param=field)
        return prompt

    def _size(self, size: str | None) -> tuple[int, int]:
        if size in (None, "auto"):
            return self.facts.resolution, self.facts.resolution
        width, height = str(size).split("x")
        return int(width), int(height)


def usage_of(request: GenerateRequest, library: Library, indices: Sequence[int]) -> TokenUsage:
    """What images `indices` of a request take; the prompts and the pictures that were sent count with image 0.

    A token of text is one of the base's tokenizer, a token of an image one latent cell.
    """
    cells = -(-request.pixels // library.outline.facts.cell_px**2)
    first = 0 in indices
    text = library.count_tokens(request.prompt) + library.count_tokens(request.negative_prompt) if first else 0
    given = (request.image is not None) + len(request.references) + len(request.controls) + len(request.image_prompts)
    start = cells * given if first else 0
    made = cells * len(indices)
    return TokenUsage(
        input_tokens=text + start,
        input_tokens_details=TokenDetails(text_tokens=text, image_tokens=start),
        output_tokens=made,
        output_tokens_details=TokenDetails(text_tokens=0, image_tokens=made),
        total_tokens=text + start + made,
    )


def used(request: GenerateRequest) -> list[UsedAdapter]:
    """The adapters of a request as replies list them."""
    return [
        UsedAdapter(id=f"{use.ref.tenant}/{use.ref.id}", version=use.ref.version, weight=use.weight)
        for use in request.adapters
    ]


def ref_of(resolved: Resolved) -> AdapterRef:
    """The reference by which engines know a version."""
    return AdapterRef(tenant=resolved.tenant, id=resolved.id, version=resolved.version)


def uses(worn: Sequence[Worn]) -> tuple[AdapterUse, ...]:
    """The mix as the engine takes it."""
    return tuple(AdapterUse(ref=ref_of(one), weight=weight) for one, weight in worn)


def any_seed() -> int:
    """A seed for a request that names none; 31 bits, since some clients keep seeds in a 32-bit integer."""
    return secrets.randbits(31)


def _reading(width: int, height: int) -> ReadPicture:
    """Reads the picture fields of a request for images of that size."""
    return lambda text, field: read_picture_field(text, field, width, height)


def read_picture_field(text: str, field: str, width: int, height: int) -> bytes:
    """The bytes of a picture sent as base64 or as a data URL; lines may be wrapped, padding may be missing.

    Only its header is looked at. Raises ApiError if that says that it cannot be decoded to `width` x `height`.
    """
    payload = "".join((text.partition(",")[2] if text.startswith("data:") else text).split()).rstrip("=")
    try:
        data = base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
        count(data, width, height)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"'{field}' is not base64.", param=field) from None
    except Refused as error:
        raise ApiError(400, str(error), param=field) from None
    return data


def _at_most(value: int, limit: int, field: str, what: str | None = None) -> None:
    if value > limit:
        code = "integer_above_max_value"
        raise ApiError(400, f"{value} {what or field} asked for; at most {limit} allowed.", param=field, code=code)
