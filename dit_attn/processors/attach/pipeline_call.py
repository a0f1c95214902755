"""Read the guidance arguments of a running pipeline call; pipelines store some of them in local variables only."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

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
    """

    running: bool = False
    scale: float | None = None
    given: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    embedded: float | None = None
    samples: int | None = None
    rescaled: bool = False
    bent_by: str = ""

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
    if embedded == _default(pipe, "guidance_scale"):
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
    )


def running_call(pipe: Any) -> dict[str, Any]:
    """Return the arguments of the call of ``pipe`` that is on the stack, by name; empty where there is none.

    A pipeline is called through its class, so no hook on the object can see them. Where a class forwards its call to
    its base class, what the user gave counts.
    """
    kinds = type(pipe).__mro__ if pipe is not None else ()
    calls = [inspect.unwrap(vars(kind)["__call__"]) for kind in kinds if "__call__" in vars(kind)]
    codes = {code for call in calls if (code := getattr(call, "__code__", None)) is not None}
    found: dict[str, Any] = {}
    frame = sys._getframe(1) if codes else None
    while frame is not None:
        code = frame.f_code
        if code in codes and frame.f_locals.get(code.co_varnames[0]) is pipe:
            names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
            found |= {name: frame.f_locals[name] for name in names if name in frame.f_locals}
        frame = frame.f_back
    return found


def _default(pipe: Any, name: str) -> Any:
    taken = inspect.signature(type(pipe).__call__).parameters if pipe is not None else {}
    return taken[name].default if name in taken else None
