"""Whether the noise mark changes what pictures look like: `python -m benchmarks.resemblance`.

Three sets of pictures of the same prompts by other seeds: one marked, two not. Between marked and unmarked, and between
the two unmarked ones: the kernel distance (KID, Binkowski et al. 2018) of EfficientNet-Lite0's features, and how often
sets drawn anew from both together are further apart (a permutation test). Beside: how well the pocket's judge finds the
prompts, and how alike the pictures of a set are to each other.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.provenance import MARK, PLACES, THINGS, pictures
from training.base.base import load_base
from training.evaluation.judges.features import EfficientNetLite0, open_judge

JUDGE = Path(__file__).parents[1] / "training/bases/pocket-judge"
DRAWS = 2000
Kernel = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resemblance", description=__doc__)
    parser.add_argument("--pictures", type=int, default=200, help="of each set")
    parser.add_argument("--out", type=Path, default=Path("out/resemblance.json"))
    parser.add_argument("--write", action="store_true", help="for `python -m benchmarks`; the file is written anyway")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    base, count = load_base("pocket", device="cpu"), arguments.pictures
    sets = {
        name: list(pictures(base, mark, count, 64, {}, first=first).values())
        for name, mark, first in (("marked", MARK, 0), ("one", None, 10**6), ("other", None, 2 * 10**6))
    }
    found = {
        "pictures": count,
        "marked and unmarked": distance(sets["marked"], sets["one"]),
        "unmarked and unmarked": distance(sets["other"], sets["one"]),
        **{f"{name}: prompt found": agreement(images) for name, images in sets.items()},
        **{f"{name}: likeness within": likeness(images) for name, images in sets.items()},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


def distance(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> dict[str, float]:
    """KID, and the share of random divisions of both sets together that are at least as far apart."""
    features = EfficientNetLite0().embed([*one, *other]).double().numpy()
    kernel = (features @ features.T / features.shape[1] + 1) ** 3
    rng, order = np.random.default_rng(0), np.arange(len(features))
    found = _mmd(kernel, order, len(one))
    drawn = [_mmd(kernel, rng.permutation(order), len(one)) for _ in range(DRAWS)]
    return {"kid": found, "p": float(np.mean([draw >= found for draw in drawn]))}


def _mmd(kernel: Kernel, order: NDArray[np.int64], count: int) -> float:
    """The unbiased squared mean discrepancy of the first `count` of an order from the rest."""
    one, other = order[:count], order[count:]

    def within(members: NDArray[np.int64]) -> float:
        part = kernel[np.ix_(members, members)]
        return float((part.sum() - np.trace(part)) / (len(members) * (len(members) - 1)))

    return within(one) + within(other) - 2 * float(kernel[np.ix_(one, other)].mean())


def agreement(images: Sequence[Image.Image]) -> float:
    """How well the pocket's judge finds the prompts of `pictures`, 0 to 1."""
    judge = open_judge(JUDGE)
    assert judge is not None
    prompts = [
        f"a photo of a {THINGS[index % len(THINGS)]} {PLACES[index // len(THINGS) % len(PLACES)]}"
        for index in range(len(images))
    ]
    return float(judge.agree(list(images), prompts).mean())


def likeness(images: Sequence[Image.Image]) -> float:
    """The mean cosine between the features of two pictures of a set."""
    features = EfficientNetLite0().embed(list(images)).double()
    cosines = torch.nn.functional.normalize(features, dim=1)
    alike = cosines @ cosines.T
    return float((alike.sum() - len(images)) / (len(images) * (len(images) - 1)))


if __name__ == "__main__":
    main()
