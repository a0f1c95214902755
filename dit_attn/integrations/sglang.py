"""Plug-in for SGLang diffusion: enables methods on the pipelines of its diffusers route.

The entry point ``sglang.multimodal_gen.plugins`` calls :func:`register` in every process. Written for SGLang 0.5.23.
"""

from __future__ import annotations

from typing import Any

from dit_attn.errors import DitAttnError
from dit_attn.integrations.server_options import VARIABLE, enable_on, requested_methods

TARGET = "sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline.DiffusersPipeline._apply_attention_backend"
"""Runs once for a pipeline that is loaded: before step caches and ``torch.compile`` are applied."""


def register() -> None:
    """Hook the methods of ``DIT_ATTN_METHODS`` into SGLang; does nothing where it is not set.

    Raises:
        DitAttnError: its value is wrong.
    """
    methods = requested_methods()
    if not methods:
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    def enable_after(result: Any, *args: Any, **kwargs: Any) -> None:
        enable_on(_pipeline(args, kwargs), methods)

    HookRegistry.register(TARGET, enable_after, HookType.AFTER)


def _pipeline(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The pipeline among the arguments ``(self, pipe, server_args)`` of the hooked method."""
    given = dict(zip(("self", "pipe", "server_args"), args)) | kwargs
    if set(given) != {"self", "pipe", "server_args"} or len(args) > 3:
        raise DitAttnError(
            f"{TARGET.rpartition('.')[2]} takes other arguments than (self, pipe, server_args) as in SGLang 0.5.23; "
            f"use that version, or unset {VARIABLE}"
        )
    return given["pipe"]
