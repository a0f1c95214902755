"""Weights of the cells of a picture: by sample, frame and word, and what does not fit."""

from __future__ import annotations

import pytest
import torch

from dit_attn import DitAttnError
from dit_attn.processors.core.row_weights import RowWeights, text_tokens
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span


def test_weights_come_by_sample_frame_and_word() -> None:
    weights = torch.ones(2, 2, 2)
    weights[1, 0, 1] = 3.0
    columns = torch.tensor([[False, True], [True, True]])
    given = RowWeights(weights, columns)
    assert given.rows([1, 0], (2, 2, 2)).tolist() == [[1, 3, 1, 1] * 2, [1.0] * 8]
    assert given.rows([1], (1, 1, 1)).tolist() == [[1.5]] and bool(given.inside([1], (1, 1, 1)))
    assert given.words([0, 1], 3).tolist() == [[False, True, False], [True, True, False]]
    assert RowWeights(weights).words([0], 3).all() and len(RowWeights(weights[:1]).rows([0, 5], (1, 2, 2))) == 2


def test_the_text_of_a_sequence_is_found_in_its_order() -> None:
    tokens = TokenLayout((Span("text", 2), visual_span("image", (1, 1, 3)), Span("text", 1))).resolve(6)
    assert tokens is not None and text_tokens(tokens).tolist() == [0, 1, 5]


def test_weights_that_do_not_fit_are_one_line() -> None:
    weights, columns = torch.ones(2, 2, 2), torch.ones(2, 2, dtype=torch.bool)
    given = RowWeights(weights, columns)
    with pytest.raises(DitAttnError, match="of a text of 2 tokens, and this one has 1"):
        given.words([0], 1)
    with pytest.raises(DitAttnError, match="weights are of 2 samples, and the run has more"):
        given.rows([2], (1, 2, 2))
    for bad in (torch.zeros(1, 2, 2), torch.full((1, 2, 2), torch.nan), torch.ones(2, 2)):
        with pytest.raises(DitAttnError, match="weights must be"):
            RowWeights(bad)
    with pytest.raises(DitAttnError, match="columns must be bool of 2 dimensions"):
        RowWeights(weights, torch.ones(2, 2))
