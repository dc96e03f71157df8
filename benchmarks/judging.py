"""What judging costs beside training: CPU seconds on the pocket base, in one process, one thread.

    python -m benchmarks.judging [--subjects 6] [--checkpoints 5] [--prompts 6] [--steps 250]

Trains the demo's subjects in one pack for a few steps, scales that to `--steps`, and judges checkpoints of each.
CPU seconds, so that a busy machine does not matter much.
"""

import argparse
import time
from pathlib import Path

import torch

from training.base.base import load_base
from training.evaluation.evaluate import evaluate_subjects
from training.evaluation.exam import Exam
from training.evaluation.judges.box import JudgeBox
from training.manifest.defaults import fill_subject
from training.manifest.manifest import load_manifest
from training.manifest.subject import SubjectSpec
from training.photos.files import list_photo_files
from training.photos.photos import Photo, photos
from training.trainer.latents import LatentSet, encode_photos
from training.trainer.member import Subject
from training.trainer.pack import Pack, training_bank

DEMO = Path(__file__).parents[1] / "manifests" / "demo" / "manifest.yaml"
MEASURED_STEPS = 12
PLACES = ("", " in the snow", " at night", " on the beach", " in the desert", " in the forest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=6)
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--steps", type=int, default=250)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    base, manifest = load_base("pocket", device="cpu"), load_manifest(DEMO)
    specs = [
        fill_subject(_with_prompts(spec, asked.prompts), base.facts) for spec in manifest.subjects[: asked.subjects]
    ]
    images = {spec.id: _images(spec, Path(manifest.root), base.facts.resolution) for spec in specs}
    pack = Pack(
        base,
        training_bank(
            base,
            slots=len(specs),
            rank=max(spec.lora.rank for spec in specs),
            targets={"unet": specs[0].lora.targets, "text_encoder": specs[0].lora.text_encoder_targets},
        ),
    )
    for spec in specs:
        instance = encode_photos(base, images[spec.id], spec.train, spec.filled_instance_prompt)
        prior = LatentSet(instance.images, (spec.filled_class_prompt,) * len(instance))
        pack.join(Subject(spec, instance, prior))
    pack.step()
    started = time.process_time()
    for _ in range(MEASURED_STEPS):
        pack.step()
    training = (time.process_time() - started) / MEASURED_STEPS * asked.steps
    adapters = {spec.id: pack.state(spec.id).adapter for spec in specs}
    pack.close()
    exams = []
    for spec in specs:
        checkpoints = dict.fromkeys(range(1, asked.checkpoints + 1), adapters[spec.id])
        exams.append(Exam(spec, [photo.image for photo in images[spec.id]], [], checkpoints))
    box = JudgeBox(base)
    started = time.process_time()
    evaluate_subjects(base, exams, lambda _: box.judges())
    judging = time.process_time() - started
    print(f"{torch.__version__}, one thread, {base.dtype}")
    print(f"training {len(specs)} subjects for {asked.steps} steps: {training:.1f} CPU s (without class images)")
    what = f"{asked.checkpoints} checkpoints x {len(specs)} subjects x {asked.prompts} prompts"
    print(f"judging {what}: {judging:.1f} CPU s")
    print(f"judging / training: {judging / training:.2f}")


def _with_prompts(spec: SubjectSpec, count: int) -> SubjectSpec:
    prompts = tuple(spec.instance_prompt + place for place in PLACES[:count])
    return spec.model_copy(update={"evaluate": spec.evaluate.model_copy(update={"prompts": prompts})})


def _images(spec: SubjectSpec, root: Path, side: int) -> tuple[Photo, ...]:
    return photos(list_photo_files(root / spec.images), resolution=side, min_photos=1).good


if __name__ == "__main__":
    main()
