"""Regions as the bank takes them: weights of cells, tokens of words, and the coverage of rows and of prompts.

Shape suffixes: N rows, K adapters of a row, h and w cells of the latent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine.region import Region, spans_of_words
from serving.errors import Refused
from training.adapters.bank import Bank, Route
from training.adapters.coverage import Coverage, Places
from training.base.base import Base
from training.base.family import Wording, Words
from training.base.tokens import TokenKind


def share_of_cells(region: Region | None, size: tuple[int, int]) -> Tensor:
    """How much of each cell a region covers, float32 [h, w] in 0 to 1."""
    height, width = size
    if region is None:
        return torch.ones(size)
    if region.cells is not None:
        if len(region.cells) != height * width:
            raise Refused(f"A region has {len(region.cells)} cells; the picture has {height} x {width}.")
        return torch.frombuffer(bytearray(region.cells), dtype=torch.uint8).reshape(size).float() / 255
    if region.box is None:
        return torch.ones(size)
    left, top, right, bottom = region.box
    short = min(size)
    down_h = _along(height, top, bottom, region.feather * short / height)
    across_w = _along(width, left, right, region.feather * short / width)
    return down_h[:, None] * across_w[None, :]


def _along(count: int, start: float, end: float, feather: float) -> Tensor:
    """The cover of `count` cells in a row by the part from `start` to `end`, whose edges fall off over `feather`.

    An edge is never sharper than a cell, so that without feather a cell has the share that is covered. The border of
    the picture is no edge.
    """
    middles = (torch.arange(count) + 0.5) / count
    fall = max(feather, 1 / count)
    covered = torch.ones(count)
    if start > 0:
        covered = covered * ((middles - start) / fall + 0.5).clamp(0, 1)
    if end < 1:
        covered = covered * ((end - middles) / fall + 0.5).clamp(0, 1)
    return covered


def places_of(base: Base, prompt: Wording, regions: Sequence[Region | None], words: Words) -> tuple[Places, ...]:
    """The tokens of `prompt` that wear each region's adapter. Raises Refused for words that are cut off or not there.

    `words` are the trained words that the prompt may use.
    """
    found: list[Places] = []
    for region, spans in zip(regions, spans_of_words(str(prompt), regions), strict=True):
        places = None if spans is None else tuple(base.family.places(base.parts, prompt, spans, words))
        if region is not None and region.words and not places:
            raise Refused(f"The words {', '.join(map(repr, region.words))} are not among the tokens of the prompt.")
        found.append(places)
    return tuple(found)


def without_words(regions: Sequence[Region | None]) -> tuple[Places, ...]:
    """The same for a negative prompt, in which none of the words stands."""
    return tuple(None if region is None or region.words is None else () for region in regions)


def cover_rows(
    routes: Sequence[Route],
    bank: Bank,
    base: Base,
    pictures: Sequence[Tensor | None],
    places: Sequence[tuple[Places, ...] | None],
    further: int = 0,
) -> list[Route]:
    """`routes` worn only where the rows' `pictures` [K, h, w] and `places` say; None is everywhere.

    `further`: tokens of other pictures behind the row's own.

    Rows with fewer adapters than others are filled up, as `make_routes` does. If no row says anything, nothing is
    changed.
    """
    sizes = {tuple(picture.shape[1:]) for picture in pictures if picture is not None}
    if not routes or not sizes:
        return list(routes)
    (size,) = sizes
    k = max(len(picture) for picture in pictures if picture is not None)
    k = max(k, *(len(row) for row in places if row is not None), 1)
    picture_NKhw = torch.ones(len(pictures), k, *size)
    filled: list[list[Places]] = []
    for n, (picture, row) in enumerate(zip(pictures, places, strict=True)):
        if picture is not None:
            picture_NKhw[n, : len(picture)] = picture
        filled.append([*(row or ()), *[None] * (k - len(row or ()))])
    coverage = Coverage(base.facts.tokens, picture_NKhw, filled, further)
    return [route.covered(coverage, _kinds(route, bank, base)) for route in routes]


def _kinds(route: Route, bank: Bank, base: Base) -> dict[int, TokenKind]:
    """What each layer that a route changes sees; a text encoder's see the prompt, but for its last projection."""
    name, sites = route.component, bank.sites[route.component]
    if name == base.facts.denoiser:
        return {index: base.facts.tokens.kind(sites[index].key.removeprefix(f"{name}.")) for index in route.deltas}
    return {index: "row" if sites[index].key.endswith("text_projection") else "text" for index in route.deltas}
