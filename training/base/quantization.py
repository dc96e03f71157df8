"""The frozen denoiser in fewer bits, by diffusers' quantisation back-ends: what a name means, what it needs, how small.

Deltas, norms, convolutions, text encoders and the VAE stay in the precision that is computed in. Knows no torch until a
config is made.
"""

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from training.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

Quantization = Literal["none", "int8", "fp8", "nf4"]
Offload = Literal["none", "layers"]  # "layers": each is on the device only while it computes
EXTRA = "quantized"  # of our package: installs the back-ends


class _Kind(NamedTuple):
    """A kind of quantised weight: the package that has it, and the bytes of a value with its share of the scales."""

    package: str
    value_bytes: float
    cuda_only: bool


_KINDS: dict[Quantization, _Kind] = {
    "int8": _Kind("torchao", 1.0, False),
    "fp8": _Kind("torchao", 1.0, False),
    "nf4": _Kind("bitsandbytes", 0.56, True),  # half a byte, and a scale for every 64
}


def check_quantization(kind: Quantization, device: str | None = None, dtype: str | None = None) -> None:
    """Raises UserError, saying what to do, where a kind cannot be had.

    `device` ("cpu", "cuda") and `dtype` ("torch.float64") are looked at where they are known.
    """
    if kind == "none":
        return
    needed = _KINDS[kind]
    if find_spec(needed.package) is None:
        raise UserError(
            f"`base_quantization` is {kind}, which needs the package {needed.package}: install it with "
            f"`pip install 'dreamfleet[{EXTRA}]'`, or take none."
        )
    if needed.cuda_only and device is not None and device != "cuda":
        raise UserError(f"`base_quantization` is {kind}, which needs CUDA; this device is {device}. Take int8 or none.")
    if dtype == "torch.float64":
        raise UserError(f"`base_quantization` is {kind}, which is not computed in fp64. Take bf16, fp16 or fp32.")


def quantization_config(kind: Quantization, device: "torch.device", dtype: "torch.dtype") -> Any:
    """diffusers' config of a kind, for `from_pretrained`; None for none. Raises UserError as `check_quantization`."""
    check_quantization(kind, device.type, str(dtype))
    if kind == "none":
        return None
    if kind == "nf4":
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def check_offload(offload: Offload, kind: Quantization) -> None:
    """Raises UserError where the layers cannot wait in host memory."""
    if offload != "none" and kind != "none":
        raise UserError(
            f"`base_offload` is {offload} and `base_quantization` is {kind}; one of them at a time. Quantised weights "
            "take less memory on the device and are faster."
        )


def value_bytes(kind: Quantization, plain: float) -> float:
    """Bytes of a value of a linear layer of the denoiser; `plain` where it is not quantised."""
    return plain if kind == "none" else _KINDS[kind].value_bytes


def identity_of(base_hash: str, kind: Quantization, worn: str = "") -> str:
    """What decides what a base computes while adapters train: the hash of its files, how it is quantised, if it is,
    and the hash of what every row wears then, if anything."""
    marks = [base_hash, *([] if kind == "none" else [kind]), *([worn] if worn else [])]
    return " ".join(marks)


def without_saved_weights(model: "nn.Module") -> None:
    """Has quantised linear layers keep no unpacked copy of their weight for backward: it is unpacked again there.

    torchao's own linear layers would keep one each, all of the memory that they save. bitsandbytes' keep none.
    """
    from torch import nn

    from training.base.frozen_linear import FrozenLinear

    for layer in model.modules():
        if isinstance(layer, nn.Linear) and hasattr(layer.weight, "dequantize") and is_flat(layer.weight):
            layer.forward = partial(FrozenLinear.apply, layer)  # type: ignore[method-assign]


def is_flat(weight: "torch.Tensor") -> bool:
    """Whether a weight is a tensor of torchao's that consists of others."""
    return hasattr(weight, "__tensor_flatten__")
