"""Putting a session on a transformer and taking it off again."""

from __future__ import annotations

import ast
import copy
import fnmatch
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.clock import Clock
from dit_attn.processors.families import Family, family_of
from dit_attn.processors.guidance import PerturbedGuidance
from dit_attn.processors.inject import GuidanceHook, Guide
from dit_attn.processors.method import Method
from dit_attn.processors.session import Session, session_by_token
from dit_attn.processors.socket import is_socketed, socketed, tap_of, unsocketed


def unwrap(model: Any) -> Any:
    """The transformer behind ``torch.compile`` and data-parallel wrappers."""
    while hasattr(model, "_orig_mod") or type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def session_of(model: torch.nn.Module) -> Session | None:
    """The session on a transformer, or ``None``."""
    tap = _forward_tap(model)
    return tap.session if tap is not None else None


def attach(model: torch.nn.Module, methods: tuple[Method, ...], clock: Clock, pipe: Any = None) -> Session:
    """Socket every eligible layer of ``model``; replaces a session that is already there.

    Raises:
        DitAttnError: unsupported family, or a layer without softmax attention. Nothing is changed then.
    """
    session = prepare(model, methods, clock, pipe)
    processors = session_processors(session)
    detach(model)
    for name, processor in processors.items():
        set_processor(model.get_submodule(name), processor)
    session.installed = True
    install_taps(session)
    return session


def watch(model: torch.nn.Module, clock: Clock, pipe: Any = None) -> None:
    """Let a session see the calls of ``model`` and touch none of its layers.

    Raises:
        DitAttnError: unsupported family.
    """
    session = prepare(model, (), clock, pipe)
    detach(model)
    install_taps(session)


def prepare(model: torch.nn.Module, methods: tuple[Method, ...], clock: Clock, pipe: Any = None) -> Session:
    """A session with its layers registered, nothing installed yet."""
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
        session.add_site(name)
    for method in methods:
        method.check_model(type(model).__name__, len(names))
        if isinstance(method, PerturbedGuidance):
            session.guide = Guide(method, session)
    return session


def session_processors(session: Session) -> dict[str, Any]:
    """The derived processor of every layer, by module path."""
    model = session.model
    return {site.name: socketed(model.get_submodule(site.name).processor, site) for site in session.sites}


def install_taps(session: Session) -> None:
    """Let the session see the transformer's forward arguments and the pipeline's cache context."""
    model = session.model
    model.register_forward_pre_hook(_ForwardTap(session), with_kwargs=True)
    if session.guide is not None:
        # Behind a whole compiled transformer, so that both passes run the compiled graph.
        outer = [part for part in vars(session.pipe or ()).values() if _compiles(part, model)] if session.pipe else []
        session.guide.handle = (outer or [model])[0].register_forward_hook(GuidanceHook(session), with_kwargs=True)
    if hasattr(type(model), "cache_context"):
        model.__dict__["cache_context"] = _ContextTap(model, session)


def detach(model: torch.nn.Module) -> None:
    """Put the stock processors back and remove the taps; idempotent, exact."""
    for module in model.modules():
        if is_socketed(getattr(module, "processor", None)):
            set_processor(module, unsocketed(module.processor))
    # Legacy fuse_qkv_projections keeps the processors it replaced, ours among them, to put them back later.
    kept = getattr(model, "original_attn_processors", None) or {}
    for name, processor in kept.items():
        if is_socketed(processor):
            kept[name] = unsocketed(processor)
    session = session_of(model)
    if session is not None and session.guide is not None:
        session.guide.release()
    for key, behind in list(model._forward_hooks.items()):
        if isinstance(behind, GuidanceHook):  # a copied model has no handle
            del model._forward_hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _ForwardTap):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    if isinstance(model.__dict__.get("cache_context"), _ContextTap):
        del model.__dict__["cache_context"]


def eligible_layers(model: torch.nn.Module, family: Family) -> list[str]:
    """Module paths of the attention layers the family row opens, in the order of the model.

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


def heal(session: Session) -> None:
    """Socket processors that other code has replaced since (legacy ``fuse_qkv_projections`` swaps the objects).

    Processors that were only handed out (``attn_processors``) are left alone until somebody sets one.
    """
    model = session.model
    if not session.installed:
        session.installed = any(is_socketed(model.get_submodule(site.name).processor) for site in session.sites)
        return
    for site in session.sites:
        module = model.get_submodule(site.name)
        if not is_socketed(module.processor) and tap_of(module.processor) is not None:
            set_processor(module, socketed(module.processor, site))


def _compiles(part: Any, model: torch.nn.Module) -> bool:
    """Whether ``part`` is ``model`` behind ``torch.compile``."""
    return hasattr(part, "_orig_mod") and unwrap(part) is model


def _forward_tap(model: torch.nn.Module) -> _ForwardTap | None:
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _ForwardTap)), None)


class _ForwardTap:
    """Forward pre-hook of the transformer: shows the session the arguments its family row reads."""

    def __init__(self, session: Session | None) -> None:
        self.session = session
        if session is None:
            return
        self.names = tuple(dict.fromkeys((session.family.timestep, "hidden_states", *session.family.reads)))
        parameters = list(inspect.signature(type(session.model).forward).parameters)[1:]
        self.positions = {name: parameters.index(name) for name in self.names if name in parameters}

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForwardTap:
        return _ForwardTap(copy.deepcopy(self.session, memo))

    def __reduce__(self) -> Any:
        return _ForwardTap, (None,)  # a saved model comes back without methods

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.session is None:
            return None
        values = {}
        for name, position in self.positions.items():
            values[name] = args[position] if position < len(args) else kwargs.get(name)
        if torch.compiler.is_compiling():
            tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
            names = [name if isinstance(v, torch.Tensor) else f"{name}={v!r}" for name, v in values.items()]
            torch.ops.dit_attn.observe(self.session.token, tensors, "\n".join(names))
            return None
        heal(self.session)
        self.session.observe(values)
        return None if self.session.guide is None else self.session.guide.before(module, args, kwargs)


@torch.library.custom_op("dit_attn::observe", mutates_args=("clock",))
def _observe(clock: torch.Tensor, tensors: list[torch.Tensor], spec: str) -> None:
    """The forward tap of a compiled transformer: ``clock`` names the session, the lines of ``spec`` the arguments.

    A line is the name of the next tensor, or ``name=literal`` for an argument that is no tensor.
    """
    rest, values = iter(tensors), {}
    for line in spec.splitlines():
        name, is_literal, text = line.partition("=")
        values[name] = ast.literal_eval(text) if is_literal else next(rest)
    session_by_token(clock).observe(values)


@_observe.register_fake
def _(clock: torch.Tensor, tensors: list[torch.Tensor], spec: str) -> None:
    return None


class _ContextTap:
    """Stands in for ``model.cache_context`` and remembers what the pipeline says about the call."""

    def __init__(self, model: torch.nn.Module, session: Session | None) -> None:
        self._model, self.session = weakref.ref(model), session

    def __deepcopy__(self, memo: dict[int, Any]) -> _ContextTap:
        return _ContextTap(memo[id(self._model())], copy.deepcopy(self.session, memo))

    def __reduce__(self) -> Any:
        return _ContextTap, (self._model(), None)  # a saved model comes back without methods

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        model: Any = self._model()
        session = self.session or SimpleNamespace()
        session.context = SimpleNamespace(
            name=name, step_index=kwargs.get("step_index"), num_inference_steps=kwargs.get("num_inference_steps")
        )
        try:
            with type(model).cache_context(model, name, **kwargs):
                yield
        finally:
            session.context = None
