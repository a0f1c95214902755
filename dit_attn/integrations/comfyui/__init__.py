"""Custom nodes for ComfyUI: this folder, linked into ``ComfyUI/custom_nodes``, adds them."""

from __future__ import annotations

try:
    from dit_attn.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ModuleNotFoundError as error:
    if error.name != "dit_attn":
        raise
    raise ImportError("the Python of this ComfyUI has no dit_attn; run its python -m pip install dit-attn") from None

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
