"""Prompt spans of every family: the keys of a piece are those that change when its words do, and no others."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.core.call import AttentionCall
from tests._support.prompted_pipelines import PIECE, SWAPPED, Prompted, pipeline_of
from tests.processors.attach.prompt_spans.prompted_cases import CASES


class Seen(Exception):
    """Ends a run once everything was seen."""


def first_conditional_call(
    pipe: Any, arguments: dict[str, Any], case: Prompted, find: bool = False
) -> tuple[AttentionCall, torch.Tensor | None]:
    """The first attention call with conditional rows whose keys are or contain the text, and the keys of the piece."""
    seen: list[Any] = []

    def observe(call: AttentionCall, request: Any, out: torch.Tensor) -> None:
        if "cond" not in call.branches:
            return
        found = call.prompt_tokens(PIECE) if find else None
        if call.kind == ("self" if case.joint else "cross"):
            seen.append((call, found))
            raise Seen
        assert found is None or (found.shape[1] == call.k.shape[1] and not found.any())  # no text there

    taken = inspect.signature(type(pipe).__call__).parameters
    negative = {"negative_prompt": "blurry"} if "negative_prompt" in taken else {}
    sites = ("self",) if case.joint else ("self", "cross")
    with dit_attn.observing(pipe, observe, sites), pytest.raises(Seen):
        pipe(**{**negative, **arguments}, num_inference_steps=2, output_type="latent")
    return seen[0]


def changed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(B, S) bool, rows of (B, S, ...) that differ."""
    return (first != second).flatten(2).any(-1)


@pytest.mark.parametrize("name", CASES)
def test_the_keys_of_a_piece_are_those_that_change_with_its_words(name: str) -> None:
    case: Prompted = CASES[name]
    pipe, arguments = pipeline_of(case)
    call, found = first_conditional_call(pipe, _seeded(arguments, case.prompt), case, find=True)
    swapped = case.prompt.replace(PIECE, SWAPPED)
    other, _ = first_conditional_call(pipe, _seeded(arguments, swapped), case)

    assert found is not None and torch.equal(found, changed(call.k, other.k))
    places = found[call.branches.index("cond")].nonzero().flatten().tolist()
    positions = _positions(dit_attn.spans(pipe, case.prompt, PIECE, **case.more))
    assert len(positions) >= 2
    assert [place - places[0] for place in places] == [position - positions[0] for position in positions]
    assert case.joint or places[0] == case.image_keys + positions[0]


def _seeded(arguments: dict[str, Any], prompt: str) -> dict[str, Any]:
    return {**arguments, "prompt": prompt, "generator": torch.Generator().manual_seed(0)}


def _positions(spans: list[dit_attn.PromptSpan]) -> list[int]:
    return sorted({position for span in spans for position in span.positions})
