"""The prior: latents of class images, made once per (base, class prompt, settings) and shared by every subject of it.

Generated class images never leave latent space. Image i depends on its prompt, the prior's seed and i alone.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch

from training.base.base import Base
from training.base.footprint import pictures_at_once
from training.manifest.subject import PriorSpec, SubjectSpec
from training.photos.files import list_photo_files
from training.photos.intake import class_folder
from training.photos.photos import photos
from training.run.lead import Lead, Lost
from training.sampling.sampler import sample
from training.storage.interface import Storage
from training.trainer.latents import LatentSet, content_key, load_latents, photo_latents, posteriors, save_latents

BATCH = 16
LOOK_SECONDS = 0.5  # how often to look whether another worker has made the prior


def class_prompts(subject: SubjectSpec, captions: Sequence[str] = ()) -> tuple[str, ...]:
    """What class images show: the class prompt, and `captions` without the words that only the subject has, each once.

    Without this, places that only captions name would become words for the subject, as its own words are.
    """
    own = set(subject.filled_instance_prompt.split()) - set(subject.filled_class_prompt.split())
    bare = (" ".join(word for word in caption.split() if word not in own) for caption in captions)
    return tuple(dict.fromkeys((subject.filled_class_prompt, *sorted(bare))))


def prior_key(base: Base, subject: SubjectSpec, prompts: Sequence[str]) -> str:
    """The cache key of a generated prior: everything its images depend on."""
    prior = subject.prior
    settings = (prior.images, prior.steps, prior.guidance_scale, prior.seed, subject.negative_prompt)
    resolution = subject.train.resolution or base.facts.resolution
    return content_key("priors", base.hash, str(base.dtype), "\n".join(prompts), resolution, *settings)


def prepare_prior(
    base: Base, storage: Storage, subject: SubjectSpec, root: str = ".", captions: Sequence[str] = ()
) -> Iterator[tuple[int, int, LatentSet | None]]:
    """Makes or finds the prior of a subject. Yields (images done, images wanted, the set once it is there).

    `captions`: of the subject's photos, if class images are to be made under them, too. If several workers want it
    at once, one makes it and the others wait.
    """
    prior = subject.prior
    if prior.source == "folder":
        yield 1, 1, _from_folder(base, storage, subject, root)
        return
    prompts = class_prompts(subject, captions if prior.captions else ())
    key = prior_key(base, subject, prompts)
    lead = Lead(storage, f"{key}.lead")
    while (cached := load_latents(storage, key)) is None:
        if lead.acquire() is not None:  # another worker, of this run or another one, makes it
            yield 0, prior.images, None
            time.sleep(LOOK_SECONDS)
            continue
        with contextlib.suppress(Lost), lead:
            for done in _make(base, storage, subject, prompts, key, lead):
                yield done, prior.images, None
    yield prior.images, prior.images, LatentSet(cached, _shared_out(prompts, range(prior.images)))


def _make(
    base: Base, storage: Storage, subject: SubjectSpec, prompts: Sequence[str], key: str, lead: Lead
) -> Iterator[int]:
    """Generates and keeps the prior, as long as this worker has the lead. Yields how many images there are."""
    wanted, made = subject.prior.images, []
    size = min(BATCH, pictures_at_once(base.cells(subject.train.resolution)))
    for start in range(0, wanted, size):
        lead.renew()
        made.append(_generate(base, subject, prompts, range(start, min(start + size, wanted))))
        yield start + len(made[-1])
    mean = torch.cat(made)
    save_latents(storage, key, posteriors(mean, torch.zeros_like(mean)))


def _shared_out(prompts: Sequence[str], indices: range) -> tuple[str, ...]:
    """The prompt of each image: all prompts in turn."""
    return tuple(prompts[index % len(prompts)] for index in indices)


def _generate(base: Base, subject: SubjectSpec, prompts: Sequence[str], indices: range) -> torch.Tensor:
    prior: PriorSpec = subject.prior
    return (
        sample(
            base,
            _shared_out(prompts, indices),
            seeds=[prior.seed * 1_000_003 + index for index in indices],
            steps=prior.steps,
            guidance_scale=prior.guidance_scale,
            negative_prompt=subject.negative_prompt,
            resolution=subject.train.resolution,
        )
        .float()
        .cpu()
    )


def _from_folder(base: Base, storage: Storage, subject: SubjectSpec, root: str) -> LatentSet:
    resolution = subject.train.resolution or base.facts.resolution
    files = list_photo_files(class_folder(subject, root))[: subject.prior.images]
    found = photos(files, resolution=resolution, min_photos=1, max_photos=len(files), with_report=False).good
    return photo_latents(base, storage, found, subject.train, subject.filled_class_prompt)
