"""Nodes for ComfyUI that draw with a dreamfleet server: this folder is `ComfyUI/custom_nodes/dreamfleet` there.

They need nothing but what ComfyUI has, and know nothing of the other packages here. Set-up is in `docs/comfyui.md`.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
