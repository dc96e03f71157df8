"""What every format's reader takes and fills: a tensor file, and the halves of modules found so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from training.adapters.adapter import METADATA, Adapter, AdapterError, some

OWN = "dreamfleet."  # prefix of our metadata in other programs' files


@dataclass(frozen=True)
class ImportedFile:
    """One tensor file of an import; `config` holds PEFT's settings of its folder."""

    name: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    config: Mapping[str, object] | None = None


@dataclass
class ImportedParts:
    """What the files of one import have given so far."""

    modules: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # key -> down, up, alpha
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # the files' own metadata
    unused: list[str] = field(default_factory=list)

    def add(self, module: str, part: str, tensor: torch.Tensor) -> None:
        """Takes one part of a module; the same again is no harm, something else is an error."""
        half = self.modules.setdefault(module, {})
        if part in half and not torch.equal(half[part], tensor):
            raise AdapterError(f"Module {module} occurs twice with different values of {part!r}.")
        half[part] = tensor

    def embed(self, token: str, vectors: torch.Tensor) -> None:
        """Takes the embedding of a token."""
        if token in self.embeddings and not torch.equal(self.embeddings[token].float(), vectors.float()):
            raise AdapterError(f"Token {token} occurs twice with different values.")
        self.embeddings[token] = vectors


def own_metadata(adapter: Adapter) -> dict[str, str]:
    """What of the adapter's metadata an export keeps, under names of our own."""
    return {OWN + key: adapter.metadata[key] for key in METADATA if adapter.metadata.get(key)}


def halves(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` in float16 on the CPU; raises AdapterError where a value does not fit."""
    made = {key: tensor.detach().to("cpu", torch.float16) for key, tensor in tensors.items()}
    bad = [key for key, tensor in made.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise AdapterError(f"{len(bad)} tensors have values that float16 cannot hold: {some(bad)}.")
    return made
