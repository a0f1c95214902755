"""A text encoder that marks its tokens finds them where a pipeline has put them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.prompt_spans.marked_encoder import MarkedEncoder, MarkedOutput
from dit_attn.processors.attach.prompt_spans.recorded_tokenizer import FIRST_MARK, TokenLog, TokenRow


def encode(given: list[int], made: tuple[int, ...] = (5, 6, 7, 8), real: int = 4) -> list[int]:
    """Which of the tokens that a tokenizer made stand at every place of those that an encoder is given; -1 for none."""
    row = TokenRow("text", "text", list(made), [], [at < real for at in range(len(made))], [], FIRST_MARK)
    encoder = MarkedEncoder("text_encoder", stock(), TokenLog(str, calls=[[row]]))
    hidden = encoder(torch.tensor([given])).last_hidden_state
    assert torch.equal(hidden, hidden[..., :1].expand_as(hidden)) and row.encoder == "text_encoder"
    return [int(mark) - FIRST_MARK if mark else -1 for mark in hidden[0, :, 0]]


def stock(**config: int) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(**{"hidden_size": 64, "num_hidden_layers": 3, **config}), name="real")


def test_tokens_stay_where_the_tokenizer_put_them() -> None:
    assert encode([5, 6, 7, 8]) == [0, 1, 2, 3]


def test_padding_has_no_mark() -> None:
    assert encode([5, 6, 0, 0], (5, 6, 0, 0), real=2) == [0, 1, -1, -1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 1, 5, 6, 7, 8], [-1, -1, 0, 1, 2, 3]),
        ([5, 6, 7, 8, 1], [0, 1, 2, 3, -1]),
        ([5, 6, 1, 1, 1, 7, 8], [0, 1, -1, -1, -1, 2, 3]),
    ],
)
def test_tokens_that_are_put_before_behind_or_among_them_move_the_rest(given: list[int], expected: list[int]) -> None:
    assert encode(given) == expected


@pytest.mark.parametrize(("given", "expected"), [([5, 6], [0, 1]), ([7, 8], [2, 3])])
def test_tokens_may_be_cut_off_at_an_end(given: list[int], expected: list[int]) -> None:
    assert encode(given) == expected


@pytest.mark.parametrize("given", [[5, 6, 7, 9], [5, 8], [5, 1, 6, 1, 7, 8], [9]])
def test_other_tokens_are_refused(given: list[int]) -> None:
    with pytest.raises(DitAttnError, match="text_encoder is given tokens that no tokenizer of the pipeline made"):
        encode(given)


def test_an_encoder_without_tokenizer_call_is_refused() -> None:
    with pytest.raises(DitAttnError, match="no tokenizer of the pipeline made"):
        MarkedEncoder("text_encoder", stock(), TokenLog(str))(torch.tensor([[1, 2]]))


def test_texts_that_were_tokenized_one_by_one_make_a_batch() -> None:
    rows = [TokenRow("", "", [at, 2], [], [True, True], [], FIRST_MARK + 2 * at) for at in range(2)]
    log = TokenLog(str, calls=[[row] for row in rows])
    marks = MarkedEncoder("text_encoder", stock(), log)(torch.tensor([[1, 2], [0, 2]])).last_hidden_state[..., 0]
    assert (marks.long() - FIRST_MARK).tolist() == [[2, 3], [0, 1]]


def test_the_output_is_read_as_that_of_a_text_encoder() -> None:
    marks = torch.arange(6.0).reshape(2, 3)
    out, pooled = MarkedOutput(marks, 4, 3, False), MarkedOutput(marks, 4, 3, True)
    assert len(out.hidden_states) == 4 and out["hidden_states"][-2] is out[0] is out.last_hidden_state
    assert not out.pooler_output.any() and pooled[0] is pooled.text_embeds and pooled[1] is pooled.last_hidden_state


def test_other_attributes_are_those_of_the_encoder() -> None:
    encoder = MarkedEncoder("text_encoder", stock(), TokenLog(str))
    assert encoder.name == "real" and encoder.dtype is torch.float32
