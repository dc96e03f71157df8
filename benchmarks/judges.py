"""Do the judges judge? Subject retrieval and the copy detector on a folder of real subjects (a folder a subject).

`python -m benchmarks.judges FOLDER`. Made for google/dreambooth; any folder of photos that
are grouped by subject will do. Prints the table of docs/evaluation.md.
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from training.evaluation import scores
from training.evaluation.judges.features import EfficientNetLite0
from training.evaluation.reference import COPYING_LIMITS, limit_above

COPIES = ("mirrored", "88 % crop", "75 % crop", "turned 4 degrees", "jpeg 50 and colour")


def load(folder: Path) -> dict[str, list[Image.Image]]:
    """The photos of each subject."""
    found = {}
    for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
        found[sub.name] = [Image.open(path).convert("RGB") for path in sorted(sub.glob("*.jpg"))]
    return found


def copies(image: Image.Image) -> Iterator[Image.Image]:
    """What a model that has learned a photo by heart would draw, in the order of COPIES."""
    yield ImageOps.mirror(image)
    yield _cropped(image, 0.06)
    yield _cropped(image, 0.125)
    yield _cropped(image.rotate(4, Image.Resampling.BICUBIC), 0.04)
    buffer = io.BytesIO()
    ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(1.1)).enhance(0.8).save(buffer, "JPEG", quality=50)
    yield Image.open(buffer).convert("RGB")


def _cropped(image: Image.Image, border: float) -> Image.Image:
    left, top = round(image.width * border), round(image.height * border)
    inner = image.crop((left, top, image.width - left, image.height - top))
    return inner.resize(image.size, Image.Resampling.BICUBIC)


def area_under_curve(high: Tensor, low: Tensor) -> float:
    """The chance that one of `high` is above one of `low`."""
    return (high[:, None] > low[None]).double().mean().item()


def retrieval(rows_NE: Tensor, owners: list[str]) -> None:
    """Prints top-1 and the cosines of pairs."""
    same = torch.tensor([[a == b for a in owners] for b in owners])
    others = ~torch.eye(len(owners), dtype=torch.bool)
    cosines = rows_NE @ rows_NE.T
    nearest = cosines.masked_fill(~others, -2).argmax(1).tolist()
    top1 = sum(owners[a] == owners[b] for a, b in enumerate(nearest)) / len(owners)
    of_one, of_two = cosines[same & others], cosines[~same]
    print(f"retrieval: top-1 {top1:.3f} of {len(owners)} photos; AUC {area_under_curve(of_one, of_two):.3f}; ", end="")
    print(f"mean cosine {of_one.mean():.3f} within, {of_two.mean():.3f} between subjects")


def detector(model: EfficientNetLite0, subjects: dict[str, list[Image.Image]]) -> None:
    """Prints how well copies are told from other photos of the same subject, at 1 % false alarms and at our limit."""
    real: list[float] = []
    limits: list[float] = []
    copied: list[list[float]] = [[] for _ in COPIES]
    for photos in subjects.values():
        plain, mirrored = (
            scores.spatial_features(model.maps(these))
            for these in (photos, [ImageOps.mirror(photo) for photo in photos])
        )
        for index, photo in enumerate(photos):
            rest = [other for other in range(len(photos)) if other != index]
            known = torch.cat([plain[rest], mirrored[rest]])
            real.append(scores.nearest(plain[index : index + 1], known).item())
            held = scores.spatial_features(model.maps(list(copies(photo))))
            whole = torch.cat([plain, mirrored])
            for place, value in enumerate(scores.nearest(held, whole).tolist()):
                copied[place].append(value)
            limits.append(limit_above(COPYING_LIMITS[model.name], plain[rest], mirrored[rest]))
    negatives = torch.tensor(real)
    threshold = torch.quantile(negatives, 0.99).item()
    print(f"copies: 1 % of real photos are above {threshold:.3f} (the highest {negatives.max():.3f})")
    print(f"real photos above their limit: {(negatives > torch.tensor(limits)).double().mean():.3f}")
    for kind, values in zip(COPIES, copied, strict=True):
        found = torch.tensor(values)
        at_limit = (found > torch.tensor(limits)).double().mean()
        said = f"AUC {area_under_curve(found, negatives):.3f}, TPR {(found > threshold).double().mean():.3f}"
        print(f"  {kind:20} {said}, at the limit {at_limit:.3f}, lowest {found.min():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    subjects = load(parser.parse_args().folder)
    model = EfficientNetLite0()
    owners = [name for name, photos in subjects.items() for _ in photos]
    print(f"{model.name}, {len(subjects)} subjects")
    retrieval(model.embed([photo for photos in subjects.values() for photo in photos]), owners)
    detector(model, subjects)


if __name__ == "__main__":
    main()
