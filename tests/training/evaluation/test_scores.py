"""Every formula against an oracle: a closed form, a loop, or another library's own arithmetic."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.nn import functional

from training.evaluation import scores


def _rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, width, generator=generator))


def test_likeness_is_the_mean_over_all_pairs() -> None:
    pictures, photos = _rows(4, 8), _rows(3, 8, seed=1)
    pairs = [float(a @ b) for a in pictures for b in photos]
    assert scores.likeness(pictures, photos) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_mutual_likeness_leaves_out_a_photo_with_itself() -> None:
    photos = _rows(4, 8)
    pairs = [float(a @ b) for i, a in enumerate(photos) for j, b in enumerate(photos) if i != j]
    assert scores.mutual_likeness(photos) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert scores.mutual_likeness(photos[:1]) == 1.0


def test_diversity_of_right_angles_is_one_and_of_copies_zero() -> None:
    assert scores.diversity([torch.eye(3)]) == pytest.approx(1.0)
    assert scores.diversity([_rows(1, 4).expand(3, 4)]) == pytest.approx(0.0, abs=1e-6)
    assert scores.diversity([torch.eye(3), _rows(1, 4).expand(3, 4)]) == pytest.approx(0.5, abs=1e-6)
    assert scores.diversity([torch.eye(3)[:1]]) is None


def test_drift_compares_row_by_row() -> None:
    rows = torch.eye(3)
    assert scores.drift(rows, rows) == pytest.approx(0.0)
    assert scores.drift(rows, rows.roll(1, 0)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("value", "floor", "ceiling", "expected"),
    [(0.3, 0.3, 0.7, 0.0), (0.7, 0.3, 0.7, 1.0), (0.5, 0.3, 0.7, 0.5), (0.9, 0.3, 0.7, 1.0), (0.1, 0.3, 0.7, 0.0)],
)
def test_share_runs_from_floor_to_ceiling(value: float, floor: float, ceiling: float, expected: float) -> None:
    assert scores.share(value, floor, ceiling) == pytest.approx(expected)


def test_share_of_a_span_too_narrow_is_not_blown_up() -> None:
    assert scores.share(0.501, 0.5, 0.5001) == pytest.approx(0.001 / scores.MIN_SPAN)


def test_spatial_features_see_where_things_are() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 6, 4, 4, generator=generator)
    same = scores.spatial_features(torch.cat([maps, maps * 3, maps.flip(3)]))
    cosines = same @ same.T
    assert cosines[0, 1] == pytest.approx(1.0, abs=1e-6)
    cells = functional.cosine_similarity(maps, maps.flip(3), dim=1).mean()
    assert cosines[0, 2] == pytest.approx(float(cells), abs=1e-6)


def test_copying_is_the_95th_percentile_of_the_nearest_photo() -> None:
    photos = torch.eye(4)[:2]
    pictures = functional.normalize(torch.rand(40, 4, generator=torch.Generator().manual_seed(2)))
    nearest = [max(float(p @ a), float(p @ b)) for p in pictures for a, b in [photos]]
    assert scores.copying(pictures, photos) == pytest.approx(float(np.percentile(nearest, 95)), abs=1e-6)


def test_frechet_distance_of_one_dimension_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(500, 1, generator=generator), 2 * torch.randn(400, 1, generator=generator) + 3
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert scores.frechet_distance(a, b).value == pytest.approx(float(expected), rel=1e-5)


def test_frechet_distance_equals_the_matrix_square_root() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(5, 5, generator=generator)
    a, b = torch.randn(200, 5, generator=generator) @ mix, torch.randn(300, 5, generator=generator) + 1
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    roots = np.linalg.eigvals(cov_a @ cov_b)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(cov_a + cov_b)
    expected -= 2 * np.sqrt(roots.real).sum()
    assert scores.frechet_distance(a, b).value == pytest.approx(expected, rel=1e-5)
    assert scores.frechet_distance(a, a).value == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_of_few_pictures_says_so() -> None:
    assert "only 20 pictures" in (scores.frechet_distance(_rows(20, 3), _rows(30, 3)).warning or "")
    many = torch.randn(scores.MIN_FRECHET_IMAGES, 2)
    assert scores.frechet_distance(many, many).warning is None


def test_kernel_distance_equals_the_loop() -> None:
    a, b = _rows(6, 4), _rows(5, 4, seed=1) + 0.3

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return (float(x.double() @ y.double()) / 4 + 1) ** 3

    within_a = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    within_b = [kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
    across = [kernel(x, y) for x in a for y in b]
    expected = np.mean(within_a) + np.mean(within_b) - 2 * np.mean(across)
    assert scores.kernel_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    values = [scores.kernel_distance(_rows(50, 8, 2 * i), _rows(50, 8, 2 * i + 1)) for i in range(20)]
    assert abs(sum(values) / 20) < 3e-3


def test_detail_falls_with_blur_and_ignores_contrast() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    assert scores.detail(image.filter(ImageFilter.GaussianBlur(2))) < scores.detail(image) / 4
    faded = Image.fromarray((noise // 2 + 64).astype(np.uint8))
    assert scores.detail(faded) == pytest.approx(scores.detail(image), rel=0.05)
    assert scores.detail(Image.new("RGB", (8, 8))) == 0


@pytest.mark.parametrize(("colour", "expected"), [((255, 0, 0), 1.0), ((128, 128, 128), 0.0), ((200, 100, 100), 0.5)])
def test_saturation_is_that_of_hsv(colour: tuple[int, int, int], expected: float) -> None:
    assert scores.saturation(Image.new("RGB", (4, 4), colour)) == pytest.approx(expected, abs=0.01)
    assert math.isfinite(scores.saturation(Image.new("RGB", (4, 4))))
