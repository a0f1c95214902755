"""Install a session on a transformer, and remove it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

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
from dit_attn.processors.attach.components import component_name, is_of_class, unwrap
from dit_attn.processors.attach.families import family_of
from dit_attn.processors.attach.guider import PerturbedGuider
from dit_attn.processors.attach.hooks import (
    CompileHook,
    ContextHook,
    ForwardHook,
    GuidanceHook,
    GuidedCall,
    NegativeHook,
    SaveHook,
    TwinHook,
    guide_compiled,
)
from dit_attn.processors.attach.learned import learned_modules
from dit_attn.processors.attach.negative_text import NegativeText
from dit_attn.processors.attach.position_tables import TableHook, position_table
from dit_attn.processors.attach.reduced_heads import ReducedHeads
from dit_attn.processors.attach.rotary import check_positions, rotary_parameters
from dit_attn.processors.attach.run_context import on_abort
from dit_attn.processors.attach.session import Session
from dit_attn.processors.attach.sites import check_taps, checked_kinds, cross_layers, eligible_layers, wanted_kinds
from dit_attn.processors.attach.twin_pass import TwinRunner
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import Layer, kinds_at
from dit_attn.processors.core.parameters import CHILD, LearnedModules
from dit_attn.processors.core.run_state import Observer
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.perturbed_guidance import as_guidance


def session_of(model: torch.nn.Module) -> Session | None:
    """Return the session on a transformer, or ``None``."""
    tap = _forward_hook(model)
    return tap.session if tap is not None else None


def attach(
    model: torch.nn.Module,
    methods: tuple[Method, ...],
    clock: Clock,
    pipe: Any = None,
    sites: Sequence[str] = (),
    previous: Session | None = None,
    wrapper: Any = None,
) -> Session:
    """Wrap the processor of every eligible layer of ``model``; replaces a session that is already there.

    Args:
        model: the transformer.
        methods: the methods.
        clock: of the pipeline.
        pipe: the pipeline, if there is one.
        sites: as for :func:`prepare`.
        previous: session whose methods keep the tensors that they have learned; default: the one that is replaced.
        wrapper: the transformer as it was given, if it stands behind ``torch.compile``.

    Raises:
        DitAttnError: as for :func:`prepare`. Nothing is changed then.
    """
    session = prepare(model, methods, clock, pipe, sites, previous or session_of(model))
    processors = session_processors(session)
    detach(model)
    for name, processor in processors.items():
        set_processor(model.get_submodule(name), processor)
    session.installed, session.wrapper = True, wrapper
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


def prepare(
    model: torch.nn.Module,
    methods: tuple[Method, ...],
    clock: Clock,
    pipe: Any = None,
    sites: Sequence[str] = (),
    previous: Session | None = None,
) -> Session:
    """Return a session with its layers registered; nothing is installed yet.

    Args:
        model: the transformer.
        methods: the methods.
        clock: clock of the run.
        pipe: the pipeline that was given.
        sites: where an observer wants to see the calls. Without it and without methods: self attention.
        previous: session whose methods keep the tensors that they have learned.

    Raises:
        DitAttnError: unsupported family, a layer without softmax attention, or a method that does not fit the model.
    """
    kinds = wanted_kinds(model, methods, sites)
    family = family_of(model, kinds)
    session = Session(model, family, methods, clock, pipe)
    if "self" in kinds:
        names = eligible_layers(model, family)
        check_taps(model, names)
        for name in names:
            session.add_layer(name)
    if kinds - {"self"}:
        add_cross_layers(session)
    for method in methods:
        if method.reduces_heads:
            session.reduced = ReducedHeads(method, model, session.layers)
    for method in methods:
        if why := family.refused_methods.get(method.slug):
            raise DitAttnError(f"{method.slug} cannot be enabled on {type(model).__name__}: {why}")
        mine = kinds_at(method.sites, family.text_kind)
        layers = [layer for layer in session.layers if not mine.isdisjoint(layer.calls)]
        method.check_model(type(model).__name__, len(layers))
        method.check_heads(type(model).__name__, [session.heads_of(layer.name) for layer in layers])
        if method.moves_positions and "self" in mine:
            stock = (session.module(layer).processor for layer in session.layers if layer.kind == "self")
            processors = [unwrap_processor(item) if is_wrapped(item) else item for item in stock]
            added = method.resamples_tables and position_table(model) is not None
            session.resampled |= added
            if not added or any(rotary_parameters(type(item).__call__) for item in processors):
                check_positions(model, processors, family)
        if (guidance := as_guidance(method)) is not None:
            session.guider = PerturbedGuider(guidance, session)
        if method.has_twin:
            session.twin = TwinRunner(method, session)
        if method.has_negative:
            session.negative = NegativeText(method, session)
    learned = previous.learned if previous is not None else None
    session.learned = learned_modules(model, family, session.layers, methods, component_name(pipe, model), learned)
    return session


def add_cross_layers(session: Session) -> list[Layer]:
    """Register the cross-attention layers of a session's model that are not registered; nothing is wrapped.

    Raises:
        DitAttnError: a layer without softmax attention.
    """
    model, known = session.model, {layer.name for layer in session.layers}
    names = [name for name in cross_layers(model, session.family) if name not in known]
    check_taps(model, names)
    return [session.add_layer(name, session.family.calls_of(model.get_submodule(name))) for name in names]


def session_processors(session: Session) -> dict[str, Any]:
    """Return the wrapped processor of every layer, by module path."""
    return {layer.name: wrap_processor(session.module(layer).processor, session, layer) for layer in session.layers}


@contextmanager
def observed(session: Session, observer: Observer, sites: Sequence[str]) -> Iterator[None]:
    """Call a function after the attention calls of an enabled session.

    Args:
        session: the session; cross-attention layers are wrapped for as long as they are observed.
        observer: see :func:`dit_attn.observing`.
        sites: which calls.

    Raises:
        DitAttnError: the model has no cross attention.
    """
    kinds = checked_kinds(session.model, session.family, sites, "the observer")
    added = add_cross_layers(session) if kinds - {"self"} else []

    def chosen(call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        if call.kind in kinds:
            observer(call, request, out)

    try:
        for layer in added:
            module = session.module(layer)
            set_processor(module, wrap_processor(module.processor, session, layer))
        session.observers.append(chosen)
        yield
    finally:
        session.observers[:] = [item for item in session.observers if item is not chosen]
        session.remove_layers(added)
        for layer in added:
            module = session.module(layer)
            if is_wrapped(module.processor):
                set_processor(module, unwrap_processor(module.processor))


def install_hooks(session: Session) -> None:
    """Install what a session needs on its transformer, besides the processors: hooks, and the modules that learn."""
    model = session.model
    on_abort(model, session.drop_state)
    model.register_forward_pre_hook(ForwardHook(session, rewrap), with_kwargs=True)
    if session.resampled:
        cast(torch.nn.Module, position_table(model)).register_forward_hook(TableHook(session))
    if session.twin is not None:  # before the hook of a guidance method, whose pass shares no block with the twin
        model.register_forward_hook(TwinHook(session), always_call=True)
    if session.negative is not None:
        model.register_forward_hook(NegativeHook(session))
    if session.guider is not None:
        # Behind a transformer that is compiled as one module, so that both passes run the compiled graph.
        parts = [session.wrapper, *(vars(session.owner).values() if session.owner is not None else ())]
        outer = [part for part in parts if _compiles(part, model)]
        session.guider.handle = (outer or [model])[0].register_forward_hook(GuidanceHook(session), with_kwargs=True)
        model.__dict__["compile"] = CompileHook(model, session)
        if not outer:
            guide_compiled(model, session)
    if hasattr(type(model), "cache_context"):
        model.__dict__["cache_context"] = ContextHook(model, session)
    if session.reduced is not None:
        session.reduce_heads()
    if session.learned.methods:
        model.add_module(CHILD, session.learned)
        if hasattr(type(model), "save_pretrained"):
            model.__dict__["save_pretrained"] = SaveHook(model)


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
        if session.twin is not None:
            session.twin.release()
    for key, behind in list(model._forward_hooks.items()):
        if any(is_of_class(behind, kind) for kind in (GuidanceHook, TwinHook, NegativeHook)):  # copies have no handle
            del model._forward_hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if is_of_class(hook, ForwardHook):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for module in model.children():
        for key, hook in list(module._forward_hooks.items()):
            if is_of_class(hook, TableHook):
                del module._forward_hooks[key]
    unfollow_checkpoints(model)
    for name, kind in (("cache_context", ContextHook), ("save_pretrained", SaveHook), ("compile", CompileHook)):
        if is_of_class(model.__dict__.get(name), kind):
            del model.__dict__[name]
    if is_of_class(model._modules.get(CHILD), LearnedModules):
        del model._modules[CHILD]
    guided: Any = model._compiled_call_impl
    if is_of_class(guided, GuidedCall):
        model._compiled_call_impl = guided.forward


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
    hooks: Any = model._forward_pre_hooks.values()
    return next((hook for hook in hooks if is_of_class(hook, ForwardHook)), None)
