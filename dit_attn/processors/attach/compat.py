"""Access private names of diffusers; no other file does.

Everything here is guarded: when a release moves a name, ``dispatch_attention_fn`` is reported as unsupported and
processors that call torch's attention directly still work.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dit_attn.processors.core.call import SDPAArgs

BACKEND_VALUE = "dit_attn"


@functools.cache
def backend_member() -> Any:
    """Return the member of ``AttentionBackendName`` our processors hand to ``dispatch_attention_fn``.

    It is not entered in the enumeration's maps: users cannot select it by name, since it means nothing without a
    session. A package that is loaded again has a member of its own: layers that the first one wrapped still call it.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    loads = sum(str(member.value).startswith(BACKEND_VALUE) for member in registry._backends)
    value = BACKEND_VALUE + (f"_{loads + 1}" if loads else "")
    member = str.__new__(AttentionBackendName, value)
    member._name_ = value.upper()
    member._value_ = value
    return member


def register_backend(function: Callable[..., torch.Tensor]) -> Any:
    """Put ``function`` behind :func:`backend_member`; idempotent. Returns the member."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    member = backend_member()
    if registry._backends.get(member) is not function:
        registry._backends[member] = function
        registry._constraints[member] = []
        registry._supported_arg_names[member] = set(inspect.signature(function).parameters)
        parallel = getattr(registry, "_supports_context_parallel", None)
        if isinstance(parallel, set):
            parallel.add(member.value)
        elif isinstance(parallel, dict):
            parallel[member] = True
    return member


def dispatch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, backend: Any, parallel_config: Any, **kwargs: Any
) -> torch.Tensor:
    """Call the stock dispatcher with the user's own backend; q, k, v and the result are (B, S, H, D)."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    if _takes_parallel_config(dispatch_attention_fn):
        kwargs["parallel_config"] = parallel_config
    return dispatch_attention_fn(query, key, value, backend=backend, **kwargs)


@functools.cache
def _takes_parallel_config(function: Callable[..., Any]) -> bool:
    return "parallel_config" in inspect.signature(function).parameters


