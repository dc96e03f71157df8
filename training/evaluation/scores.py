"""The formulas behind the scores: pure functions of features, none of which knows the model that gave them.

Shapes: G generated pictures, P photos, N pictures of either kind, E features (rows of length 1 unless said), H and W
the cells of a feature map. Sources: likeness, PRES and DIV are DreamBooth's (Ruiz et al. 2023, section 4), with any
model; Frechet distance Heusel et al. 2017; kernel distance Binkowski et al. 2018.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

# fewer pictures than features leave the covariance singular; Inception's features are 2048
MIN_FRECHET_IMAGES = 2048
# between floor and ceiling; a narrower span is noise, and dividing by it would blow it up
MIN_SPAN = 0.05


def likeness(generated_GE: Tensor, photos_PE: Tensor) -> float:
    """The mean cosine over all pairs of a picture and a photo; DINO and CLIP-I where those gave the features."""
    return (generated_GE @ photos_PE.T).mean().item()


def mutual_likeness(photos_PE: Tensor) -> float:
    """The mean cosine over all pairs of different photos: what real pictures reach. 1 for a single photo."""
    count = len(photos_PE)
    if count < 2:
        return 1.0
    cosines_PP = photos_PE @ photos_PE.T
    return ((cosines_PP.sum() - cosines_PP.diagonal().sum()) / (count * (count - 1))).item()


def diversity(groups: Sequence[Tensor]) -> float | None:
    """The mean of 1 - cosine over pairs within each group [N, E] of pictures of one prompt; None without a pair."""
    spread = [1 - mutual_likeness(group_NE) for group_NE in groups if len(group_NE) > 1]
    return sum(spread) / len(spread) if spread else None


def drift(worn_NE: Tensor, bare_NE: Tensor) -> float:
    """The mean of 1 - cosine between a picture with the adapter and the base's own of the same prompt and seed."""
    return (1 - (worn_NE * bare_NE).sum(1)).mean().item()


def share(value: float, floor: float, ceiling: float) -> float:
    """Where `value` lies between `floor` (0) and `ceiling` (1), clipped. The span is MIN_SPAN at least."""
    return min(1.0, max(0.0, (value - floor) / max(ceiling - floor, MIN_SPAN)))


# -- copying --


def spatial_features(maps_NEHW: Tensor) -> Tensor:
    """Maps as rows [N, E x H x W] of length 1, every cell of length 1 before: their product is the mean cosine of
    cells at the same place."""
    cells_NEHW = functional.normalize(maps_NEHW.float(), dim=1)
    return functional.normalize(cells_NEHW.flatten(1), dim=1)


def nearest(generated_GF: Tensor, photos_PF: Tensor) -> Tensor:
    """Each picture's cosine to the nearest photo [G]; give the photos' mirror images too."""
    return (generated_GF @ photos_PF.T).amax(1)


def copying(generated_GF: Tensor, photos_PF: Tensor) -> float:
    """The 95th percentile of `nearest`: one chance likeness in twenty pictures is no alarm."""
    return torch.quantile(nearest(generated_GF, photos_PF).double(), 0.95).item()


# -- distances of distributions; they are FID and KID only of Inception's features --


class Distance(NamedTuple):
    """A distance and what must be said beside it, if anything."""

    value: float
    warning: str | None


def frechet_distance(a_NE: Tensor, b_NE: Tensor) -> Distance:
    """Between Gaussians fitted to two sets of features (not normalised)."""
    a, b = a_NE.double(), b_NE.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (a, b))
    # the trace of (cov_a cov_b)^1/2 through a symmetric product, whose eigenvalues are real
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    value = (mean + cov_a.trace() + cov_b.trace() - 2 * cross).item()
    return Distance(max(0.0, value), _few(min(len(a), len(b))))


def _few(count: int) -> str | None:
    if count >= MIN_FRECHET_IMAGES:
        return None
    return f"only {count} pictures, {MIN_FRECHET_IMAGES} are needed: the value is biased upwards and compares nothing"


def kernel_distance(a_NE: Tensor, b_NE: Tensor) -> float:
    """The unbiased squared MMD of features (not normalised) with the kernel (x.y / E + 1)^3. May be below 0."""
    a, b = a_NE.double(), b_NE.double()
    kernel_aa, kernel_bb, kernel_ab = _cubic(a, a), _cubic(b, b), _cubic(a, b)
    within_a = (kernel_aa.sum() - kernel_aa.diagonal().sum()) / (len(a) * (len(a) - 1))
    within_b = (kernel_bb.sum() - kernel_bb.diagonal().sum()) / (len(b) * (len(b) - 1))
    return (within_a + within_b - 2 * kernel_ab.mean()).item()


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


# -- image quality, without a model --


def detail(image: Image.Image) -> float:
    """The variance of the Laplacian of the luminance (0..1) over the picture's own variance: fine detail, whatever the
    contrast. Blur lowers it; noise raises it."""
    grey_HW = np.asarray(image.convert("L"), np.float64) / 255
    inner = grey_HW[1:-1, 1:-1]
    edges = grey_HW[2:, 1:-1] + grey_HW[:-2, 1:-1] + grey_HW[1:-1, 2:] + grey_HW[1:-1, :-2] - 4 * inner
    return float(edges.var() / max(float(inner.var()), 1e-6))


def saturation(image: Image.Image) -> float:
    """The mean of HSV's saturation, 0 (grey) to 1."""
    return float(np.asarray(image.convert("HSV"), np.float64)[:, :, 1].mean() / 255)
