"""Plug-in for vLLM-Omni: enables methods on the pipelines of its diffusers adapter.

The entry point ``vllm_omni.general_plugins`` calls :func:`register` in every process. Written for vLLM-Omni 0.30.0.
"""

from __future__ import annotations

import functools
from typing import Any

from dit_attn.errors import DitAttnError
from dit_attn.integrations.server_options import VARIABLE, check_signature, enable_on, requested_methods

_VERSION = "vLLM-Omni 0.30.0"


def register() -> None:
    """Enable the methods of ``DIT_ATTN_METHODS`` after a pipeline is loaded; does nothing where it is not set.

    It may be called several times.

    Raises:
        DitAttnError: its value is wrong, or ``load_weights`` is another than this was written for.
    """
    methods = requested_methods()
    if not methods:
        return
    from vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter import DiffusersAdapterPipeline

    stock = DiffusersAdapterPipeline.load_weights
    if getattr(stock, "dit_attn", False):
        return
    check_signature(stock, ("self",), _VERSION)

    @functools.wraps(stock)
    def load_weights(self: Any) -> Any:
        result = stock(self)
        if getattr(self, "_pipeline", None) is None:
            raise DitAttnError(f"the adapter has no _pipeline as in {_VERSION}; use that version, or unset {VARIABLE}")
        enable_on(self._pipeline, methods)
        return result

    load_weights.dit_attn = True  # type: ignore[attr-defined]
    DiffusersAdapterPipeline.load_weights = load_weights
