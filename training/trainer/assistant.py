"""An adapter that every row wears while others train, and nobody afterwards: it undoes a distilled base's distillation.

What subjects learn over it works on the distilled base without it. It lies over the base in a bank of one slot.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from training.adapters.adapter import Adapter, check_adapter
from training.adapters.bank import Bank
from training.adapters.formats.formats import import_adapter
from training.base.base import Base
from training.base.files.outline import outline
from training.errors import UserError
from training.sampling.render import adapter_bank
from training.storage.file_hash import hash_file

MAX_RANK = 1024


class Assistant:
    """The adapter in its bank, which is injected until `close`."""

    def __init__(self, base: Base, adapter: Adapter) -> None:
        self._bank: Bank = adapter_bank(base, [adapter])
        self._dtype = base.dtype
        self._bank.inject()

    def close(self) -> None:
        """Takes it off the base, which is then as it was."""
        self._bank.eject()

    @contextmanager
    def worn(self, rows: int) -> Iterator[None]:
        """All of so many rows of the denoiser wear it inside."""
        slots = torch.zeros(rows, 1, dtype=torch.int64)
        with ExitStack() as stack:
            routes = [self._bank.route(component, slots, dtype=self._dtype) for component in self._bank.sites]
            stack.enter_context(self._bank.using(*routes))
            yield


def read_training_adapter(base: Base, path: str | None, root: str, expected: str) -> tuple[Base, Adapter | None]:
    """The base as it is known while the adapter of a file is worn, and that adapter; without a file the base alone.

    Raises UserError for a file that has changed since the run began, does not fit, or changes more than the denoiser.
    """
    if path is None:
        return base, None
    file = Path(root, path)
    if not file.is_file():
        raise UserError(f"training_adapter '{path}': there is no file '{file}' here. Put it on every node.")
    found = hash_file(file)
    if expected and found != expected:
        raise UserError(f"training_adapter '{path}' is not the file that the run began with ({found[:12]}).")
    of = outline(str(base.folder))
    adapter = import_adapter({file.name: file.read_bytes()}, of.shapes, of.names)
    check_adapter(adapter, of.shapes, MAX_RANK)
    others = [key for key in adapter.modules if not key.startswith(f"{base.facts.denoiser}.")]
    if others or adapter.embeddings:
        raise UserError(f"training_adapter '{path}' changes text encoders or words; one that is worn by all may not.")
    return replace(base, worn=found), adapter
