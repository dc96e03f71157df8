"""DreamBooth on the subjects that the base never saw: one fused pack a setting, with every subject in it.

Owns the settings, the prompts and the pictures; a strip of pictures a (setting, subject, step) is what is kept on disk.
Knows nothing about scores.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from tools.pocket.composite import Bytes
from tools.pocket.places import PLACE_NAMES, PLACES
from tools.pocket.recipe import DEMO_IMAGES, IMAGE_PX, WORK
from tools.pocket.subjects import SUBJECTS, Subject, picture
from training.adapters.adapter import Adapter
from training.base.base import Base, load_base
from training.manifest.defaults import fill_subject
from training.manifest.manifest import parse_manifest
from training.manifest.subject import SubjectSpec
from training.photos.photos import Photo
from training.sampling.render import BARE, Look, Shot, adapter_bank, render
from training.storage.storage import open_storage
from training.trainer.fitting import precision
from training.trainer.latents import LatentSet, encode_photos
from training.trainer.member import Subject as Learner
from training.trainer.pack import Pack, training_bank
from training.trainer.prior import prepare_prior

log = logging.getLogger(__name__)

# As the shipped photos 0 to 3, and a second one on white: so six of the ten places are unseen.
PHOTOGRAPHED = ("grass", "beach", "brick", "white", "white")
UNSEEN_PLACES = tuple(name for name in PLACE_NAMES if name not in PHOTOGRAPHED)
SEEN_PLACES = ("grass", "brick")
# The bare class is asked for in places whose colours no subject has.
CLASS_PLACES = ("", "snow", "water", "clouds")
SEEDS = 2
LOOK = Look(steps=15, guidance_scale=3.0, resolution=None)
STEPS = 350
CURVE = (50, 100, 150, 250, STEPS)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PROCESSES = 2
CACHE = WORK / "dreambooth" / "cache"


@dataclass(frozen=True, slots=True)
class Setting:
    """What differs from the demo's settings, and the steps after which pictures are drawn."""

    name: str
    changes: dict[str, dict[str, object]] = field(default_factory=dict)
    captions: bool = True
    steps: tuple[int, ...] = (STEPS,)


