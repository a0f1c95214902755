"""The public functions: enable methods on a stock pipeline in one line, disable them in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from dit_attn.errors import DitAttnError, shorten
from dit_attn.files import is_place
from dit_attn.processors.attach import attach
from dit_attn.processors.attach.components import COMPONENTS, is_data_parallel, unwrap
from dit_attn.processors.attach.explain import Explanation, explain_run
from dit_attn.processors.attach.prompt_spans import PromptSpan, find_spans
from dit_attn.processors.attach.prompt_spans.pieces import Piece
from dit_attn.processors.attach.run_context import declare
from dit_attn.processors.attach.session import Session
from dit_attn.processors.attach.summary import Summary, summarize
from dit_attn.processors.attach.supported import SupportedFamilies, supported_families
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.run_state import Observer
from dit_attn.processors.methods import methods
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.presets import method_for, preset_for

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

__all__ = [
    "attn_processors",
    "disable",
    "enable",
    "enabled",
    "explain",
    "observing",
    "run_context",
    "spans",
    "summary",
    "supported",
    "watch",
]

_TWIN = "twin pass"
_ROLES = {
    "sparse": "both decide which keys are attended to",
    "guidance": "both need the perturbed pass of a step",
    "heads": "both decide which heads count",
    "negative": "both add rows with a negative prompt",
}


def enable(target: DiffusionPipeline | ModelMixin, *wanted: str | Method, **settings: Any) -> Session:
    """Enable methods on a pipeline or transformer. Nothing else about it changes.

    Enabling again replaces what was enabled before.

        dit_attn.enable(pipe, "re-ttention")                # settings from the preset for this model
        dit_attn.enable(pipe, "block-sparse", density=0.5)  # one of them changed
        dit_attn.enable(pipe, dit_attn.ReTtention(density=0.1), dit_attn.SoftPAG(heads="20"))

    Args:
        target: a diffusers pipeline, or its transformer.
        wanted: methods by slug (settings from the model's preset), as a saved file (``"path.json"``), its folder or
            ``"org/name"`` on the Hub, or as :class:`Method` instances; without any, the layers are wrapped and
            every call uses stock attention.
        settings: settings of the one method that is given by name, in place of those of the preset or file.

    Returns:
        The session (of the first transformer, when the pipeline has two).

    Raises:
        DitAttnError: unknown method, setting or family, methods that conflict, a layer that cannot be wrapped. Nothing
            is changed then.
    """
    models, chosen, clock, pipe = _checked(target, wanted, settings)  # before anything is changed
    parts = _parts(target).values()
    sessions = [attach.attach(model, chosen, clock, pipe, wrapper=part) for model, part in zip(models, parts)]
    return sessions[0]


def check(target: DiffusionPipeline | ModelMixin, *wanted: str | Method, **settings: Any) -> None:
    """Raise what :func:`enable` would raise, and change nothing. The weights may be on the meta device.

    Args:
        target: a pipeline or transformer.
        wanted, settings: methods, as for :func:`enable`.

    Raises:
        DitAttnError: as for :func:`enable`.
    """
    _checked(target, wanted, settings)


def resolve(target: DiffusionPipeline | ModelMixin, *wanted: str | Method) -> tuple[Method, ...]:
    """Return the methods that :func:`enable` would enable, with the settings of the model's preset.

    Raises:
        DitAttnError: as for :func:`enable`.
    """
    return _resolve(_transformers(target), wanted)


def disable(target: DiffusionPipeline | ModelMixin) -> None:
    """Remove every method: bit-equal to never enabled. Calling it twice is fine."""
    for model in _transformers(target):
        attach.detach(model)


@contextmanager
def enabled(target: DiffusionPipeline | ModelMixin, *wanted: str | Method, **settings: Any) -> Iterator[Session]:
    """Enable methods for the length of a ``with`` block; what was enabled before is restored at its end."""
    models = _transformers(target)
    before = [(model, session) for model in models if (session := attach.session_of(model)) is not None]
    session = enable(target, *wanted, **settings)
    try:
        yield session
    finally:
        disable(target)
        clocks = {id(old.clock): Clock() for _, old in before}
        for model, old in before:
            if old.methods or old.installed:
                attach.attach(model, old.methods, clocks[id(old.clock)], old.owner, previous=old, wrapper=old.wrapper)
            else:
                attach.watch(model, clocks[id(old.clock)], old.owner)


def run_context(
    target: DiffusionPipeline | ModelMixin,
    *,
    step: int | None = None,
    steps: int | None = None,
    branch: str | Sequence[str] | None = None,
    window: int | Sequence[int] | None = None,
    prompt: str | Sequence[str] | Mapping[str, Any] | None = None,
) -> AbstractContextManager[None]:
    """Say what the transformer calls of a ``with`` block are, in a denoising loop of your own.

    A pipeline that is running says so itself. In a loop only the time steps of the calls are seen, which tell neither
    the number of steps nor windows, tiles and the order of branches. Nothing is guessed inside the block. State that
    methods store from step to step is kept for each window and branch.

        for index, t in enumerate(scheduler.timesteps):
            for branch, prompt in prompts.items():
                with dit_attn.run_context(transformer, step=index, steps=len(scheduler.timesteps), branch=branch):
                    predicted[branch] = transformer(latents, timestep=t.expand(1), encoder_hidden_states=prompt)[0]

    A block inside another one says only what differs. Nothing happens where no method is enabled. A lower step than the
    last one, or another number of steps, begins a new run.

    Args:
        target: the transformer that is called, or a pipeline, for all of its transformers.
        step: step of the run, from 0. Wan 2.2's second expert counts on where the first one stopped.
        steps: number of steps of the run.
        branch: guidance branch of the calls: ``"cond"``, ``"uncond"``, ``"perturbed"``, or another name of the family;
            where the batch stacks several, their names in the order of the batch. Default: the name that
            ``cache_context`` gives, and without one ``"cond"``.
        window: index of the window or tile that the calls are for, or a tuple of indices.
        prompt: the prompt of the calls, or a list of them, for methods that name a piece of it; or the arguments of the
            pipeline's call that say what is encoded (``{"prompt": ..., "negative_prompt": ...}``). The pipeline that
            was given to ``enable`` encodes them.

    Raises:
        DitAttnError: a field out of range or missing; another thread is inside a block of the same transformer.
    """
    return declare(_transformers(target), step, steps, branch, window, prompt)


def watch(pipe: DiffusionPipeline) -> None:
    """Record the runs of a stock pipeline, without a method or a wrapped layer, until :func:`disable`.

    :func:`summary` then warns of guidance that was requested and did not happen (``warnings``).

    Raises:
        DitAttnError: unsupported family.
    """
    models, clock = _transformers(pipe), Clock()
    for model in models:
        attach.watch(model, clock, pipe)


@contextmanager
def observing(
    target: DiffusionPipeline | ModelMixin, observer: Observer, sites: Sequence[str] = ("self",)
) -> Iterator[None]:
    """Call a function after every attention call of a pipeline or transformer; nothing about the run changes.

    The observer gets the calls of the enabled methods, or of the stock run where none is enabled. Enable first, then
    observe. Calls of a sequence that is split over devices are left out.

    Args:
        target: a pipeline, or a transformer.
        observer: ``observer(call, request, out)`` after every call: the call with q, k, v (B, S, H, D), its layer,
            tokens and clock (an ``AttentionCall``); the request of the methods (``request.layout`` is ``None`` where
            stock attention ran); the result (B, S, H, Dv).
        sites: which calls: ``"self"`` (self and joint attention), ``"cross"`` (cross attention to the text),
            ``"image"`` (to a conditioning image, where a checkpoint has it), ``"text"`` (cross attention where the
            family has it, else joint attention). ``call.kind`` tells them apart.

    Raises:
        DitAttnError: unsupported family, or one without cross attention where that is asked for.
    """
    models, pipe = _transformers(target), None if isinstance(target, torch.nn.Module) else target
    bare = attach.session_of(models[0]) is None
    if bare:
        clock = Clock()
        for model in models:
            attach.attach(model, (), clock, pipe, sites)
    sessions = [session for model in models if (session := attach.session_of(model)) is not None]
    with ExitStack() as stack:
        if bare:
            stack.callback(disable, target)
        for session in sessions:
            stack.enter_context(attach.observed(session, observer, sites))
        yield


def attn_processors(target: DiffusionPipeline | ModelMixin, *wanted: str | Method) -> dict[str, Any]:
    """Return the attention processors of ``enable``, for ``transformer.set_attn_processor(...)``.

    The dictionary names every attention layer, as diffusers requires; layers that no method applies to keep their
    stock processor. ``disable`` restores the others.

    Args:
        target: a transformer, or a pipeline with one.
        wanted: as for :func:`enable`.

    Raises:
        DitAttnError: as for :func:`enable`, or the model has no ``set_attn_processor``.
    """
    models = _transformers(target)
    model = models[0]
    if not hasattr(model, "attn_processors"):
        raise DitAttnError(
            f"{type(model).__name__} has no set_attn_processor in diffusers; use dit_attn.enable instead"
        )
    attach.detach(model)
    pipe = None if isinstance(target, torch.nn.Module) else target
    session = attach.prepare(model, _resolve(models, wanted), Clock(), pipe)
    ours = attach.session_processors(session)
    attach.install_hooks(session)
    stock: Any = model.attn_processors
    return {name: ours.get(name.removesuffix(".processor"), processor) for name, processor in stock.items()}


def summary(target: DiffusionPipeline | ModelMixin) -> Summary:
    """Summarize the last run: sparse calls, fallbacks and why, density, time.

    Raises:
        DitAttnError: nothing is enabled on ``target``.
    """
    sessions = {name: attach.session_of(model) for name, model in _components(target).items()}
    found = {name: session for name, session in sessions.items() if session is not None}
    if not found:
        raise DitAttnError("no method is enabled on this pipeline; call dit_attn.enable(pipe, ...) first")
    return summarize(found)


def explain(
    target: DiffusionPipeline | ModelMixin,
    *wanted: str | Method,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
) -> Explanation:
    """Estimate a run before it is made: tokens, fraction of attention, upper bound of the speed-up, fallbacks.

        print(dit_attn.explain(pipe, "re-ttention", height=720, width=1280, num_frames=81))

    Args:
        target: a pipeline or transformer.
        wanted: methods, as for :func:`enable`.
        height, width: pixels; default: the pipeline's own.
        num_frames: frames of a video; default: the pipeline's own.
        num_inference_steps: steps of the run; default: the pipeline's own, 50 for a bare transformer.

    Raises:
        DitAttnError: unsupported family or method, settings that do not fit this model, or an invalid size.
    """
    models = _transformers(target)
    pipe = None if isinstance(target, torch.nn.Module) else target
    return explain_run(models[0], pipe, _resolve(models, wanted), height, width, num_frames, num_inference_steps)


def spans(
    pipe: DiffusionPipeline,
    prompt: str | list[str],
    pieces: Piece | list[Piece],
    *,
    negative: bool = False,
    **call: Any,
) -> list[PromptSpan]:
    """Return which tokens of the text a piece of the prompt becomes, by the pipeline's own tokenizers.

    The pipeline prepares the prompt as in a run, with its templates and its cleaning; its text encoders do not run. A
    token that has a character of a piece belongs to it.

        for span in dit_attn.spans(pipe, "a red cube and a blue ball", ["red cube", "blue ball"]):
            print(span.encoder, span.positions, span.tokens)

    Args:
        pipe: a pipeline with its tokenizers.
        prompt: the prompt, or a list of prompts.
        pieces: one piece or several: a text, which stands for each of its occurrences, or (start, end) in characters.
            A text is found inside of words only where it never stands as words of its own.
        negative: whether ``prompt`` is the negative prompt.
        call: other arguments of the pipeline's call that say what is encoded, such as ``max_sequence_length``.

    Returns:
        A span for every occurrence and every encoder whose tokens the transformer gets: Stable Diffusion 3 has up to
        three. Positions count from the start of the text part of the sequence, or of the keys of a cross attention.

    Raises:
        DitAttnError: a piece that is not in the prompt or cut off completely, no prompt, a tokenizer without offsets.
    """
    asked = pieces if isinstance(pieces, list) else [pieces]
    arguments = {**call, "negative_prompt" if negative else "prompt": prompt}
    arguments.setdefault("prompt", prompt)
    return find_spans(pipe, arguments, asked, negative)


def supported() -> SupportedFamilies:
    """Return the families with their methods: a dictionary that prints as a table.

        dit_attn.supported()["wan"]["methods"]

    Returns:
        ``{family: {"models": ..., "transformers": [...], "methods": [slugs], "refused": reason or None}}``.
    """
    return supported_families()


def _checked(
    target: Any, wanted: tuple[str | Method, ...], settings: Mapping[str, Any]
) -> tuple[list[torch.nn.Module], tuple[Method, ...], Clock, Any]:
    """The transformers, the methods, their clock and the pipeline of a call that passes every check."""
    models = _transformers(target)
    chosen, clock = _resolve(models, wanted, settings), Clock()
    pipe = None if isinstance(target, torch.nn.Module) else target
    for model, part in zip(models, _parts(target).values()):
        learned = attach.prepare(model, chosen, clock, pipe, previous=attach.session_of(model)).learned
        if is_data_parallel(part) and not set(learned.parameters()) <= set(model.parameters()):
            raise DitAttnError(
                "the transformer is wrapped for data-parallel training, which would not see the tensors that a method "
                "learns; enable it before accelerator.prepare or DistributedDataParallel"
            )
    return models, chosen, clock, pipe


def _transformers(target: Any) -> list[torch.nn.Module]:
    return list(_components(target).values())


def _components(target: Any) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline by component name; a bare transformer is its own ``transformer``."""
    return {name: unwrap(part) for name, part in _parts(target).items()}


def _parts(target: Any) -> dict[str, Any]:
    """The same, as they are wrapped."""
    if isinstance(target, torch.nn.Module):
        if "UNet" in type(target).__name__:
            raise DitAttnError(f"{type(target).__name__} is a UNet; the methods are for diffusion transformers")
        return {"transformer": target}
    parts = {name: getattr(target, name, None) for name in COMPONENTS}
    found = {name: part for name, part in parts.items() if part is not None}
    if not found:
        raise DitAttnError(
            f"{type(target).__name__} has no diffusion transformer; give a diffusers pipeline with a `transformer` "
            "(UNet pipelines are not supported), or the transformer itself"
        )
    return found


def _resolve(
    models: list[torch.nn.Module], wanted: tuple[str | Method, ...], settings: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Method, ...]:
    if settings and (len(wanted) != 1 or not isinstance(wanted[0], str)):
        raise DitAttnError(
            f"{', '.join(settings)}: settings are for one method that is given by name, as in enable(pipe, "
            '"block-sparse", density=0.5); several methods are given as instances with theirs'
        )
    chosen = []
    for item in wanted:
        if isinstance(item, str):
            saved = item not in methods() and is_place(item)
            chosen.append(Method.from_pretrained(item) if saved else method_for(item, models[0], pair=len(models) > 1))
        elif isinstance(item, Method):
            chosen.append(item)
        else:
            raise _no_method(item)
    if settings:
        chosen = [dataclasses.replace(chosen[0], **settings)]
    preset = preset_for(models[0], pair=len(models) > 1)
    chosen = [method.for_preset(preset.name if preset else None) for method in chosen]
    check_conflicts(chosen)
    return tuple(chosen)


def _no_method(item: Any) -> DitAttnError:
    """The error for what is neither a name nor a method."""
    if isinstance(item, type) and issubclass(item, Method):
        return DitAttnError(f"{item.__name__} is a class; give an instance of it: {item.__name__}()")
    if isinstance(item, (list, tuple)):
        return DitAttnError('methods are given one by one, not as a list: enable(pipe, "softpag", "re-ttention")')
    return DitAttnError(
        f"a method is a name, a saved file or a Method instance, got {shorten(item)}; names: {', '.join(methods())}"
    )


def check_conflicts(chosen: Iterable[Method]) -> None:
    """Raise ``DitAttnError`` where two methods cannot be enabled together, whatever the model."""
    taken: dict[str, str] = {}  # by role
    for method in chosen:
        if method.role and method.role in taken:
            raise DitAttnError(
                f"{method.slug} and {taken[method.role]} cannot run together: {_ROLES[method.role]}; enable one of them"
            )
        taken[method.role] = method.slug
        if {"guidance", "negative"} <= taken.keys():
            raise DitAttnError(
                f"{taken['negative']} and {taken['guidance']} cannot run together: both add rows to a step; enable one "
                "of them"
            )
        if method.has_twin:
            if _TWIN in taken:
                raise DitAttnError(
                    f"{method.slug} and {taken[_TWIN]} cannot run together: both run a twin pass; enable one of them"
                )
            taken[_TWIN] = method.slug
