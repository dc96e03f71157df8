"""A second pass as requests ask for it, in OpenAI's call and in AUTOMATIC1111's: by a factor, or by a size."""

from serving.engine.request import Hires
from serving.http.problems import ApiError
from serving.http.wire import HiresBody
from training.base.facts import Facts


def second_pass(asked: HiresBody, size: tuple[int, int], steps: int, facts: Facts) -> Hires:
    """The second pass of a picture of `size` (width, height); its sides are the nearest multiples that the base draws.

    `steps`: of the first pass, which a request that says none takes for the second, too.
    """
    width, height = (max(1, round(side * asked.scale / facts.multiple_px)) * facts.multiple_px for side in size)
    return Hires(
        width=width,
        height=height,
        steps=asked.steps or steps,
        strength=asked.strength,
        upscaler=asked.upscaler,
    )


def check_hires(hires: Hires, size: tuple[int, int], param: str) -> None:
    """Raises ApiError unless the second pass is larger than the first."""
    if hires.width * hires.height <= size[0] * size[1]:
        raise ApiError(
            400,
            f"The second pass would draw {hires.width}x{hires.height} px, no more than the first with "
            f"{size[0]}x{size[1]}. Ask for a larger scale.",
            param=param,
        )
