"""Install a session on a transformer, and remove it again."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.attention_processor import (
    is_wrapped,
    tap_of,
    unwrap_processor,
    wrap_processor,
    wrapped_by,
)
from dit_attn.processors.attach.checkpoint import unfollow_checkpoints
from dit_attn.processors.attach.components import unwrap
from dit_attn.processors.attach.families import Family, family_of
from dit_attn.processors.attach.guider import PerturbedGuider
from dit_attn.processors.attach.hooks import ContextHook, ForwardHook, GuidanceHook
from dit_attn.processors.attach.run_context import on_abort
from dit_attn.processors.attach.session import Session
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.perturbed_guidance import as_guidance


def session_of(model: torch.nn.Module) -> Session | None:
    """Return the session on a transformer, or ``None``."""
    tap = _forward_hook(model)
    return tap.session if tap is not None else None


def attach(model: torch.nn.Module, methods: tuple[Method, ...], clock: Clock, pipe: Any = None) -> Session:
    """Wrap the processor of every eligible layer of ``model``; replaces a session that is already there.

    Raises:
        DitAttnError: unsupported family, or a layer without softmax attention. Nothing is changed then.
    """
    session = prepare(model, methods, clock, pipe)
    processors = session_processors(session)
    detach(model)
    for name, processor in processors.items():
        set_processor(model.get_submodule(name), processor)
    session.installed = True
    install_hooks(session)
    return session


def watch(model: torch.nn.Module, clock: Clock, pipe: Any = None) -> None:
    """Let a session see the calls of ``model`` without wrapping any of its layers.

    Raises:
        DitAttnError: unsupported family.
    """
    session = prepare(model, (), clock, pipe)
    detach(model)
    install_hooks(session)


def prepare(model: torch.nn.Module, methods: tuple[Method, ...], clock: Clock, pipe: Any = None) -> Session:
    """Return a session with its layers registered; nothing is installed yet.

    Raises:
        DitAttnError: unsupported family, a layer without softmax attention, or a method that does not fit the model.
    """
    family = family_of(model)
    session = Session(model, family, methods, clock, pipe)
    names = eligible_layers(model, family)
    refused = [name for name in names if tap_of(model.get_submodule(name).processor) is None]
    if refused:
        kind = type(model.get_submodule(refused[0]).processor).__name__
        raise DitAttnError(
            f"{len(refused)} layers of {type(model).__name__} have no softmax attention to tap "
            f"({kind}: {', '.join(refused[:4])}{', ...' if len(refused) > 4 else ''}); remove the custom processor"
        )
    for name in names:
        session.add_layer(name)
    for method in methods:
        method.check_model(type(model).__name__, len(names))
        if (guidance := as_guidance(method)) is not None:
            session.guider = PerturbedGuider(guidance, session)
    return session


def session_processors(session: Session) -> dict[str, Any]:
    """Return the wrapped processor of every layer, by module path."""
    return {layer.name: wrap_processor(session.module(layer).processor, session, layer) for layer in session.layers}


def install_hooks(session: Session) -> None:
    """Install the hooks that show the session the forward arguments and the pipeline's cache context."""
    model = session.model
    on_abort(model, session.drop_state)
    model.register_forward_pre_hook(ForwardHook(session, rewrap), with_kwargs=True)
    if session.guider is not None:
        # Behind a transformer that is compiled as one module, so that both passes run the compiled graph.
        owner = session.owner
        outer = [part for part in vars(owner).values() if _compiles(part, model)] if owner is not None else []
        session.guider.handle = (outer or [model])[0].register_forward_hook(GuidanceHook(session), with_kwargs=True)
    if hasattr(type(model), "cache_context"):
        model.__dict__["cache_context"] = ContextHook(model, session)


def detach(model: torch.nn.Module) -> None:
    """Restore the stock processors and remove the hooks; idempotent and exact."""
    for module in model.modules():
        if is_wrapped(getattr(module, "processor", None)):
            set_processor(module, unwrap_processor(module.processor))
    # Legacy fuse_qkv_projections stores the processors it replaced, ours among them, to restore them later.
    replaced = getattr(model, "original_attn_processors", None) or {}
    for name, processor in replaced.items():
        if is_wrapped(processor):
            replaced[name] = unwrap_processor(processor)
    session = session_of(model)
    if session is not None:
        session.detached = True
        if session.guider is not None:
            session.guider.release()
    for key, behind in list(model._forward_hooks.items()):
        if isinstance(behind, GuidanceHook):  # a copied model has no handle
            del model._forward_hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, ForwardHook):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    unfollow_checkpoints(model)
    if isinstance(model.__dict__.get("cache_context"), ContextHook):
        del model.__dict__["cache_context"]


def eligible_layers(model: torch.nn.Module, family: Family) -> list[str]:
    """Return the module paths of the attention layers the family row lists, in the order of the model.

    Raises:
        DitAttnError: the row matches no layer of this model.
    """
    names = [
        name
        for name, module in model.named_modules()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in family.layers) and hasattr(module, "processor")
    ]
    if not names:
        raise DitAttnError(
            f"no attention layer of {type(model).__name__} matches {', '.join(family.layers)}; "
            "this version of diffusers may have renamed them"
        )
    return names


def set_processor(module: Any, processor: Any) -> None:
    """Assign without the stock setter, which may drop weights and logs; all attention modules read ``.processor``."""
    if isinstance(processor, torch.nn.Module):
        module.__dict__.pop("processor", None)
        module._modules["processor"] = processor  # in place: the order of the state dict stays
    else:
        module._modules.pop("processor", None)
        module.__dict__["processor"] = processor


def rewrap(session: Session) -> None:
    """Wrap processors that other code has replaced since, and note that it did.

    Users call ``set_attn_processor``, loaders make processors anew, legacy ``fuse_qkv_projections`` swaps the objects.
    Processors that were only handed out (``attn_processors``) are not wrapped until one of them is set.
    """
    if not session.installed:
        session.installed = any(is_wrapped(session.module(layer).processor) for layer in session.layers)
        return
    for layer in session.layers:
        module = session.module(layer)
        processor = module.processor
        if is_wrapped(processor):
            if wrapped_by(processor) is session:
                continue
            processor = unwrap_processor(processor)  # stored by other code while an earlier session was enabled
        elif session.replaced.get(layer.name) == (type(processor).__name__, None):
            continue
        tap = tap_of(processor)
        session.note_replaced(layer, processor, tap)
        if tap is not None:
            set_processor(module, wrap_processor(processor, session, layer))


def _compiles(part: Any, model: torch.nn.Module) -> bool:
    """Whether ``part`` is ``model`` behind ``torch.compile``."""
    return hasattr(part, "_orig_mod") and unwrap(part) is model


def _forward_hook(model: torch.nn.Module) -> ForwardHook | None:
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, ForwardHook)), None)
