"""Prompt spans of every family: the keys of a piece are those that change when its words do, and no others."""

from __future__ import annotations

import dataclasses
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
) -> tuple[AttentionCall, list[torch.Tensor], torch.Tensor | None]:
    """The first attention call with conditional rows, the keys of the piece, and the transformer's text.

    The keys are those of the call, and in cross attention those of a call whose keys are the text.
    """
    given: dict[str, Any] = {}
    seen: list[Any] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.update({name: kwargs[name] for name in case.texts if name in kwargs})

    def observe(call: AttentionCall, request: Any, out: torch.Tensor) -> None:
        if "cond" not in call.branches:
            return
        text = None if case.joint else torch.cat([given[name].squeeze(1) for name in case.texts], 1)
        found = [call.prompt_tokens(PIECE)] if find else []
        if find and text is not None:
            found.append(dataclasses.replace(call, k=text[:, :, None], tokens=None).prompt_tokens(PIECE))
        seen.append((call, found, text))
        raise Seen

    hook = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    taken = inspect.signature(type(pipe).__call__).parameters
    negative = {"negative_prompt": "blurry"} if "negative_prompt" in taken else {}
    try:
        with dit_attn.observing(pipe, observe), pytest.raises(Seen):
            pipe(**{**negative, **arguments}, num_inference_steps=2, output_type="latent")
    finally:
        hook.remove()
    return seen[0]


def changed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(B, S) bool, rows of (B, S, ...) that differ."""
    return (first != second).flatten(2).any(-1)


@pytest.mark.parametrize("name", CASES)
def test_the_keys_of_a_piece_are_those_that_change_with_its_words(name: str) -> None:
    case: Prompted = CASES[name]
    pipe, arguments = pipeline_of(case)
    call, found, text = first_conditional_call(pipe, _seeded(arguments, case.prompt), case, find=True)
    swapped = case.prompt.replace(PIECE, SWAPPED)
    other, _, other_text = first_conditional_call(pipe, _seeded(arguments, swapped), case)

    assert torch.equal(found[0], changed(call.k, other.k))
    if text is not None and other_text is not None:
        assert not found[0].any()
        assert torch.equal(found[1], changed(text, other_text))
    places = found[-1][call.branches.index("cond")].nonzero().flatten().tolist()
    positions = _positions(dit_attn.spans(pipe, case.prompt, PIECE, **case.more))
    assert len(positions) >= 2
    assert [place - places[0] for place in places] == [position - positions[0] for position in positions]
    assert case.joint or places == positions


def _seeded(arguments: dict[str, Any], prompt: str) -> dict[str, Any]:
    return {**arguments, "prompt": prompt, "generator": torch.Generator().manual_seed(0)}


def _positions(spans: list[dit_attn.PromptSpan]) -> list[int]:
    return sorted({position for span in spans for position in span.positions})
