"""Is the chosen step at least as good as the last, on scores that the chooser did not see?

    python -m benchmarks.choice STORAGE [RUN]

Draws every subject of a judged run on the pocket base at its chosen and at its last step, for other prompts and seeds,
and judges them by the colours of the middle of the picture (the chooser reads the judge's features) and by the places
that the prompts ask for. Prints the table of docs/evaluation.md.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from training.base.base import load_base
from training.evaluation.compare import standard_error
from training.evaluation.evaluate import Evaluation, evaluate_subjects
from training.evaluation.exam import Exam
from training.evaluation.judges.box import Judges
from training.evaluation.judges.features import PocketJudge
from training.evaluation.judges.pocket import load_judge
from training.evaluation.record import Record, load_record
from training.manifest.subject import SubjectSpec
from training.photos.files import read_files
from training.photos.photos import photos
from training.photos.variants import variants
from training.run.run import RunStore, list_runs
from training.storage.storage import open_storage
from training.trainer.checkpoint import load_state

PROMPTS = (" in the desert", " in the water", " in the clouds", " in front of a brick wall")
SEED = 1000


class Palette:
    """The colours of the middle of a picture, as a histogram of 4 levels a channel; no model is behind it."""

    name = "palette"

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        return functional.normalize(torch.stack([self._histogram(image) for image in images]))

    def maps(self, images: Sequence[Image.Image]) -> Tensor:
        return self.embed(images)[:, :, None, None]

    def _histogram(self, image: Image.Image) -> Tensor:
        border = round(image.width * 0.18)
        middle = image.convert("RGB").crop((border, border, image.width - border, image.height - border))
        levels = torch.from_numpy(np.asarray(middle, np.int64) // 64)
        index = (levels[..., 0] * 16 + levels[..., 1] * 4 + levels[..., 2]).flatten()
        return torch.bincount(index, minlength=64).float().sqrt()


def exams(run: RunStore, side: int) -> list[tuple[Exam, Record]]:
    """Each judged subject with its chosen and its last checkpoint, and all its photos."""
    about, found = run.record().manifest, []
    for spec in about.subjects:
        record = load_record(run, spec.id)
        if record is None:
            continue
        wanted = {record.chosen, record.steps[-1]}
        states = {step: load_state(data).adapter for step, data in run.load_checkpoints(spec.id) if step in wanted}
        held = photos(read_files(spec, run.storage, about.root), resolution=side, min_photos=1, with_report=False)
        images = [Image.fromarray(variants(photo.image, side)[0]) for photo in held.good]
        found.append((Exam(_asked(spec), images, [], states), record))
    return found


def _asked(spec: SubjectSpec) -> SubjectSpec:
    prompts = tuple(spec.instance_prompt + place for place in PROMPTS)
    judged = spec.evaluate.model_copy(update={"prompts": prompts, "seed": SEED, "images": 2, "steps": 12})
    return spec.model_copy(update={"evaluate": judged})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage")
    parser.add_argument("run", nargs="?")
    asked = parser.parse_args()
    storage = open_storage(asked.storage)
    run = RunStore(storage, asked.run or list_runs(storage)[-1])
    base, palette = load_base("pocket"), Palette()
    if base.hash != run.record().base_hash:
        raise SystemExit("the pocket base here is not the one that this run was trained on")
    found = exams(run, base.facts.resolution)
    judge = PocketJudge(load_judge())
    by_colour = Judges(palette, palette, judge)
    evaluations = evaluate_subjects(base, [exam for exam, _ in found], lambda _: by_colour)
    rows = [_line(evaluation, record) for evaluation, (_, record) in zip(evaluations, found, strict=True)]
    print(f"{'subject':10} {'chosen':>6} {'last':>6} | palette likeness, fidelity, balance: chosen | last")
    for id, chosen, last, a, b in rows:
        print(f"{id:10} {chosen:6d} {last:6d} | {_three(a)} | {_three(b)}")
    gains = [a[2] - b[2] for _, _, _, a, b in rows]
    mean = sum(gains) / len(gains)
    wins, losses = sum(gain > 0.02 for gain in gains), sum(gain < -0.02 for gain in gains)
    print(
        f"balance gained by choosing: {mean:+.3f} ± {standard_error(gains):.3f}; better {wins}, worse {losses}", end=""
    )
    print(f", alike {len(gains) - wins - losses} of {len(gains)}")


Three = tuple[float, float, float]


def _line(evaluation: Evaluation, record: Record) -> tuple[str, int, int, Three, Three]:
    of = {candidate.step: candidate for candidate in evaluation.candidates}
    chosen, last = of[record.chosen], of[record.steps[-1]]
    a, b = ((c.likeness, c.fidelity, c.balance) for c in (chosen, last))
    return record.id, chosen.step, last.step, a, b


def _three(values: Three) -> str:
    return " ".join(f"{value:5.2f}" for value in values)


if __name__ == "__main__":
    main()
