"""A safetensors file as bytes: written the same way every time, read only after its header was checked.

Owns the container: header, order, limits. Knows nothing about what the tensors mean. The writer is our own because the
library orders metadata differently from call to call, and a version is the hash of its bytes.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch

from training.errors import UserError

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4096
MAX_FILE_BYTES = 1 << 30
_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_NUMBERS = ("F64", "I64", "I32", "I16", "I8", "U8")  # types that a single number may have, such as kohya's alpha


class TensorFileError(UserError):
    """The bytes are no safetensors file that may be loaded."""


class TensorFile(NamedTuple):
    """What a file holds."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of floating-point `tensors`. Equal content gives equal bytes, whatever its order."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    body = []
    offset = 0
    for name in sorted(tensors):
        data = _bytes(tensors[name])
        shape, end = list(tensors[name].shape), offset + len(data)
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [offset, end]}
        body.append(data)
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return len(text).to_bytes(8, "little") + text + b"".join(body)


def read_tensors(data: bytes, what: str = "file", max_bytes: int = MAX_FILE_BYTES) -> TensorFile:
    """What the safetensors file `data` holds; raises TensorFileError, naming `what`, before anything is allocated.

    Floating-point tensors of at most 32 bits pass, and single numbers of any type, which become float32.
    """
    if len(data) > max_bytes:
        raise TensorFileError(f"{what} has {len(data)} bytes; at most {max_bytes} are allowed.")
    header = _header(data, what)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileError(f"{what} has metadata that is no map of strings. Write it again with safetensors.")
    if len(header) > MAX_TENSORS:
        raise TensorFileError(f"{what} holds {len(header)} tensors; at most {MAX_TENSORS} are allowed.")
    for name, entry in header.items():
        dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        if dtype not in _DTYPES.values() and not (dtype in _NUMBERS and shape in ([], [1])):
            raise TensorFileError(f"{what}: tensor {name!r} has type {dtype!r}; use {', '.join(_DTYPES.values())}.")
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise TensorFileError(f"{what} is no valid safetensors file: {error}. Upload it again, whole.") from error
    return TensorFile({name: t if t.dtype in _DTYPES else t.float() for name, t in tensors.items()}, metadata)


def _header(data: bytes, what: str) -> dict[str, object]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise TensorFileError(
            f"{what} is no safetensors file or is cut short. Only safetensors is read; never pickles."
        )
    if size > MAX_HEADER_BYTES:
        raise TensorFileError(f"{what} has a header of {size} bytes; at most {MAX_HEADER_BYTES} are allowed.")
    try:
        header = json.loads(data[8 : 8 + size], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise TensorFileError(f"{what} has a broken safetensors header: {error}.") from error
    if not isinstance(header, dict):
        raise TensorFileError(f"{what} has a broken safetensors header: no map.")
    return header


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object without repeated names, which readers would understand differently from each other."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return np.asarray(flat.view(torch.uint8) if flat.numel() else flat).tobytes()
