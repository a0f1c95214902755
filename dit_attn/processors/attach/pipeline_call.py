"""Find the pipeline call that a transformer runs in, and read its guidance arguments.

The pipeline that is running decides, whichever one was given to ``enable``: copies of a pipeline for every request,
pipelines of other tasks made by ``from_pipe``, and the pipeline around a transformer that was given alone. Pipelines
are called through their class and store some arguments in local variables only, so the call is found on the stack.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from tqdm.std import tqdm

from dit_attn.processors.attach.components import has_component
from dit_attn.processors.core.cfg import CFGRule


@dataclass(frozen=True)
class PipelineCall:
    """Guidance arguments of one pipeline call.

    Attributes:
        running: whether the pipeline's call was found; another pipeline around the same transformer may be running.
        scale: of classifier-free guidance, ``None`` where the call takes none.
        given: arguments of the negative prompt that were given.
        missing: embeddings and masks of it that were not.
        embedded: scale that is an input of a distilled model, where the caller changed its default; else ``None``.
        samples: images or videos that are made, ``None`` where no prompt says.
        rescaled: whether the guided prediction is rescaled.
        bent_by: the argument that makes the rule more than ``u + s (c - u)``, ``""`` for none.
        fixed: scales that the call uses as they were given, by the attribute that repeats them; a callback that changes
            the attribute changes nothing else.
    """

    running: bool = False
    scale: float | None = None
    given: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    embedded: float | None = None
    samples: int | None = None
    rescaled: bool = False
    bent_by: str = ""
    fixed: Mapping[str, float] = field(default_factory=dict)

    @property
    def remedy(self) -> str:
        """What to pass for the pipeline to run an unconditional branch."""
        if not self.given:
            return 'give negative_prompt (" " will do)'
        if "negative_prompt" in self.given or not self.missing:
            return f"although {', '.join(self.given)} was given; this pipeline guides in another way"
        return f"{', '.join(self.given)} alone is not enough, give {', '.join(self.missing)} too"


def read_pipeline_call(pipe: Any, rule: CFGRule) -> PipelineCall:
    """Read the guidance arguments of the call of ``pipe`` that is running; without one the result is empty.

    Args:
        pipe: a pipeline, or ``None``.
        rule: how its family runs guidance.
    """
    call = running_call(pipe)
    argument = rule.argument or "guidance_scale"
    negative = {name: value for name, value in call.items() if name.startswith("negative_") and "prompt" in name}
    prompts = [call["prompt"]] if isinstance(call.get("prompt"), str) else call.get("prompt")
    parts = [name for name in negative if name.endswith(("_embeds", "_mask"))]
    embedded = call.get("guidance_scale") if argument != "guidance_scale" else None
    if embedded == argument_default(pipe, "guidance_scale"):
        embedded = None
    return PipelineCall(
        running=bool(call),
        scale=None if call.get(argument) is None else float(call[argument]),
        given=tuple(name for name, value in negative.items() if value is not None),
        missing=tuple(name for name in parts if negative[name] is None),
        embedded=None if embedded is None else float(embedded),
        samples=len(prompts) * (call.get("num_images_per_prompt") or 1) if prompts else None,
        rescaled=any(call.get(name) for name in rule.rescaled_by),
        bent_by=next((name for name in rule.bent_by if call.get(name)), ""),
        fixed=_fixed_scales(pipe, call, rule.scale or ""),
    )


def _fixed_scales(pipe: Any, call: Mapping[str, Any], attribute: str) -> dict[str, float]:
    if not call or not attribute:
        return {}
    read, written = _attributes(inspect.unwrap(type(pipe).__call__).__code__)
    names = {name: name.lstrip("_") for name in (attribute, f"{attribute}_2")}
    return {
        name: float(call[argument])
        for name, argument in names.items()
        if isinstance(call.get(argument), (int, float)) and name in written and not {name, argument} & read
    }


@functools.cache
def _attributes(code: CodeType) -> tuple[set[str], set[str]]:
    """Names of the attributes that a function's code reads and writes, of whatever object."""
    found = [(op.opname, op.argval) for op in dis.get_instructions(code)]
    read = {name for kind, name in found if kind in ("LOAD_ATTR", "LOAD_METHOD")}
    return read, {name for kind, name in found if kind == "STORE_ATTR"}


