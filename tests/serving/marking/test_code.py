"""The code of the noise's message: any word is found, what is unmarked is not, and noise stays noise."""

import numpy as np
import torch

from serving.marking.code import BITS, log_tail, places, read, signs, words_of
from serving.marking.noise import FOUND, NoiseMark

KEY = b"k" * 32
SHAPES = ((8, 16, 16), (4, 8, 8), (16, 64, 64), (3, 5, 40))


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_serial_comes_back_from_any_shape() -> None:
    mark = NoiseMark(KEY)
    for seed, shape in enumerate(SHAPES):
        serial = mark.serial("ann", seed)
        marked = mark.put(noise(shape, seed), serial)
        reading = mark.read(marked.numpy())
        assert reading.words == words_of(marked.numel())
        assert reading.serial == serial & (1 << BITS * reading.words) - 1
        assert reading.log10 < FOUND


def test_the_same_request_gives_the_same_noise_and_another_key_tenant_or_seed_another() -> None:
    mark, shape = NoiseMark(KEY), (4, 8, 8)

    def made(mark: NoiseMark, tenant: str, seed: int) -> torch.Tensor:
        return mark.put(noise(shape, seed), mark.serial(tenant, seed))

    first = made(mark, "ann", 1)
    assert torch.equal(first, made(NoiseMark(KEY), "ann", 1))
    for other in (made(NoiseMark(b"x" * 32), "ann", 1), made(mark, "bob", 1), made(mark, "ann", 2)):
        agreeing = float((first.sign() == other.sign()).float().mean())
        assert 0.35 < agreeing < 0.65
    assert torch.equal(first.abs(), noise(shape, 1).abs())  # only signs change


def test_the_marks_noise_is_normal_and_independent_between_places_and_pictures() -> None:
    mark, pictures = NoiseMark(KEY), 3000
    drawn = torch.stack([mark.put(noise((2, 4, 4), seed), mark.serial("ann", seed)) for seed in range(pictures)])
    flat = drawn.flatten(1).double()
    means, bound = flat.mean(0), 4.5 / pictures**0.5  # 4.5 standard errors of a mean
    assert float(means.abs().max()) < bound
    assert float((flat.square().mean(0) - 1).abs().max()) < bound * 2**0.5
    products = flat.T @ flat / pictures
    assert float((products - torch.diag(products.diagonal())).abs().max()) < bound
    pairs = (flat[:-1] * flat[1:]).mean(1)  # one picture and the next
    assert abs(float(pairs.mean())) < bound


def test_the_probability_of_unmarked_noise_is_told_truly() -> None:
    place = places(KEY, 4, 8, 8)
    rng = np.random.default_rng(0)
    found = [
        read(places(bytes([turn]) * 32, 4, 8, 8), rng.normal(size=(4, 8, 8)).astype("f4"), 1).log10
        for turn in range(200)
    ]
    below = sum(log10 < -1 for log10 in found)
    assert 2 <= below <= 45  # 20 were expected of p < 0.1, were the bound over all words tight
    assert min(found) > FOUND
    steady = np.ones((4, 8, 8), dtype="f4")  # nothing about a picture but the key makes it a finding
    assert read(place, steady, 1).log10 > FOUND
    assert read(place, np.zeros((4, 8, 8), dtype="f4"), 1).log10 == 0.0


def test_words_are_found_in_much_noise_and_in_a_part() -> None:
    place = places(KEY, 4, 64, 64)
    serial = 0x123456789ABC
    marked = signs(place, serial, 3)
    blurred = marked + 3 * np.random.default_rng(0).normal(size=marked.shape).astype("f4")
    assert read(place, blurred, 3).serial == serial
    part = read(places(KEY, 4, 50, 40, 9, 13), blurred[:, 9:59, 13:53], 3)
    assert part.serial == serial and part.log10 < FOUND


def test_log_tail_is_the_normal_tail() -> None:
    assert abs(log_tail(0.0) - np.log(0.5)) < 1e-12
    assert abs(log_tail(4.7534) - np.log(1e-6)) < 1e-3
    assert abs(log_tail(7.999999) - log_tail(8.000001)) < 1e-3
    assert log_tail(60.0) < -1800


def test_an_expected_serial_is_found_in_weaker_evidence_and_costs_no_false_positives() -> None:
    rng = np.random.default_rng(1)
    serial, weak = 0x0BCD, 0
    for turn in range(40):
        place = places(bytes([turn]) * 32, 4, 16, 16)
        seen = signs(place, serial, 1) + rng.normal(0, 5.2, (4, 16, 16)).astype("f4")
        weak += read(place, seen, 1, [serial, 17]).log10 < read(place, seen, 1).log10 - 1
        unmarked = rng.normal(size=(4, 16, 16)).astype("f4")
        assert read(place, unmarked, 1, [serial, 17]).log10 > FOUND
    assert weak > 30
