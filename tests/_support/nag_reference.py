"""NAG by its equations, token by token in float64."""

from __future__ import annotations

from typing import Any

import torch

from dit_attn import NAG
from dit_attn.processors.attach.negative_text import TEXT_ARGUMENTS


def guided(call: Any, out: torch.Tensor, method: NAG) -> torch.Tensor:
    """(B, S, H, Dv) fp64: the guided result of a call whose result by plain attention is ``out``."""
    found = out.double().clone()
    image = image_rows(call)
    for plus, minus in pairs(call):
        positive, negative = (out[row, image].double().flatten(1) for row in (plus, minus))
        phi = method.scale + 1.0  # as public code counts
        far = phi * positive - (phi - 1.0) * negative
        ratio = far.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
        limited = far * torch.minimum(ratio, torch.full_like(ratio, method.tau)) / ratio
        found[plus, image] = (method.alpha * limited + (1.0 - method.alpha) * positive).view_as(found[plus, image])
    return found


def pairs(call: Any) -> list[tuple[int, int]]:
    """Conditional rows of a call, each with its negative row."""
    rows = {pair: row for row, pair in enumerate(zip(call.branches, call.samples))}
    return [(rows["cond", sample], row) for (branch, sample), row in rows.items() if branch == "negative"]


def image_rows(call: Any) -> list[int]:
    """The rows of a call that are not text."""
    if call.kind != "self":
        return list(range(call.q.shape[1]))
    text = {row for span in call.tokens.spans if span.kind == "text" for row in range(span.start, span.stop)}
    return [row for row in range(call.q.shape[1]) if row not in text]


def other_text(arguments: dict[str, Any]) -> dict[str, Any]:
    """The text arguments of a call with other embeddings."""

    def other(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(other, value))
        return value.flip(-1) if value.is_floating_point() else value

    given = {name: arguments[name] for name in TEXT_ARGUMENTS if arguments.get(name) is not None}
    return {name: value if "mask" in name or "ids" in name else other(value) for name, value in given.items()}