def find_running(model: torch.nn.Module) -> tuple[Any, int]:
    """Return the pipeline whose call is running ``model``, and a number that tells this call from others.

    Returns:
        The innermost pipeline on the stack that has ``model`` as a component, and the number of its outermost frame;
        ``(None, 0)`` where none is running. The number may come again once the call is over.
    """
    found, number = None, 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            pipe = _called_object(frame)
            if found is None and not isinstance(pipe, torch.nn.Module) and _is_call(pipe, frame.f_code):
                found = pipe if has_component(pipe, model) else None
            if found is not None and pipe is found:
                number = id(frame)
        frame = frame.f_back
    return found, number


def running_call(pipe: Any, variables: Sequence[str] = ()) -> dict[str, Any]:
    """Return the arguments of the call of ``pipe`` that is on the stack, by name; empty where there is none.

    Where a class forwards its call to its base class, what the user gave counts.

    Args:
        pipe: the pipeline, or ``None``.
        variables: local variables of the call that are wanted too.
    """
    found: dict[str, Any] = {}
    frame = sys._getframe(1) if pipe is not None else None
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and _called_object(frame) is pipe and _is_call(pipe, code):
            names = (*code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount], *variables)
            values = frame.f_locals
            found |= {name: values[name] for name in names if name in values}
            if code.co_flags & inspect.CO_VARKEYWORDS:  # modular pipelines take all their inputs so
                rest = values.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount + _has_varargs(code)])
                found |= {name: value for name, value in (rest or {}).items() if name not in found}
        frame = frame.f_back
    return found


def _has_varargs(code: CodeType) -> bool:
    return bool(code.co_flags & inspect.CO_VARARGS)


def on_run_end(pipe: Any, function: Callable[[], None]) -> bool:
    """Call a function once when the denoising loop of the call of ``pipe`` that is on the stack ends, however it does.

    Pipelines close the progress bar of their loop when it ends, also by an exception, and when they are interrupted.

    Returns:
        Whether the end can be seen; some pipelines loop without a progress bar in a variable.
    """
    bars = {id(value): value for value in _locals_of_call(pipe) if isinstance(value, tqdm)}
    for bar in bars.values():
        _on_close(bar, function)
    return bool(bars)


def _on_close(bar: tqdm, function: Callable[[], None]) -> None:
    """Call a function after ``bar.close()``, once; bars also close when they are deleted."""
    reference, before = weakref.ref(bar), vars(bar).get("close")  # a bar that stored itself would be deleted late

    def close() -> None:
        here = reference()
        if here is not None:
            vars(here).pop("close", None)
            if before is None:
                here.close()
            else:
                before()
        function()

    vars(bar)["close"] = close


def _locals_of_call(pipe: Any) -> Iterator[Any]:
    """Yield the values of the local variables of the call of ``pipe`` that is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and _called_object(frame) is pipe:
            yield from frame.f_locals.values()
        frame = frame.f_back


def _called_object(frame: FrameType) -> Any:
    names = frame.f_code.co_varnames
    return frame.f_locals.get(names[0]) if names else None


def _is_call(pipe: Any, code: CodeType) -> bool:
    """Whether ``code`` is that of ``__call__`` in the class of ``pipe`` or a base class, under its decorators."""
    calls = (vars(kind).get("__call__") for kind in type(pipe).__mro__)
    return any(call is not None and getattr(inspect.unwrap(call), "__code__", None) is code for call in calls)


def argument_default(pipe: Any, name: str) -> Any:
    """Return the default of an argument of a pipeline's call, ``None`` where there is no such argument."""
    taken = inspect.signature(type(pipe).__call__).parameters if pipe is not None else {}
    return taken[name].default if name in taken else None
