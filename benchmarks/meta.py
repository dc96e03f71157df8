"""Counts of work on torch's meta device, where every shape is there and nothing is computed: exact, and without a GPU.

A kernel is a call of an operator that computes (views are none); attention is one, as where it is fused. A read is a
value that the host waits for, an upload one that it sends. Nothing here knows what is counted.
"""

import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")
ROOT = Path(__file__).parent.parent
NO_WORK = {"_unsafe_view", "lift_fresh", "detach", "alias"}
READS = {
    Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.nonzero, torch.nonzero,
    Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__,
}  # fmt: skip
NEW = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
INDEXED = {Tensor.__getitem__, Tensor.__setitem__}


@dataclass
class Counts:
    """What a piece of work does. `bytes` are read and written by kernels; `peak_bytes` are made and alive at once."""

    kernels: int = 0
    casts: int = 0
    flops: int = 0
    bytes: int = 0
    host_reads: int = 0
    uploads: int = 0
    peak_bytes: int = 0
    by_operator: Counter[str] = field(default_factory=Counter)
    by_place: Counter[str] = field(default_factory=Counter)  # where the reads and uploads are in the program
    work: list[tuple[int, int]] = field(default_factory=list)  # FLOPs and bytes of each kernel

    def seconds(self, flops: float, bytes: float, launch_s: float) -> float:
        """A roofline: no kernel takes less than its FLOPs or bytes at these rates a second, or than a launch."""
        return sum(max(work / flops, moved / bytes, launch_s) for work, moved in self.work)


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts what is done on the meta device inside. Values that the host reads of it are ones."""
    counts = Counts()
    with _Border(counts), _Kernels(counts):
        yield counts


class _Kernels(TorchDispatchMode):
    """Counts operators as they are dispatched, those of backward too."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts
        self._alive: set[int] = set()
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # in inference mode, operators come here before they are taken apart
        if torch.is_inference_mode_enabled() and func.overloadpacket not in flop_registry:
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.device == META]
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.device == META]
        name = str(func.overloadpacket).removeprefix("aten.")
        if (read or made) and not func.is_view and name not in NO_WORK:
            flop = flop_registry.get(func.overloadpacket)
            flops = int(flop(*args, **(kwargs or {}), out_val=out)) if flop else 0
            self._add(name, flops, sum(tensor.numel() * tensor.element_size() for tensor in (*read, *made)))
            for tensor in made:
                self._keep(tensor)
        return out

    def _add(self, name: str, flops: int, moved: int) -> None:
        counts = self._counts
        counts.kernels += 1
        counts.casts += name == "_to_copy"
        counts.flops += flops
        counts.bytes += moved
        counts.by_operator[name] += 1
        counts.work.append((flops, moved))

    def _keep(self, tensor: Tensor) -> None:
        """Counts a tensor's memory until nobody holds it."""
        memory = tensor.untyped_storage()
        key, size = memory._cdata, memory.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self._bytes += size
            self._counts.peak_bytes = max(self._counts.peak_bytes, self._bytes)
            weakref.finalize(memory, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._bytes -= size


class _Border(TorchFunctionMode):
    """Counts what crosses between host and device, and stands in for it: meta tensors have no values."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        on_meta = first is not None and first.device == META
        if func is functional.scaled_dot_product_attention and on_meta:
            return _attention(*args, **named)
        if on_meta and func in READS:
            return self._read(func, first)
        if on_meta and func is Tensor.to and _goes_to(args[1:], named, "cpu"):
            return self._read(Tensor.cpu, first)
        if on_meta and func in INDEXED:
            self._index(args[1])
        sent = func is Tensor.to and first is not None and not on_meta and _goes_to(args[1:], named, "meta")
        if sent or (func in NEW and (on_meta or _goes_to((), named, "meta"))):
            self._counts.uploads += 1
            self._counts.by_place[f"upload: {_place()}"] += 1
        return func(*args, **named)

    def _read(self, func: Any, tensor: Any) -> Any:
        self._counts.host_reads += 1
        self._counts.by_place[f"read: {_place()}"] += 1
        ones = torch.ones(tensor.shape, dtype=tensor.dtype)
        return ones if func is Tensor.cpu else func(ones)

    def _index(self, index: Any) -> None:
        """A mask as an index makes the host wait for how many it picks; a list is sent."""
        for one in index if isinstance(index, tuple) else (index,):
            if isinstance(one, Tensor) and one.dtype == torch.bool:
                self._counts.host_reads += 1
                self._counts.by_place[f"read: {_place()}"] += 1
            elif isinstance(one, list) or (isinstance(one, Tensor) and one.device != META and one.dim()):
                self._counts.uploads += 1
                self._counts.by_place[f"upload: {_place()}"] += 1


def _goes_to(args: Any, named: Any, kind: str) -> bool:
    """Whether the arguments of a `to` or `tensor` name a device of this kind."""
    for one in (*args, *named.values()):
        if isinstance(one, Tensor):
            one = one.device
        if isinstance(one, str | torch.device) and torch.device(one).type == kind:
            return True
    return False


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Fused attention: forward and backward are a kernel each, which reads its inputs and writes its output."""
    aten = torch.ops.aten
    if attn_mask is None:
        made: Tensor = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return made
    mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    trains = torch.is_grad_enabled()
    made = aten._scaled_dot_product_efficient_attention(query, key, value, mask, trains, scale=scale)[0]
    return made


def _place() -> str:
    """The innermost line of ours that is being run."""
    here = Path(__file__)
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file != here and file.is_relative_to(ROOT) and ".venv" not in file.parts:
            return f"{file.relative_to(ROOT)}:{frame.lineno} {(frame.line or '')[:70]}"
    return "elsewhere"
