"""Prompts of a base whose text encoders are frozen: encoded once a text; the encoders are on the device meanwhile only.

A language model that encodes prompts is as large as the denoiser, and what it says of a text never changes. So it waits
in host memory, and so does what it said. Each text is encoded by itself: its record depends on nothing else.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from training.base.family import Cond, Wording

HOST = torch.device("cpu")
HOST_BYTES = 8 * 2**30  # of records; the longest unused go first

Encode = Callable[[Wording, int], Cond]  # of a text and the chunks that it is cut after


class FrozenPrompts:
    """Records by text. `encoders` are moved to `device` for texts that are not known, and back."""

    def __init__(self, encoders: Mapping[str, nn.Module], device: torch.device, limit: int = HOST_BYTES) -> None:
        self._encoders = encoders
        self._device = device
        self._limit = limit
        self._known: OrderedDict[tuple[Wording, int], Cond] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Wording], chunks: int, run: Encode) -> list[Cond]:
        """The record of each prompt, on the device; `run` encodes one, with the encoders there."""
        wanted = [(prompt, chunks) for prompt in prompts]
        fresh = {key: self._known.get(key) for key in dict.fromkeys(wanted)}
        if unknown := [key for key, cond in fresh.items() if cond is None]:
            with self._there():
                for key in unknown:
                    fresh[key] = {name: part.to(HOST) for name, part in run(*key).items()}
        for key, cond in fresh.items():
            assert cond is not None
            self._keep(key, cond)
        there = {key: self._on_device(cond) for key, cond in fresh.items() if cond is not None}
        return [there[key] for key in wanted]

    @contextmanager
    def _there(self) -> Iterator[None]:
        for encoder in self._encoders.values():
            encoder.to(self._device)
        try:
            yield
        finally:
            for encoder in self._encoders.values():
                encoder.to(HOST)

    def _on_device(self, cond: Cond) -> Cond:
        return {name: part.to(self._device) for name, part in cond.items()}

    def _keep(self, key: tuple[Wording, int], cond: Cond) -> None:
        if key not in self._known:
            self._known[key] = cond
            self._bytes += _size(cond)
        self._known.move_to_end(key)
        while self._bytes > self._limit and len(self._known) > 1:
            self._bytes -= _size(self._known.popitem(last=False)[1])


def _size(cond: Cond) -> int:
    return sum(part.nbytes for part in cond.values())
