"""Models that are modular pipelines alone: opened without weights, loaded, and called as other pipelines are."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from dit_attn.errors import DitAttnError, cut, reason, shorten

if TYPE_CHECKING:
    from dit_attn.cli.jobs import Job

INDEX = "modular_model_index.json"
_MEDIA = {"images": "images", "videos": "frames"}  # what a run gives, by the name that other pipelines give it
_SOUND = ("audio", "sampling_rate")
_PLAIN = (bool, int, float, str, list, tuple, dict, type(None), Any)
_GIVEN = ("generator", "output_type")  # by the command itself
_SCALE = "guidance_scale"


def open_pipeline(name: str, path: str, revision: str | None) -> Any:
    """Return a modular pipeline without the parts that have weights.

    Its class takes the inputs of its blocks as arguments of its call, and gives what other pipelines give.

    Args:
        name: as the user wrote it.
        path: folder, or ``org/name``.
        revision: branch, tag or commit of a Hub model.

    Raises:
        DitAttnError: this diffusers has no such pipeline, the model brings code, or its output cannot be saved.
    """
    import diffusers
    from diffusers.modular_pipelines import ComponentSpec

    if not (hasattr(diffusers, "ModularPipeline") and hasattr(ComponentSpec, "pretrained_model_name_or_path")):
        raise DitAttnError(
            f"{shorten(name)} is a modular pipeline ({INDEX}), which diffusers {diffusers.__version__} cannot load; "
            "update diffusers with `pip install -U diffusers`"
        )
    _refuse_own_code(name, path, revision)
    try:
        index = dict(diffusers.ModularPipeline.load_config(path, revision=revision))
    except (OSError, ValueError) as error:
        raise DitAttnError(f"{INDEX} in {path} cannot be read ({reason(error)}); download it again") from error
    wanted = cut(str(index.get("_class_name")), 100)
    kind = getattr(diffusers, wanted, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModularPipeline)):
        raise DitAttnError(
            f"{shorten(name)} needs the modular pipeline {wanted}, which diffusers {diffusers.__version__} does not "
            "have; update diffusers with `pip install -U diffusers`"
        )
    try:
        stock = _open(kind, path, revision)
    except Exception as error:  # an index that is damaged, or of another release, raises anything
        raise DitAttnError(
            f"{shorten(name)} cannot be opened as {wanted} ({reason(error)}); check {INDEX}, or update diffusers"
        ) from error
    return _open(_called_as_others(stock, name), path, revision)


def _open(kind: Any, path: str, revision: str | None) -> Any:
    return kind.from_pretrained(path, trust_remote_code=False, **({"revision": revision} if revision else {}))


def _refuse_own_code(name: str, path: str, revision: str | None) -> None:
    from diffusers.modular_pipelines import ModularPipelineBlocks

    try:
        config = ModularPipelineBlocks.load_config(path, revision=revision)
    except (OSError, ValueError):
        return  # blocks of diffusers
    if "auto_map" in config:
        raise DitAttnError(
            f"{shorten(name)} brings blocks of its own (auto_map in {ModularPipelineBlocks.config_name}), and the "
            "command line runs no code of a model; load it in Python with trust_remote_code=True, then "
            "dit_attn.enable(pipe, ...)"
        )


def _called_as_others(stock: Any, name: str) -> Any:
    """A class for the pipeline, under the same name: its call has named arguments, and a result with images or frames.

    Raises:
        DitAttnError: the pipeline makes neither images nor videos.
    """
    from dit_attn.processors.attach.compat import modular_blocks

    kind = type(stock)
    made = {spec.name for spec in stock.blocks.outputs}
    output = next((key for key in _MEDIA if key in made), None)
    if output is None:
        raise DitAttnError(
            f"{kind.__name__} of {shorten(name)} makes neither images nor videos, which are what this command saves"
        )

    sounds = [key for key in _SOUND if key in made]
    inputs = {spec.name: spec.default for spec in stock.blocks.inputs if spec.name is not None}
    guided = _SCALE not in inputs and _guides(getattr(stock, "guider", None))

    def call(self: Any, **given: Any) -> Any:
        with _guided(self.guider, given.pop(_SCALE, None)) if guided else nullcontext():
            found = kind.__call__(self, output=[output, *sounds], **given)
            return SimpleNamespace(**{_MEDIA.get(key, key): value for key, value in found.items()})

    def set_progress_bar_config(self: Any, **settings: Any) -> None:
        for block in modular_blocks(self):  # the one of diffusers reaches the outermost blocks alone
            if hasattr(block, "set_progress_bar_config"):
                block.set_progress_bar_config(**settings)

    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    inputs |= {_SCALE: stock.guider.guidance_scale} if guided else {}
    taken = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value) for key, value in inputs.items()]
    call.__name__, call.__signature__ = "__call__", inspect.Signature([self, *taken])  # type: ignore[attr-defined]
    changed = {"__call__": call, "set_progress_bar_config": set_progress_bar_config, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), changed)


def _guides(guider: Any) -> bool:
    """Whether a guider is on and has a scale: those of distilled models are off."""
    return hasattr(guider, _SCALE) and getattr(guider, "_enabled", True)


@contextmanager
def _guided(guider: Any, scale: float | None) -> Iterator[None]:
    """Give the guider another scale for one call; ``None`` leaves its own."""
    own = guider.guidance_scale
    guider.guidance_scale = own if scale is None else scale
    try:
        yield
    finally:
        guider.guidance_scale = own


def transformer_of(opened: Any, path: str, revision: str | None) -> Any:
    """Return what stands for the transformer before it is loaded, see ``Source``; ``None`` where there is none.

    Raises:
        DitAttnError: its configuration cannot be read.
    """
    from diffusers import AutoModel

    from dit_attn.processors.attach.components import COMPONENTS

    places = _places(opened, path, revision)
    name = next((name for name in COMPONENTS if name in places), None)
    if name is None:
        return None
    try:
        config = dict(AutoModel.load_config(**places[name]))
    except (OSError, ValueError) as error:
        raise DitAttnError(
            f"the configuration of {name} in {places[name]['pretrained_model_name_or_path']} cannot be read "
            f"({reason(error)}); download the model again"
        ) from error
    stand_in = type(str(config.get("_class_name")), (SimpleNamespace,), {})
    return stand_in(config=config, pair="transformer_2" in places)


def _places(opened: Any, path: str, revision: str | None) -> dict[str, dict[str, Any]]:
    """Where every part that has files comes from, as ``from_pretrained`` takes it."""
    found = {}
    for name in opened.pretrained_component_names:
        spec = opened.get_component_spec(name)
        place = spec.pretrained_model_name_or_path
        if place:
            commit = spec.revision or (revision if place == path else None)
            found[name] = {"pretrained_model_name_or_path": place, "subfolder": spec.subfolder, "revision": commit}
    return found


def without_weights(opened: Any, path: str, revision: str | None) -> Any:
    """Return the pipeline with its transformers and autoencoders on the meta device, everything else left out."""
    import diffusers
    from accelerate import init_empty_weights

    pipe = _open(type(opened), path, revision)
    for name, place in _places(opened, path, revision).items():
        if name.startswith(("transformer", "vae")):
            config = diffusers.AutoModel.load_config(**place)
            with init_empty_weights():
                setattr(pipe, name, getattr(diffusers, config["_class_name"]).from_config(config))
    return pipe


def check_calls(opened: Any, jobs: Iterable[Job]) -> None:
    """Refuse calls that lack an input of the blocks that they would run, or give one that is no plain value.

    Args:
        opened: the pipeline, see :func:`open_pipeline`.
        jobs: the calls, whose arguments have the names of inputs.

    Raises:
        DitAttnError: with the input, and what to do.
    """
    from dit_attn.cli.jobs import needs

    hints = {_SCALE: float} | {spec.name: spec.type_hint for spec in opened.blocks.inputs}
    for job in jobs:
        for name, value in job.call.items():
            if value is not None and name not in job.images() and not _is_plain(hints[name]):
                raise _not_given_here(opened, f"takes {name} as {_text(hints[name])}", job)
        given = {"prompt": job.prompt, **job.call}
        blocks = _selected(opened.blocks, given)
        for spec in blocks.inputs if blocks is not None else ():
            if spec.required and spec.default is None and spec.name not in _GIVEN and given.get(spec.name) is None:
                if not (_is_plain(spec.type_hint) or spec.name == "image"):
                    raise _not_given_here(opened, f"needs {spec.name}, {_text(spec.type_hint)}", job)
                raise needs(type(opened), spec.name, job)


def _selected(blocks: Any, given: Mapping[str, Any]) -> Any:
    """The blocks that a call runs, ``None`` where this diffusers cannot say which these are."""
    try:
        return blocks.get_execution_blocks(**{name: value for name, value in given.items() if value is not None})
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _is_plain(hint: Any) -> bool:
    """Whether JSON has values of a type; a type that is not given is one."""
    if get_args(hint) and get_origin(hint) is not Literal:
        return all(_is_plain(one) for one in get_args(hint) if one is not Ellipsis)
    return hint is None or hint in _PLAIN or get_origin(hint) is Literal


def _text(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else shorten(str(hint))


def _not_given_here(opened: Any, what: str, job: Job) -> DitAttnError:
    return DitAttnError(
        f"{type(opened).__name__} {what}, which the command line cannot give; call the pipeline in Python ({job.where})"
    )


def parts_of(opened: Any, calls: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the names of the parts that some calls need: MiniMax-H3 has a transformer of its own for references.

    Args:
        opened: the pipeline, see :func:`open_pipeline`.
        calls: arguments of each.
    """
    blocks = opened.blocks
    run = [_selected(blocks, call) or blocks for call in calls]
    return tuple(dict.fromkeys(spec.name for one in run for spec in one.expected_components))