def dispatchers(
    function: Callable[..., torch.Tensor], name: Callable[[str | None], None] | None = None
) -> dict[Any, Callable[..., torch.Tensor]]:
    """Return what reaches ``function``, a backend, in the place of ``dispatch_attention_fn``; by what it replaces.

    Args:
        function: the backend.
        name: called with the name of the backend that a call asks for before it, ``""`` for the active one, and with
            ``None`` behind it. Without it only calls that get the active backend reach ``function``, and only where
            that is torch's own.
    """
    try:
        from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
    except ImportError:
        return {}
    ours = register_backend(function)

    def dispatch_native(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("backend") is None and registry.get_active_backend()[0] == AttentionBackendName.NATIVE:
            kwargs["backend"] = ours
        return dispatch_attention_fn(*args, **kwargs)

    def dispatch_named(*args: Any, **kwargs: Any) -> torch.Tensor:
        backend = kwargs.get("backend")
        if name is None or backend is ours or kwargs.get("attention_kwargs"):
            return dispatch_attention_fn(*args, **kwargs)
        name("" if backend is None else getattr(backend, "value", backend))
        try:
            return dispatch_attention_fn(*args, **{**kwargs, "backend": ours})
        finally:
            name(None)

    return {dispatch_attention_fn: dispatch_native if name is None else dispatch_named}


def copy_registry_entry(stock: type, derived: type) -> None:
    """Let diffusers' class-keyed processor registry (used by its layer-skip hooks) know a derived class."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorRegistry
    except ImportError:
        return
    if hasattr(AttentionProcessorRegistry, "_register"):
        AttentionProcessorRegistry._register()  # it fills itself at first use only
    known = getattr(AttentionProcessorRegistry, "_registry", {})
    if stock in known:
        known.setdefault(derived, known[stock])


@contextmanager
def without_caches(model: torch.nn.Module, shared_only: bool = False) -> Iterator[None]:
    """Disable the step caches of diffusers for the length of a ``with`` block.

    Args:
        model: the transformer.
        shared_only: only those that share one state among the branches of a step (PyramidAttentionBroadcast,
            FasterCache). They would return the result of another branch, and store this one's for the next.
    """
    hooks = _model_hooks(model)
    if shared_only:
        caches = [hook for hook in hooks if hook._is_stateful and "state" in vars(hook)]
    else:  # the blocks behind the first one of a FirstBlockCache are stateless, and follow its state
        caches = [hook for hook in hooks if hook._is_stateful or "state_manager" in vars(hook)]
    references = [hook.fn_ref for hook in caches]
    forwards = [reference.forward for reference in references]
    for reference in references:
        reference.forward = reference.original_forward
    try:
        yield
    finally:
        for reference, forward in zip(references, forwards):
            reference.forward = forward


@contextmanager
def inner_cache_context(model: Any, name: str) -> Iterator[None]:
    """Give the step caches of diffusers a context of its own for the length of a ``with`` block.

    The context around it is theirs again afterwards; ``cache_context`` itself leaves none.
    """
    managers = [value for hook in _model_hooks(model) for value in vars(hook).values() if hasattr(value, "set_context")]
    before = [(manager, vars(manager).get("_context", vars(manager).get("_current_context"))) for manager in managers]
    try:
        with type(model).cache_context(model, name):
            yield
    finally:
        for manager, context in before:
            manager.set_context(context)


def _model_hooks(model: torch.nn.Module) -> list[Any]:
    """The hooks of diffusers on a model's modules."""
    registries = filter(None, (getattr(module, "_diffusers_hook", None) for module in model.modules()))
    return [hook for registry in registries for hook in getattr(registry, "hooks", {}).values()]


# Blocks diffusers' own registry lacks, or holds wrongly: the inputs that come out again, in the order of the outputs.
_STREAMS = {
    "AllegroTransformerBlock": ("hidden_states",),
    "AnyFlowTransformerBlock": ("hidden_states",),
    "AuraFlowJointTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "AuraFlowSingleTransformerBlock": ("hidden_states",),
    "BriaFibo2TransformerBlock": ("x",),
    "BriaFiboSingleTransformerBlock": ("hidden_states",),
    "BriaFiboTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "BriaSingleTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "BriaTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "ChromaSingleTransformerBlock": ("hidden_states",),
    "ChromaTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "CogView3PlusTransformerBlock": ("hidden_states", "encoder_hidden_states"),
    "ConsisIDBlock": ("hidden_states", "encoder_hidden_states"),
    "Cosmos3VLTextMoTDecoderLayer": ("und_seq", "gen_seq"),
    "CosmosTransformerBlock": ("hidden_states",),
    "EasyAnimateTransformerBlock": ("hidden_states", "encoder_hidden_states"),
    "ErnieImageSharedAdaLNBlock": ("x",),
    "Flux2SingleTransformerBlock": ("hidden_states",),
    "Flux2TransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "Flux3ModeTransformerBlock": ("hidden_states",),
    "Flux3SingleTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "GlmImageTransformerBlock": ("hidden_states", "encoder_hidden_states"),
    "HeliosTransformerBlock": ("hidden_states",),
    "HiDreamImageSingleTransformerBlock": ("hidden_states",),
    "HiDreamImageTransformerBlock": ("hidden_states", "encoder_hidden_states"),
    "HunyuanDiTBlock": ("hidden_states",),
    "HunyuanVideo15TransformerBlock": ("hidden_states", "encoder_hidden_states"),
    "Ideogram4TransformerBlock": ("hidden_states",),
    "JointTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "JoyImageTransformerBlock": ("hidden_states", "encoder_hidden_states"),
    "Kandinsky5TransformerDecoderBlock": ("visual_embed",),
    "Kandinsky6FusedTransformerDecoderBlock": ("vis", "aud"),
    "Krea2TransformerBlock": ("hidden_states",),
    "LTX2VideoTransformerBlock": ("hidden_states", "audio_hidden_states"),
    "LongCatImageSingleTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "LongCatImageTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "Lumina2TransformerBlock": ("hidden_states",),
    "LuminaNextDiTBlock": ("hidden_states",),
    "MiniMaxH3TransformerBlock": ("hidden_states",),
    "MotifVideoSingleTransformerBlock": ("hidden_states", "encoder_hidden_states"),
    "MotifVideoTransformerBlock": ("hidden_states", "encoder_hidden_states"),
    "NucleusMoEImageTransformerBlock": ("hidden_states",),
    "OmniGenBlock": ("hidden_states",),
    "OvisImageSingleTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "OvisImageTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "PRXBlock": ("hidden_states",),
    "QwenImage21TransformerBlock": ("hidden_states",),
    "SkyReelsV2TransformerBlock": ("hidden_states",),
    "WanTransformerBlock": ("hidden_states",),
    "ZImageTransformerBlock": ("x",),
}


def block_streams(block: torch.nn.Module) -> tuple[str, ...] | None:
    """Return the names of the inputs that a block returns, in the order of its outputs; ``None`` if unknown."""
    kind = type(getattr(block, "block", block))  # HiDream wraps its blocks
    if kind.__name__ in _STREAMS:
        return _STREAMS[kind.__name__]
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        entry = TransformerBlockRegistry.get(kind)
    except (ImportError, ValueError):
        return None
    image = getattr(entry, "hidden_states_argument_name", "hidden_states")
    text = getattr(entry, "encoder_hidden_states_argument_name", "encoder_hidden_states")
    if entry.return_encoder_hidden_states_index is None:
        return (image,)
    return (image, text) if entry.return_hidden_states_index == 0 else (text, image)


def ulysses_mesh(parallel_config: Any) -> Any | None:
    """Return the device mesh of a Ulysses-parallel run, or ``None`` when the run is not parallel.

    Raises:
        NotImplementedError: ring attention, whose ranks never hold a full row of the attention matrix, or uneven
            shards.
    """
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None:
        return None
    if config.ring_degree and config.ring_degree > 1:
        raise NotImplementedError("ring attention splits the keys over ranks; sparse methods need Ulysses")
    if getattr(config, "ulysses_anything", False):
        raise NotImplementedError("ulysses_anything makes uneven shards; sparse methods need even ones")
    return config._ulysses_mesh


def split_args(args: SDPAArgs, parallel_config: Any, full_keys: bool = False) -> SDPAArgs:
    """Return the arguments of an attention call with what diffusers' parallel settings say of its sequence.

    Args:
        args: the call.
        parallel_config: the settings.
        full_keys: whether every rank has all keys.
    """
    if parallel_config is None:
        return args
    try:
        return replace(args, mesh=ulysses_mesh(parallel_config), full_keys=full_keys)
    except NotImplementedError as error:
        return replace(args, unsupported=str(error))


def execution_device(pipe: Any) -> torch.device:
    """Return the device a pipeline computes on, also where its parts are offloaded."""
    device = getattr(pipe, "_execution_device", None)
    return device if isinstance(device, torch.device) else pipe.transformer.device


def modular_blocks(pipe: Any) -> Iterator[Any]:
    """Yield the blocks of a modular pipeline, and those inside them; ``pipe.blocks`` gives copies."""
    waiting = [pipe._blocks]
    while waiting:
        block = waiting.pop()
        yield block
        waiting += getattr(block, "sub_blocks", {}).values()
