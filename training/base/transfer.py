"""What goes from the host to the device: in one transfer, or kept there where it is the same step after step.

A transfer of its own for every small tensor costs a launch each, and one from ordinary memory makes the host wait.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

ALIGNED = 16  # bytes: where each tensor begins, so that it can be viewed as any dtype


def send(device: torch.device, tensors: Sequence[Tensor]) -> list[Tensor]:
    """CPU tensors of any dtypes and shapes on `device`, as views of one buffer; on the CPU themselves.

    One transfer, which the host does not wait for: the buffer's memory is pinned where there is CUDA.
    """
    if device.type == "cpu":
        return list(tensors)
    return views(packed(tensors, pinned=device.type == "cuda").to(device, non_blocking=True), tensors)


def packed(tensors: Sequence[Tensor], *, pinned: bool = False) -> Tensor:
    """The bytes of CPU tensors, one after another."""
    starts, end = _starts(tensors)
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    for start, tensor in zip(starts, tensors, strict=True):
        buffer[start : start + tensor.nbytes].copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
    return buffer


def views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `packed`, without a copy: tensors of the dtypes and shapes of `like`."""
    return [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(_starts(like)[0], like, strict=True)
    ]


def _starts(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins, and where the last one ends."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNED) * ALIGNED
    return starts, end


@lru_cache(maxsize=4096)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a tensor [len(values)] on `device`, sent once and kept: never write to it."""
    with torch.inference_mode(False):  # else it could not be used where gradients are taken
        wide = torch.tensor(values, dtype=torch.float64 if dtype.is_floating_point else torch.long)
        return wide.to(dtype).to(device)


@lru_cache(maxsize=256)
def positions(sides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every place [T, len(sides)] in a box of `sides`, the last counted fastest; sent once, as `constant`."""
    with torch.inference_mode(False):
        return torch.cartesian_prod(*map(torch.arange, sides)).to(dtype).to(device)
