"""From a request, with its pictures decoded, to a job: the schedules of its passes, and its samples."""

import time

from serving.engine.job import Job, Sample
from serving.engine.pictures.decoding import Given
from serving.engine.reading import backwards
from serving.engine.request import GenerateRequest
from serving.engine.syntax import is_plain, read_negative, read_prompt
from serving.errors import Refused
from training.base.base import Base


def make_job(base: Base, request: GenerateRequest, given: Given, max_cells: float, *, reads: bool) -> Job:
    """The job of a request, its samples not yet queued.

    `max_cells`: of a forward; a guided image that has more steps its two rows one after the other. `reads`: whether
    pictures' noise can be read here. Raises UserError for what the base or this engine cannot do.
    """
    pixels_CHW = given.pixels_CHW if given.edit is None else given.edit.pixels_CHW
    size = base.latent_size(request.height, request.width)
    if request.reading:
        if not reads or pixels_CHW is None:
            raise Refused("Nothing can be read: this server marks no pictures (`watermark: none`).")
        schedule = backwards(base.process, request.steps, size)
    else:
        strength = None if pixels_CHW is None else request.strength
        if given.edit is not None and request.strength == 1.0:
            strength = None  # what is redrawn is drawn from noise alone, as diffusers does
        schedule = base.process.schedule(request.scheduler, request.steps, strength, size)
    job = Job(
        request,
        schedule,
        pixels_CHW,
        arrived_s=time.monotonic(),
        takes_negative=base.facts.guidance == "cfg",
        edit=given.edit,
        references=given.references,
    )
    largest = size
    if request.hires is not None:
        hires = request.hires
        largest = base.latent_size(hires.height, hires.width)
        job.second = base.process.schedule(request.scheduler, hires.steps, hires.strength, largest)
    more_cells = sum(one.shape[1] * one.shape[2] for one in given.references) // base.facts.cell_px**2
    job.parts = read_prompt(request.prompt, request.prompt_syntax)
    job.negative = read_negative(request.negative_prompt, request.prompt_syntax)
    if not base.facts.emphasis and not (is_plain(job.parts) and is_plain(job.negative)):
        raise Refused(f"Base '{base.name}' takes plain prompts: no weights, BREAK or AND.")
    wide = job.composed or job.guided and 2 * (largest[0] * largest[1] + more_cells) > max_cells
    job.samples = [Sample(job, index, size, wide, more_cells) for index in range(request.count)]
    return job