def load(
    opened: Any, path: str, revision: str | None, parts: Collection[str] | None, dtype: Any, variant: str | None
) -> Any:
    """Load the pipeline with its weights.

    Args:
        opened, path, revision: see :func:`open_pipeline`.
        parts: names of what is loaded; ``None``: all.
        dtype: of the weights.
        variant: of the weights; ``None``: those that the index names.

    Raises:
        Exception: whatever the part that cannot be loaded raises.
    """
    import torch

    pipe = _open(type(opened), path, revision)
    places = _places(opened, path, revision)
    names = [name for name in places if parts is None or name in parts]
    how: dict[str, dict[str, Any]] = {
        name: {"torch_dtype": dtype, "revision": places[name]["revision"]} for name in names
    }
    for name in names if variant else ():
        kind = opened.get_component_spec(name).type_hint
        if kind is None or issubclass(kind, torch.nn.Module):
            how[name]["variant"] = variant
    keys = ("torch_dtype", "revision", "variant")
    pipe.load_components(names, **{key: {name: x[key] for name, x in how.items() if key in x} for key in keys})
    for name in names:
        if getattr(pipe, name, None) is None:  # diffusers only logs why
            _raise_reason(pipe.get_component_spec(name), how[name])
    return pipe


def _raise_reason(spec: Any, how: dict[str, Any]) -> None:
    """Load a part once more, and raise what hinders it."""
    try:
        spec.load(**how)
    except Exception as error:
        raise error.__context__ or error from None
    raise OSError(f"{spec.name} was not loaded")


def offload(pipe: Any, how: str, device: Any) -> None:
    """Keep the parts in main memory while they do not run.

    Args:
        pipe: the loaded pipeline.
        how: ``"model"``, a part at a time; ``"group"``, a layer at a time.
        device: where they run.
    """
    import torch
    from diffusers import ComponentsManager
    from diffusers.hooks import apply_group_offloading

    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    if how == "model":
        manager: Any = ComponentsManager()
        for name, module in modules.items():
            manager.add(name, module)
        manager.enable_auto_cpu_offload(device=device)
        return
    for module in modules.values():
        apply_group_offloading(module, onload_device=device, offload_type="leaf_level", use_stream=True)
