"""Where in its row an adapter is worn: a weight for each cell of the picture and each token of the prompt.

Shape suffixes: N rows, K adapters of a row, H and W cells of the latent or of a layer's grid, T tokens as a layer sees
them. A layer that sees one vector a row has the mean over the picture there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from training.base.tokens import TokenKind, Tokens

Places = tuple[int, ...] | None  # the tokens of a prompt that wear an adapter; None is all of them


class Coverage:
    """`picture_NKHW` in 0 to 1, by cell; `places_NK[n][k]` the tokens of row n's prompt.

    `further`: tokens of other pictures behind a row's own, which are of no place in it.

    What a layer asks for is laid out once, and kept: a coverage is used for as many steps as its route.
    """

    def __init__(
        self, tokens: Tokens, picture_NKHW: Tensor, places_NK: Sequence[Sequence[Places]], further: int = 0
    ) -> None:
        self._tokens = tokens
        self._picture_NKHW = picture_NKHW
        self._further = further
        self._places_NK = tuple(map(tuple, places_NK))
        self._mean_NK = picture_NKHW.mean(dim=(2, 3))
        self._known: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def of_tokens(self, kind: TokenKind, count: int, like: Tensor) -> Tensor:
        """The weights [N, T, K] of `count` tokens a row, on the device and in the dtype of `like`."""
        key: tuple[str, tuple[int, ...], torch.dtype] = (kind, (count,), like.dtype)
        if key not in self._known:
            self._known[key] = self._lay_out(kind, count).transpose(1, 2).to(like).contiguous()
        return self._known[key]

    def of_cells(self, size: tuple[int, int], like: Tensor) -> Tensor:
        """The weights [N, K, H x W] of a convolution's outputs of `size`."""
        key: tuple[str, tuple[int, ...], torch.dtype] = ("picture", size, like.dtype)
        if key not in self._known:
            self._known[key] = self._at(size).flatten(2).to(like)
        return self._known[key]

    def _lay_out(self, kind: TokenKind, count: int) -> Tensor:
        """[N, K, T]."""
        if kind == "row":
            return self._mean_NK[:, :, None].expand(-1, -1, count)
        if kind == "text":
            return self._text(count)
        if kind == "picture":
            return self._filled(self._at(self._tokens.grid(self._size, count - self._further)).flatten(2), count)
        picture = self._tokens.picture_tokens(self._size) + self._further
        parts = self._lay_out("picture", picture), self._text(count - picture)
        return torch.cat(parts[::-1] if self._tokens.text_first else parts, dim=2)

    @property
    def _size(self) -> tuple[int, int]:
        height, width = self._picture_NKHW.shape[2:]
        return height, width

    def _at(self, size: tuple[int, int]) -> Tensor:
        """The picture's cells averaged over those of a layer's grid."""
        if size == self._size:
            return self._picture_NKHW
        return functional.adaptive_avg_pool2d(self._picture_NKHW, size)

    def _filled(self, weights_NKT: Tensor, count: int) -> Tensor:
        """What fills a picture up, or is another one, is of no place: it has the mean."""
        fill = count - weights_NKT.shape[2]
        return torch.cat([weights_NKT, self._mean_NK[:, :, None].expand(-1, -1, fill)], 2) if fill else weights_NKT

    def _text(self, count: int) -> Tensor:
        weights_NKT = torch.ones(*self._mean_NK.shape, count)
        for n, row in enumerate(self._places_NK):
            for k, places in enumerate(row):
                if places is not None:
                    weights_NKT[n, k] = 0
                    weights_NKT[n, k, [place for place in places if place < count]] = 1
        return weights_NKT
