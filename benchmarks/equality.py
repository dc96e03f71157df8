"""How equal a subject in a pack is to the same subject alone, beside how equal it is to itself with other threads.

    python -m benchmarks.equality [--steps 50] [--rate 1e-4] [--subjects 2] [--fp64]

The demo's photos and settings on the pocket base, without class images. What is compared is the learned delta of every
layer: the norm of the difference over the norm of what was learned. Results: benchmarks/equality.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from training.adapters.adapter import Adapter
from training.base.base import Base, load_base
from training.manifest.defaults import fill_subject
from training.manifest.manifest import load_manifest
from training.manifest.subject import SubjectSpec
from training.photos.files import list_photo_files
from training.photos.photos import photos
from training.trainer.latents import encode_photos
from training.trainer.loop import train
from training.trainer.member import Subject
from training.trainer.pack import Pack, training_bank

DEMO = Path(__file__).resolve().parents[1] / "manifests" / "demo" / "manifest.yaml"


def subject_of(base: Base, spec: SubjectSpec, root: str, steps: int, rate: float | None) -> Subject:
    """A subject of the demo, for so many steps at this learning rate (None: the demo's)."""
    news = {"max_steps": steps, "learning_rate": rate or spec.train.learning_rate}
    prior = spec.prior.model_copy(update={"source": "prediction", "captions": False})
    spec = fill_subject(spec, base.facts).model_copy(
        update={"train": spec.train.model_copy(update=news), "prior": prior}
    )
    found = photos(list_photo_files(Path(root, spec.images)), resolution=base.facts.resolution)
    return Subject(spec, encode_photos(base, found.good, spec.train, spec.filled_instance_prompt))


def learn(base: Base, subjects: Sequence[Subject]) -> dict[str, Adapter]:
    """What the subjects learn in one pack, by id."""
    lora = subjects[0].spec.lora
    targets: dict[str, Sequence[str]] = {"unet": lora.targets, "text_encoder": lora.text_encoder_targets}
    pack = Pack(
        base, training_bank(base, slots=len(subjects), rank=max(s.spec.lora.rank for s in subjects), targets=targets)
    )
    left, learned = list(subjects), dict[str, Adapter]()

    def feed(count: int) -> list[Subject]:
        taken = left[:count]
        del left[:count]
        return taken

    for progress in train(pack, feed):
        learned |= {ended.id: pack.adapter(ended.id) for ended in progress.ended}
    pack.close()
    return learned


def difference(one: Adapter, other: Adapter) -> float:
    """Of all layers' deltas together: the norm of the difference over the norm of `one`."""
    apart, whole = 0.0, 0.0
    for key, low in one.modules.items():
        mine, theirs = (
            part.up.flatten(1).double() @ part.down.flatten(1).double() for part in (low, other.modules[key])
        )
        apart += (mine - theirs).square().sum().item()
        whole += mine.square().sum().item()
    return float((apart / whole) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--subjects", type=int, default=2)
    parser.add_argument("--fp64", action="store_true")
    asked = parser.parse_args()
    manifest = load_manifest(DEMO)
    torch.set_num_threads(1)
    base = load_base(manifest.base, device="cpu", dtype=torch.float64 if asked.fp64 else torch.float32)
    specs = manifest.subjects[: asked.subjects]
    subjects = [subject_of(base, spec, manifest.root, asked.steps, asked.rate) for spec in specs]
    packed = learn(base, subjects)
    for subject in subjects:
        id = subject.spec.id
        torch.set_num_threads(1)
        alone = learn(base, [subject])[id]
        torch.set_num_threads(2)
        threaded = learn(base, [subject])[id]
        print(
            f"{id}: in a pack {difference(alone, packed[id]):.1e}, with two threads {difference(alone, threaded):.1e}"
        )


if __name__ == "__main__":
    main()
