"""Put methods onto a clone of a ComfyUI model: its attention override, its callbacks, its model wrapper.

Nothing of ComfyUI is imported: the names below are the contract (``comfy/patcher_extension.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dit_attn.integrations.comfyui.attention_call import read_call
from dit_attn.integrations.comfyui.comfy_run import ComfyRun, batch_rows, count_blocks
from dit_attn.integrations.comfyui.head_guidance import PERTURBED, GuidanceWindow, HeadGuidance
from dit_attn.processors.core.dispatch import dispatch_attention
from dit_attn.processors.core.layer import Layer
from dit_attn.processors.methods.sparse import SparseMethod

KEY = "dit_attn"
OVERRIDE = "optimized_attention_override"
_PRE_RUN, _PREPARE, _CLEANUP, _MODEL = "on_pre_run", "on_prepare_state", "on_cleanup", "diffusion_model"
_POST_CFG = "sampler_post_cfg_function"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SparseWindow:
    """A sparse method, and where it applies.

    Attributes:
        method: the method.
        high, low: noise levels between which it applies.
        min_tokens: shortest sequence that it applies to.
    """

    method: SparseMethod
    high: float
    low: float
    min_tokens: int

    def exception(self, sigma: float, tokens: int) -> str | None:
        """Return the reason why a call stays with stock attention, or ``None``."""
        if not self.low <= sigma <= self.high:
            return "outside the start and end percent"
        return f"sequence under {self.min_tokens} tokens" if tokens < self.min_tokens else None


class Patch:
    """What is enabled on one model, and the state of its runs.

    Attributes:
        sparse: the sparse method and where it applies, or ``None``.
        guidance: the guidance method and where it applies, or ``None``.
        run: state of the run.
    """

    def __init__(self, sparse: SparseWindow | None, guidance: GuidanceWindow | None, blocks: int) -> None:
        self.sparse, self.guidance = sparse, guidance
        self.run = ComfyRun(() if sparse is None else (sparse.method,), blocks)

    def install(self, options: dict[str, Any]) -> None:
        """Put the override on top of what is in ``transformer_options`` now, once."""
        found = options.get(OVERRIDE)
        if not (isinstance(found, Override) and found.patch is self):
            options[OVERRIDE] = Override(self, found)

    def prepare(self, patcher: Any, timestep: Any, *model_options: dict[str, Any]) -> None:
        """Install again before a step: another node may have replaced the override."""
        for options in (patcher.model_options, *model_options):
            self.install(options.setdefault("transformer_options", {}))

    def begin(self, patcher: Any) -> None:
        """Note that a sampler begins."""
        self.run.begin_run()

    def cleanup(self, patcher: Any) -> None:
        """Free what the run stored, and say what was done."""
        _log.info("dit_attn: %s", self.run.report())
        self.run.drop_state()

    def wrap_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a call of the model."""
        options = kwargs.get("transformer_options")
        if options is None:
            options = next((each for each in args if isinstance(each, dict) and "sigmas" in each), None)
        if options is None:
            return executor(*args, **kwargs)
        self.install(options)
        x, patch = args[0] if args else kwargs.get("x"), getattr(executor.class_obj, "patch_size", None)
        if options.get(PERTURBED) is None:
            self.run.begin_model_call(x, options, patch)
            return executor(*args, **kwargs)
        with self.run.perturbing(options[PERTURBED], batch_rows(x)):
            self.run.begin_model_call(x, options, patch)
            return executor(*args, **kwargs)

    def attend(self, stock: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the result of an attention call, in ComfyUI's layout.

        Args:
            stock: computes it as without this package, from the same arguments.
            args, kwargs: of the call, handed on unchanged.
        """
        call, run = read_call(args, kwargs), self.run
        tokens = call.args.q.shape[1]
        layer: Layer | str = call.unsupported or "cross attention"
        if call.unsupported is None and tokens == call.args.k.shape[1]:
            layer = run.layer_of(call.options, call.args.q)
        if isinstance(layer, str):
            run.calls[layer] += 1
            return stock(*args, **kwargs)
        # A reason to leave the methods out; tokens are known all the same, for a perturbed pass.
        run.layout_error = None if self.sparse is None else self.sparse.exception(run.sigma, tokens)
        made: list[torch.Tensor] = []  # the host's own tensor, returned where nothing else was computed

        def host_stock(_: Any) -> torch.Tensor:
            made[:] = [stock(*args, **kwargs)]
            made.append(call.from_host(made[0]))
            return made[1]

        out = dispatch_attention(run, layer, call.args, host_stock)
        return made[0] if made and out is made[1] else call.to_host(out)


class Override:
    """The attention override of a model: the enabled methods, and below them what was there before."""

    def __init__(self, patch: Patch, previous: Any) -> None:
        self.patch, self.previous = patch, previous

    def __call__(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute one attention call; see ``wrap_attn`` in ComfyUI."""

        def stock(*args: Any, **kwargs: Any) -> torch.Tensor:
            return func(*args, **kwargs) if self.previous is None else self.previous(func, *args, **kwargs)

        run = self.patch.run
        if run.dispatching:  # the override below is ours too
            return stock(*args, **kwargs)
        run.dispatching = True
        try:
            return self.patch.attend(stock, args, kwargs)
        finally:
            run.dispatching = False


def patch_of(model: Any) -> Patch | None:
    """Return what is enabled on a model, ``None`` where nothing is."""
    return next((each.__self__ for each in model.callbacks.get(_CLEANUP, {}).get(KEY, ())), None)


def patched(model: Any, sparse: SparseWindow | None = None, guidance: GuidanceWindow | None = None) -> Any:
    """Return a clone of a model with methods enabled; one of a kind takes the place of the last one.

    Args:
        model: a ``ModelPatcher``; nothing of it changes.
        sparse, guidance: the methods, ``None`` for those that are on the model.
    """
    found, before = model.clone(), patch_of(model)
    options = found.model_options.setdefault("transformer_options", {})
    if before is not None:
        sparse, guidance = sparse or before.sparse, guidance or before.guidance
        found.remove_callbacks_with_key(_PRE_RUN, KEY)
        found.remove_callbacks_with_key(_PREPARE, KEY)
        found.remove_callbacks_with_key(_CLEANUP, KEY)
        found.remove_wrappers_with_key(_MODEL, KEY)
        found.model_options[_POST_CFG] = [
            each for each in found.model_options.get(_POST_CFG, []) if getattr(each, "run", None) is not before.run
        ]
        if isinstance(options.get(OVERRIDE), Override) and options[OVERRIDE].patch is before:
            options[OVERRIDE] = options[OVERRIDE].previous
    patch = Patch(sparse, guidance, count_blocks(model.get_model_object("diffusion_model")))
    patch.install(options)
    found.add_callback_with_key(_PRE_RUN, KEY, patch.begin)
    found.add_callback_with_key(_PREPARE, KEY, patch.prepare)
    found.add_callback_with_key(_CLEANUP, KEY, patch.cleanup)
    found.add_wrapper_with_key(_MODEL, KEY, patch.wrap_model)
    if guidance is not None:
        found.set_model_sampler_post_cfg_function(HeadGuidance(guidance, patch.run))
    return found
