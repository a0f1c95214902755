"""What every kind of tokenizer makes of a text is recorded: the same ids as without, and the characters of each."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizer

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.prompt_spans.recorded_tokenizer import TokenLog, TokenRow, recording_copy
from tests._support.tiny_tokenizers import KINDS, tokenizer

# Not by attribute: transformers may have a function of that name.
CONVERT = importlib.import_module("transformers.convert_slow_tokenizer")
PROMPTS = [
    "a red cube",
    "A  red Cube,\nand a naïve café ball!",
    "cafe\u0301 ﬁne",
    "一只红猫 and 🙂🙂 ball",
    " leading and trailing ",
    "the blue",
]


def recorded(part: Any, text: Any, **options: Any) -> tuple[list[TokenRow], Any]:
    log = TokenLog(lambda x: x)
    out = recording_copy(part, log)(text, **options)
    return log.calls[0], out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_recording_changes_no_id(kind: str, prompt: str) -> None:
    options = {"padding": "max_length", "max_length": 40, "truncation": True}
    (row,), out = recorded(tokenizer(kind), prompt, **options)
    stock = tokenizer(kind)(prompt, **options)
    assert out["input_ids"] == stock["input_ids"] == row.ids
    assert row.real == [bool(x) for x in stock["attention_mask"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_character_that_is_no_white_space_has_a_token(kind: str, prompt: str) -> None:
    (row,), _ = recorded(tokenizer(kind), prompt)
    covered = {at for start, end in row.offsets for at in range(start, end)}
    missing = "".join(prompt[at] for at in range(len(prompt)) if at not in covered)
    assert not missing.replace("\u0301", "").strip()  # NFC joins the accent to the letter before it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["red", "cube", "café", "🙂", "猫"])
def test_the_tokens_of_a_word_are_those_that_another_word_replaces(kind: str, word: str) -> None:
    """Without offsets: the ids before and after the word are those of the prompt with another word there."""
    before, after = "a blue ball, ", " and a small house"
    (row,), _ = recorded(tokenizer(kind), f"{before}{word}{after}")
    marks = [mark - row.first for mark in row.marks(len(before), len(before) + len(word))]
    (other,), _ = recorded(tokenizer(kind), f"{before}grass{after}")
    assert marks and marks == list(range(marks[0], marks[-1] + 1))
    head = next(at for at, (a, b) in enumerate(zip(row.ids, other.ids)) if a != b)
    tail = next(at for at in range(1, len(row.ids)) if row.ids[-at] != other.ids[-at])
    assert marks[-1] == len(row.ids) - tail
    between = range(*sorted((head, marks[0])))  # the space before a word is a token of its own or part of the word's
    assert all(not row.text[slice(*row.offsets[at])].strip() for at in between)


def test_a_token_that_a_piece_begins_in_belongs_to_it() -> None:
    (row,), _ = recorded(tokenizer("t5"), "a red cube")
    assert [row.shown(mark) for mark in row.marks(3, 5)] == ["red"]
    assert [row.shown(mark) for mark in row.marks(4, 8)] == ["red", "cube"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_truncation_removes_are_known(kind: str) -> None:
    text = "a red cube and a blue ball on the green grass"
    (full,), _ = recorded(tokenizer(kind), text)
    (row,), _ = recorded(tokenizer(kind), text, max_length=6, truncation=True)
    shown = [span for span in row.offsets if span[0] < span[1]]
    assert shown + row.cut == [span for span in full.offsets if span[0] < span[1]]
    assert row.cut


@pytest.mark.parametrize("kind", ["llama", "qwen", "byt5"])
def test_padding_on_the_left_moves_the_tokens(kind: str) -> None:
    part = KINDS[kind]()
    part.padding_side = "left"
    (row,), out = recorded(part, "a red cube", padding="max_length", max_length=30)
    pads = out["attention_mask"].count(0)
    assert pads and row.real == [False] * pads + [True] * (30 - pads)
    assert [row.shown(mark).strip() for mark in row.marks(2, 5)][-1].endswith("d")
    assert min(row.marks(0, 1)) - row.first >= pads


def test_a_list_of_texts_has_a_row_each_with_marks_of_its_own() -> None:
    rows, _ = recorded(tokenizer("t5"), ["a red cube", "a blue ball"], padding=True)
    assert [row.text for row in rows] == ["a red cube", "a blue ball"]
    assert rows[1].first == rows[0].first + len(rows[0].ids)


def test_a_chat_template_is_recorded_as_the_text_that_it_becomes() -> None:
    log = TokenLog(lambda x: x.replace("|", ""))
    twin = recording_copy(tokenizer("qwen"), log)
    out = twin.apply_chat_template([{"role": "user", "content": "a red cube"}], tokenize=True, return_dict=True)
    assert "a red cube" in log.calls[0][0].text
    assert log.calls[0][0].ids == out["input_ids"]


def test_marks_take_the_place_of_ids_where_the_transformer_embeds_them() -> None:
    log = TokenLog(lambda x: x, mark_ids=True)
    ids = recording_copy(tokenizer("llama"), log)("a red cube")["input_ids"]
    row = log.calls[0][0]
    assert ids == [row.ids[0], *range(row.first + 1, row.first + len(row.ids))]


def test_what_is_no_tokenizer_is_not_copied() -> None:
    assert recording_copy(object(), TokenLog(str)) is None


def test_the_stock_tokenizer_is_not_touched() -> None:
    part = tokenizer("clip")
    before = type(part), dict(vars(part))
    recording_copy(part, TokenLog(lambda x: x))("a red cube", padding="max_length")
    assert (type(part), dict(vars(part))) == before


def test_a_slow_tokenizer_without_fast_form_is_refused_in_one_line() -> None:
    class Unknown(ByT5Tokenizer):
        def _tokenize(self, text: str) -> list[str]:
            return list(text.upper())

    with pytest.raises(DitAttnError, match="Unknown has no offsets and no fast form") as error:
        recorded(Unknown(), "a red cube")
    assert "\n" not in str(error.value)


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python with the vocabulary of a fast one, between ``<s>`` and ``</s>``."""

    def __init__(self, fast: Any, **more: Any) -> None:
        self.fast = fast.backend_tokenizer
        super().__init__(bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>", **more)

    @property
    def vocab_size(self) -> int:
        return self.fast.get_vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return self.fast.get_vocab()

    def _tokenize(self, text: str, **more: Any) -> list[str]:
        return self.fast.encode(text, add_special_tokens=False).tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self.fast.token_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.fast.id_to_token(index)

    def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
        return [self.bos_token_id, *first, self.eos_token_id]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 2


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [6, 30])
def test_a_slow_tokenizer_is_read_by_its_fast_form(side: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends of a text and its padding are one token here."""
    fast = tokenizer("llama")
    monkeypatch.setattr(CONVERT, "convert_slow_tokenizer", lambda slow: fast.backend_tokenizer)
    text = "a red cube and a blue ball on the grass"
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    slow = Slow(fast, padding_side=side)
    (row,), out = recorded(slow, text, **options)
    assert out.encodings is None and out["input_ids"] == slow(text, **options)["input_ids"]
    assert row.real == [bool(x) for x in out["attention_mask"]]
    encoding = fast(text, add_special_tokens=False).encodings[0]
    shown = [span for span in row.offsets if span[0] < span[1]]
    assert shown + row.cut == encoding.offsets and bool(row.cut) == (length == 6)
    assert [row.ids[at] for at, span in enumerate(row.offsets) if span[0] < span[1]] == encoding.ids[: len(shown)]


def test_a_fast_form_that_tokenizes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = tokenizer("t5").backend_tokenizer
    monkeypatch.setattr(CONVERT, "convert_slow_tokenizer", lambda slow: other)
    with pytest.raises(DitAttnError, match="reads 'a red cube' in another way; load the fast tokenizer"):
        recorded(Slow(tokenizer("llama")), "a red cube")
