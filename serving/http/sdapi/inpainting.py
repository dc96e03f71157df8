"""AUTOMATIC1111's fields of masks and of the hires pass, as this server's engines know them."""

from collections.abc import Mapping
from typing import Literal

from serving.engine.request import EditMask, Hires
from serving.http.hires import second_pass
from serving.http.intake import read_picture_field
from serving.http.problems import ApiError
from serving.http.sdapi.wire import Img2ImgBody, Txt2ImgBody
from serving.http.wire import HiresBody
from training.base.facts import Facts

MASK_BLUR = 4.0  # of a client that does not say
FILLS: tuple[Literal["fill", "original", "noise", "nothing"], ...] = ("fill", "original", "noise", "nothing")
UPSCALERS: Mapping[str, Literal["latent", "lanczos"]] = {"latent": "latent", "lanczos": "lanczos"}
# what a second pass has of its own there: fields, and what they may say where it is as the first
_AS_FIRST = ("", "Use same sampler", "Use same scheduler", "Use same checkpoint")
_OWN = ("hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt")


def read_mask(body: Img2ImgBody, width: int, height: int) -> EditMask | None:
    """The mask that is asked for. Raises ApiError for what is no picture."""
    if body.mask is None:
        return None
    return EditMask(
        data=read_picture_field(body.mask, "mask", width, height),
        means="white",
        inverted=bool(body.inpainting_mask_invert),
        blur_px=MASK_BLUR if body.mask_blur is None else body.mask_blur,
        fill=FILLS[body.inpainting_fill],
        only_masked=body.inpaint_full_res,
        padding_px=body.inpaint_full_res_padding,
    )


def read_hires(body: Txt2ImgBody, width: int, height: int, steps: int, facts: Facts) -> Hires | None:
    """The second pass that is asked for. Raises ApiError for what it cannot be."""
    if not body.enable_hr:
        return None
    if isinstance(body, Img2ImgBody):
        raise ApiError(400, "'enable_hr' is for txt2img. Leave 'enable_hr' out.", param="enable_hr")
    for name in _OWN:
        asked = (body.model_extra or {}).get(name)
        if asked is not None and asked not in (*_AS_FIRST, getattr(body, name.removeprefix("hr_"), "")):
            raise ApiError(
                400, f"'{name}' is not done: the second pass is as the first one. Leave '{name}' out.", param=name
            )
    name = (body.hr_upscaler or "Latent").lower()
    if name not in UPSCALERS:
        raise ApiError(400, f"'hr_upscaler' is '{name[:40]}'; this server has Latent and Lanczos.", param="hr_upscaler")
    strength = max(body.denoising_strength, 1.001 / steps)
    # there, so many steps are taken; here they are those of a whole run
    taken = body.hr_second_pass_steps or steps
    asked_body = HiresBody(
        scale=_scale(body, width, height),
        steps=max(1, round(taken / strength)),
        strength=min(1.0, strength),
        upscaler=UPSCALERS[name],
    )
    return second_pass(asked_body, (width, height), steps, facts)


def _scale(body: Txt2ImgBody, width: int, height: int) -> float:
    """By what the sides grow. Raises ApiError unless both grow by as much."""
    scales = [to / side for to, side in ((body.hr_resize_x, width), (body.hr_resize_y, height)) if to] or [
        body.hr_scale
    ]
    if max(scales) > 1.02 * min(scales):
        raise ApiError(
            400,
            f"'hr_resize_x' and 'hr_resize_y' are {body.hr_resize_x} and {body.hr_resize_y}, another shape than "
            f"{width}x{height}. Give one of them.",
            param="hr_resize_x",
        )
    if not 1 < scales[0] <= 8:
        raise ApiError(400, f"The second pass enlarges by 1 to 8, not by {scales[0]:g}.", param="hr_scale")
    return scales[0]
