"""Which tokens of a row the layers of a denoiser see: those of the picture, of the prompt, of both, or one for all.

What a family says of itself here is all that it takes to have an adapter work on a part of a picture. No torch.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

TokenKind = Literal["picture", "text", "both", "row"]
_NEVER = r"(?!)"


@dataclass(frozen=True, slots=True)
class Tokens:
    """`text`, `both` and `row` are patterns of the layers' names (behind the component) that see the prompt's tokens,
    the picture's and the prompt's in one sequence, or one vector a row. All others see the picture's.

    `patch`: cells a side of a token of the picture; a UNet sees it in halves, too. `text_first`: the order where both
    are one sequence. `multiple`: either is filled up to a multiple of so many tokens.
    """

    text: str = _NEVER
    both: str = _NEVER
    row: str = _NEVER
    patch: int = 1
    text_first: bool = True
    multiple: int = 1

    def kind(self, layer: str) -> TokenKind:
        """What a layer of the denoiser sees; its name without the component's."""
        return _kind(self, layer)

    def grid(self, size: tuple[int, int], tokens: int) -> tuple[int, int]:
        """How a picture of `size` cells lies in `tokens`, its filling left out: rows and columns.

        Raises ValueError if it does not.
        """
        rows, columns = (cells // self.patch for cells in size)
        if self.filled(rows * columns) == tokens:
            return rows, columns
        while rows > 1 or columns > 1:
            rows, columns = (max(1, cells // 2) for cells in (rows, columns))
            if rows * columns == tokens:
                return rows, columns
        raise ValueError(f"a picture of {size} cells is not in {tokens} tokens")

    def picture_tokens(self, size: tuple[int, int]) -> int:
        """How many tokens a picture of `size` cells has in a transformer, with its filling."""
        return self.filled(prod(cells // self.patch for cells in size))

    def filled(self, tokens: int) -> int:
        """`tokens`, up to the multiple."""
        return -(-tokens // self.multiple) * self.multiple


@lru_cache(maxsize=16384)
def _kind(tokens: Tokens, layer: str) -> TokenKind:
    kinds: tuple[tuple[TokenKind, str], ...] = (("row", tokens.row), ("text", tokens.text), ("both", tokens.both))
    return next((kind for kind, pattern in kinds if re.search(pattern, layer)), "picture")


# of a UNet with a text encoder; the layers of `attn2` that read the prompt
UNET_TOKENS = Tokens(text=r"(^|\.)attn2\.to_[kv]$", row=r"(^|\.)(time_emb_proj|time_embedding\.|add_embedding\.)")
