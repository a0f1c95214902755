"""What tests of dropped heads share: a method that multiplies head 0 by 0, which leaving it out equals, and a drop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.pipelines.head_drop import named_heads, profile_heads
from dit_attn.processors.core import dispatch
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Gate(Method):
    """Gates of 0 for head 0, of 1 for the others."""

    def request(self, call: AttentionCall, request: Request) -> None:
        gates = call.q.new_ones(call.q.shape[:3], dtype=torch.float32)
        gates[..., 0] = 0.0
        request.multiply_heads(gates)


@contextmanager
def gated_among_keys() -> Iterator[None]:
    """Gate the calls of tokens that are keys alone too, of which methods are not told."""
    stock = dispatch._dispatch_rows

    def gated_rows(run: Any, layer: Any, args: Any, stock_call: Any) -> torch.Tensor:
        out = stock(run, layer, args, stock_call)
        return out.index_fill(2, torch.tensor(0), 0.0) if dispatch.is_among_keys(run, layer, args) else out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_dispatch_rows", gated_rows)
        yield


def gated(model: Any, args: dict[str, Any]) -> torch.Tensor:
    """The output with head 0 of every layer multiplied by 0."""
    with dit_attn.enabled(model, Gate()), torch.no_grad():
        return model(**copy.deepcopy(args), return_dict=False)[0]


class Pipe(SimpleNamespace):
    """A transformer with the inputs of one call, which a run repeats with other noise."""

    def __call__(self, prompt: str, generator: torch.Generator, output_type: str) -> None:
        args = copy.deepcopy(self.args)
        args["hidden_states"] = torch.randn(args["hidden_states"].shape, generator=generator)
        with torch.no_grad():
            self.transformer(**args, return_dict=False)


def saved_drop(model: Any, args: dict[str, Any], folder: Path) -> Path:
    """The file of a drop of head 0 of the first layer, with its refit."""
    profile = profile_heads(Pipe(transformer=model, args=args), ["a"], every=1)
    return named_heads(profile, "L0H0").save(folder)
