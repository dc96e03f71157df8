"""ai-toolkit's files, which ComfyUI and diffusers read: `diffusion_model.<path>.lora_A.weight`, `lora_B.weight`.

A path is that of the family's own programs, with layers fused as they have them, or diffusers' where ai-toolkit keeps
it. No alpha is written: it is the rank.
`named.py` reads them.
"""

from training.adapters.adapter import Adapter, AdapterError, padded, padding_note, some
from training.adapters.formats.fused import joined
from training.adapters.formats.parts import halves, own_metadata
from training.adapters.tensor_file import write_tensors
from training.base.originals import Names

DENOISER = "transformer"


def write_ai_toolkit(adapter: Adapter, names: Names) -> bytes:
    """The file. Raises AdapterError for an adapter that changes something else than a transformer."""
    others = [module for module in adapter.modules if not module.startswith(f"{DENOISER}.")]
    if others:
        raise AdapterError(
            f"ai_toolkit is a format for bases whose denoiser is a transformer; this adapter changes {some(others, 2)}."
            " Export as kohya: ComfyUI reads that of every base."
        )
    tensors = {}
    for module, low in joined(padded(adapter.modules), names.originals if names.native else {}).items():
        path = f"diffusion_model.{module.removeprefix(f'{DENOISER}.')}"
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = low.down, low.up
    return write_tensors(halves(tensors), {"format": "pt"} | own_metadata(adapter) | padding_note(adapter.modules))
