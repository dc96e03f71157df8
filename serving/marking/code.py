"""The code of the noise's message: every value of the first latents carries one parity of a 16-bit word, as its sign.

Which parity, and a sign that hides it, come from the key and the value's place alone. Each sign is therefore even over
words, and so is each pair of places with different parities: latents of different words are independent normal noise.
Reading is exact maximum likelihood over all 65536 words by one fast Walsh-Hadamard transform (Green 1966), and its
false-positive probability holds for any picture: were the key another one, every sign would be a fair coin.

Shape suffixes: C, H, W a latent's; W words, M the 65536 messages of a word.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BITS = 16  # of a word
TILE = 32  # cells a side that are drawn from the key at once
WIDE = 8192  # values of latents that carry `MOST` words, and fewer than that one
MOST = 3

Reals = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Places:
    """What the key says of every place of latents [C, H, W]: its parity mask (1 to 65535), hiding sign and word."""

    masks_CHW: Ints
    signs_CHW: Reals
    parts_CHW: Ints


def places(key: bytes, channels: int, height: int, width: int, top: int = 0, left: int = 0) -> Places:
    """The places of latents whose upper left cell is (`top`, `left`) of the endless plane that the key draws."""
    down = range(top // TILE, (top + height - 1) // TILE + 1)
    across = range(left // TILE, (left + width - 1) // TILE + 1)
    rows = [np.concatenate([_tile(key, channels, y, x) for x in across], axis=2) for y in down]
    top, left = top - down[0] * TILE, left - across[0] * TILE
    plane = np.concatenate(rows, axis=1)[:, top : top + height, left : left + width]
    masks = (plane & 0xFFFF).astype(np.int64)
    signs = np.where(plane >> 16 & 1, np.float32(1), np.float32(-1))
    return Places(np.where(masks == 0, 1, masks), signs, (plane >> 17).astype(np.int64) % MOST)


def words_of(values: int) -> int:
    """How many words latents of so many values carry."""
    return MOST if values >= WIDE else 1


def signs(place: Places, serial: int, words: int) -> Reals:
    """The signs [C, H, W] (1 or -1) that say the first `words` words of a serial."""
    part = place.parts_CHW % words
    word = np.array([serial >> BITS * index & 0xFFFF for index in range(words)])[part]
    return place.signs_CHW * (1 - 2 * _parity(place.masks_CHW & word)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Reading:
    """The most likely message of latents. `log10` is that of the probability that unmarked latents read as well."""

    serial: int
    words: int
    log10: float
    z: float  # in standard deviations: of all words together for an expected serial, else of the weakest word


def read(place: Places, evidence_CHW: Reals, words: int, expected: Sequence[int] = ()) -> Reading:
    """The best message. `evidence_CHW`: how sure each sign is, with that sign; zero where nothing is known.

    `expected` are serials that are likelier than others for a reason that the key knows nothing of: half of the false
    positives are theirs, so each may be found in far weaker evidence than one of all messages.
    """
    part = place.parts_CHW % words
    scores_WM, spreads = [], []
    for index in range(words):
        chosen = part == index
        weights = (evidence_CHW * place.signs_CHW)[chosen].astype(np.float64)
        spreads.append(float((weights**2).sum()))
        scores_WM.append(_hadamard(np.bincount(place.masks_CHW[chosen], weights, 1 << BITS).astype(np.float64)))
    best = _likeliest(scores_WM, spreads)
    known = sorted({serial & (1 << BITS * words) - 1 for serial in expected})
    if not known:
        return best
    best = replace(best, log10=min(0.0, best.log10 + math.log10(2)))
    return min(best, _expected(scores_WM, spreads, known), key=lambda reading: reading.log10)


def _likeliest(scores_WM: Sequence[NDArray[np.float64]], spreads: Sequence[float]) -> Reading:
    """The best of all messages, word by word."""
    serial, weakest, log = 0, math.inf, 0.0
    for index, (scores_M, spread) in enumerate(zip(scores_WM, spreads, strict=True)):
        word = int(scores_M.argmax())
        z = float(scores_M[word]) / math.sqrt(spread) if spread else 0.0
        serial |= word << BITS * index
        weakest = min(weakest, z)
        log += min(0.0, log_tail(z) + BITS * math.log(2))
    return Reading(serial, len(spreads), _together(log, len(spreads)) / math.log(10), weakest)


def _expected(scores_WM: Sequence[NDArray[np.float64]], spreads: Sequence[float], known: Sequence[int]) -> Reading:
    """The best of the serials `known`; half of the false positives are theirs together."""

    def score(serial: int) -> float:
        return sum(float(scores_M[serial >> BITS * index & 0xFFFF]) for index, scores_M in enumerate(scores_WM))

    serial, spread = max(known, key=score), sum(spreads)
    z = score(serial) / math.sqrt(spread) if spread else 0.0
    return Reading(serial, len(spreads), min(0.0, (log_tail(z) + math.log(2 * len(known))) / math.log(10)), z)


def log_tail(z: float) -> float:
    """The natural logarithm of the probability that a normal variable exceeds `z`; also for z where it underflows."""
    if z < 8:
        return math.log(0.5 * math.erfc(z / math.sqrt(2)))
    return -z * z / 2 - math.log(z * math.sqrt(2 * math.pi)) + math.log1p(-1 / z**2 + 3 / z**4)


def _together(log: float, tests: int) -> float:
    """The log-probability that `tests` independent p-values have a product of at most e^`log` (Fisher 1932)."""
    terms = [tests_done * math.log(max(-log, 1e-300)) - math.lgamma(tests_done + 1) for tests_done in range(tests)]
    most = max(terms)
    return min(0.0, log + most + math.log(sum(math.exp(term - most) for term in terms)))


def _hadamard(values_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """sum over h of values[h] (-1)^<h, m>, for every message m."""
    values = values_M
    for _ in range(BITS):  # each round transforms one bit and turns the axes, so all rounds are alike
        pairs = values.reshape(2, -1)
        values = np.stack([pairs[0] + pairs[1], pairs[0] - pairs[1]], axis=1).reshape(-1)
    return values


def _parity(values: Ints) -> Ints:
    for shift in (8, 4, 2, 1):
        values = values ^ values >> shift
    return values & 1


@lru_cache(maxsize=256)
def _tile(key: bytes, channels: int, down: int, across: int) -> NDArray[np.uint32]:
    """Random numbers [C, TILE, TILE] of one tile; each channel has its own stream, so latents may have any number."""
    drawn = [
        hashlib.shake_256(b"dreamfleet noise mark 1|%s|%d|%d|%d" % (key, channel, down, across)).digest(4 * TILE * TILE)
        for channel in range(channels)
    ]
    return np.stack([np.frombuffer(one, dtype="<u4").reshape(TILE, TILE) for one in drawn])