BASE_ALONE = Setting("base alone", steps=(0,))
REFERENCE = Setting("reference", steps=CURVE)
NO_PRIOR = Setting("no prior", {"prior": {"enabled": False}}, steps=CURVE)
BARE_CLASS = Setting("bare class images", {"prior": {"captions": False}}, steps=CURVE)
SETTINGS = (
    REFERENCE,
    NO_PRIOR,
    BARE_CLASS,
    Setting("rank 4", {"lora": {"rank": 4}}),
    Setting("rank 16", {"lora": {"rank": 16}}),
    Setting("attention only", {"lora": {"targets": ATTENTION}}),
    Setting("no captions", captions=False),
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt of a strip: of the subject or of its bare class, in a place or in none."""

    place: str
    seed: int
    of_class: bool

    def prompt(self, noun: str) -> str:
        where = f" {PLACES[self.place].phrase}" if self.place else ""
        return f"a photo of a {noun}{where}" if self.of_class else f"a photo of a sks {noun}{where}"


ASKS = tuple(
    [Ask(place, seed, of_class=False) for place in (*UNSEEN_PLACES, *SEEN_PLACES) for seed in range(SEEDS)]
    + [Ask(place, seed, of_class=True) for place in CLASS_PLACES for seed in range(SEEDS)]
)


def strips_folder(base_hash: str, setting: Setting) -> Path:
    """Where a setting's strips lie: other weights, hyperparameters or prompts are other strips."""
    specs = [spec_of(subject, setting).model_dump_json() for subject in SUBJECTS]
    own = (setting.captions, setting.steps)
    asked = json.dumps([base_hash, specs, own, PHOTOGRAPHED, LOOK, str(ASKS)])
    digest = hashlib.sha256(asked.encode()).hexdigest()
    return WORK / "dreambooth" / f"{setting.name.replace(' ', '-')}-{digest[:12]}"


def strip_path(folder: Path, subject: Subject, step: int) -> Path:
    return folder / f"{subject.id}-{step}.png"


def tiles(path: Path) -> list[Bytes]:
    """The pictures of a strip, in the order of ASKS."""
    whole = np.asarray(Image.open(path).convert("RGB"))
    return [whole[:, x : x + IMAGE_PX] for x in range(0, whole.shape[1], IMAGE_PX)]


def photos_of(subject: Subject) -> list[Photo]:
    """Five photos with captions that name the place."""
    made = []
    for index, place in enumerate(PHOTOGRAPHED):
        image = picture(subject, place, index)
        sha256, caption = hashlib.sha256(image.tobytes()).hexdigest(), Ask(place, 0, of_class=False)
        made.append(Photo(f"{index}.png", image, sha256, image.size, caption.prompt(subject.noun)))
    return made


def spec_of(subject: Subject, setting: Setting) -> SubjectSpec:
    """The demo's defaults with the setting's changes."""
    defaults = yaml.safe_load((DEMO_IMAGES.parent / "manifest.yaml").read_text())["defaults"]
    defaults["train"]["max_steps"] = STEPS
    one = {"id": subject.id, "class": subject.noun, "images": subject.id, **setting.changes}
    whole = {"version": 1, "name": "bench", "base": "pocket", "defaults": defaults, "subjects": [one]}
    return parse_manifest(yaml.safe_dump(whole)).subjects[0]


def open_base(folder: Path) -> Base:
    device = torch.device("cpu")
    return load_base(str(folder), device=device, dtype=precision("auto", device))


def learner(base: Base, subject: Subject, setting: Setting, cache: Path = CACHE) -> Learner:
    """A subject with its photos' latents and its class images, made unless `cache` has them."""
    spec = fill_subject(spec_of(subject, setting), base.facts)
    instance = encode_photos(base, photos_of(subject), spec.train, spec.filled_instance_prompt)
    if not setting.captions:
        plain = (spec.filled_instance_prompt,) * len(instance)
        instance = LatentSet(instance.images, plain)
    if not spec.prior.enabled:
        return Learner(spec, instance)
    *_, (_, _, prior) = prepare_prior(base, open_storage(str(cache)), spec, captions=instance.prompts)
    return Learner(spec, instance, prior)


def learn(base: Base, found: Sequence[Learner], steps: Sequence[int]) -> dict[int, list[Adapter]]:
    """Trains all in one pack; their adapters after each of `steps`."""
    lora = found[0].spec.lora
    targets: dict[str, Sequence[str]] = {"unet": lora.targets, "text_encoder": lora.text_encoder_targets}
    pack = Pack(base, training_bank(base, slots=len(found), rank=lora.rank, targets=targets))
    kept = {}
    try:
        for one in found:
            pack.join(one)
        for step in range(1, max(steps) + 1):
            for report in pack.step():
                if report.failure:
                    raise RuntimeError(f"{report.id}: {report.failure}")
            if step in steps:
                kept[step] = [pack.adapter(one.spec.id) for one in found]
    finally:
        pack.close()
    return kept


def draw(base: Base, nouns: Sequence[str], adapters: Sequence[Adapter] = ()) -> list[Bytes]:
    """A strip for each noun with its adapter; without adapters, as the base alone draws it."""
    bank = adapter_bank(base, adapters)
    slots = range(len(adapters)) if adapters else [BARE] * len(nouns)
    wanted = [
        [Shot(slot, 1.0, ask.prompt(noun), ask.seed, LOOK) for ask in ASKS]
        for slot, noun in zip(slots, nouns, strict=True)
    ]
    bank.inject()
    try:
        made = render(base, bank, [shot for shots in wanted for shot in shots])
    finally:
        bank.eject()
    return [np.concatenate([np.asarray(made[shot]) for shot in shots], axis=1) for shots in wanted]


def run_setting(base_folder: Path, folder: Path, setting: Setting, subjects: Sequence[Subject] = SUBJECTS) -> None:
    """Trains and draws all subjects; `folder` appears under its name when every strip is in it."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    base = open_base(base_folder)
    staged = folder.with_name(folder.name + ".part")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    kept: dict[int, list[Adapter]] = {0: []}
    if setting != BASE_ALONE:
        kept = learn(base, [learner(base, subject, setting) for subject in subjects], setting.steps)
    for step, adapters in kept.items():
        for subject, strip in zip(subjects, draw(base, [s.noun for s in subjects], adapters), strict=True):
            Image.fromarray(strip).save(strip_path(staged, subject, step))
    staged.rename(folder)


def run(base_folder: Path, base_hash: str) -> None:
    """Every setting that is not there yet, two at a time, each in a process of one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = {}
        for setting in (*SETTINGS, BASE_ALONE):
            folder = strips_folder(base_hash, setting)
            if not folder.exists():
                tasks[setting.name] = pool.submit(run_setting, base_folder, folder, setting)
        for name, task in tasks.items():
            task.result()
            log.info(f"bench: {len(SUBJECTS)} subjects done under '{name}'")
