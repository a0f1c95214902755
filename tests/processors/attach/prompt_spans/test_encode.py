"""What a pipeline encodes with marked tokens is what it encodes: templates, cleaning, lists, negative prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.prompt_spans.encode import EncodedText, encode
from tests._support import tiny_tokenizers as kinds
from tests._support.prompted_pipelines import pipeline_of
from tests._support.word_encoder import WordEncoder
from tests.processors.attach.prompt_spans.prompted_cases import CASES


def pipe_of(name: str) -> Any:
    return pipeline_of(CASES[name])[0]


def encoded(pipe: Any, piece: Any, negative: bool = False, **arguments: Any) -> EncodedText:
    found = encode(pipe, arguments, [piece], negative)
    assert found is not None
    return found


def places(text: EncodedText) -> list[list[int]]:
    """The places of all pieces, row by row."""
    chosen = text.places([mark for piece in text.pieces for mark in piece.marks])
    return [row.nonzero().flatten().tolist() for row in chosen]


def shown(pipe: Any, prompt: str, piece: Any, **call: Any) -> list[str]:
    return [text.strip() for span in dit_attn.spans(pipe, prompt, piece, **call) for text in span.tokens]


def test_a_prompt_that_is_cleaned_first_keeps_its_pieces() -> None:
    """Wan repairs text and joins white space: the bounds move with the words."""
    pipe, prompt = pipe_of("wan"), "  a  red\n\ncube &amp; a   â€œblueâ€\x9d ball "
    (span,) = dit_attn.spans(pipe, prompt, "cube")
    clean = dit_attn.spans(pipe, 'a red cube & a "blue" ball', "cube")[0]
    assert prompt[slice(*span.chars)] == "cube"
    assert (span.positions, span.tokens) == (clean.positions, clean.tokens)


def test_a_prompt_in_lower_case_keeps_its_pieces() -> None:
    pipe = pipe_of("pixart")
    assert shown(pipe, "A Red Cube and a ball", "Red Cube") == ["red", "cube"]


def test_a_piece_that_the_pipeline_rewrites_is_refused_in_one_line() -> None:
    """Half of a broken character cannot be found in the repaired text."""
    with pytest.raises(DitAttnError, match="rewrites the prompt") as error:
        dit_attn.spans(pipe_of("wan"), "a red cafÃ© cube", (9, 10))
    assert "\n" not in str(error.value)


def test_words_of_a_template_are_no_piece() -> None:
    """Qwen-Image's template says "the image by detailing the color": it is cut off, and none of the prompt's."""
    pipe = pipe_of("qwen-image")
    with pytest.raises(DitAttnError, match="is not in the prompt"):
        dit_attn.spans(pipe, "a red cube", "the image")
    alone = dit_attn.spans(pipe, "the color", "the color")
    assert [text.strip() for text in alone[0].tokens] == ["the", "color"] and len(alone) == 1


def test_rows_of_a_list_have_their_own_places() -> None:
    pipe = pipe_of("qwen-image")
    text = encoded(pipe, "red", prompt=["a red cube", "a small house, a red ball", "a blue ball"])
    first, second, third = places(text)
    assert second[0] - first[0] == 4 and third == []
    assert [piece.row for piece in text.pieces] == [0, 1]


def test_left_padding_moves_the_shorter_rows() -> None:
    pipe = pipe_of("cogview-4")
    pipe.tokenizer.padding_side = "left"
    first, second = places(encoded(pipe, "cube", prompt=["a cube", "a small house and a red cube"]))
    assert first == second  # both end the prompt


def test_samples_of_a_prompt_repeat_its_places() -> None:
    text = encoded(pipe_of("sd3"), "red", prompt=["a red cube", "red"], num_images_per_prompt=2)
    one, same, two, again = places(text)
    assert one == same != two == again


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "hunyuan-dit", "z-image"])
def test_a_negative_prompt_has_its_own_places(name: str) -> None:
    pipe = pipe_of(name)
    arguments = {"prompt": "a red cube", "negative_prompt": "low quality, a red ball"}
    text = encoded(pipe, "red ball", True, **arguments)
    alone = encoded(pipe, "red ball", prompt=arguments["negative_prompt"])
    assert places(text) == places(alone) != [[]]


def test_prompts_of_other_encoders_are_searched_too() -> None:
    spans = dit_attn.spans(pipe_of("sd3"), "a red cube", "ball", prompt_3="a blue ball")
    assert [(span.encoder, span.chars) for span in spans] == [("text_encoder_3", (7, 11))]


def test_a_quoted_text_is_found_in_both_of_its_encodings() -> None:
    spans = dit_attn.spans(pipe_of("hunyuan-image"), 'a house that says "red cube" in white', "red cube")
    assert sorted(span.encoder for span in spans) == ["text_encoder", "text_encoder_2"]
    letters = next(span for span in spans if span.encoder == "text_encoder_2")
    assert "".join(letters.tokens) == "red cube"


def test_a_quoted_text_moves_the_rest_of_the_prompt() -> None:
    """The quoted text stands first, also where no piece is in it."""
    pipe = pipe_of("hunyuan-image")
    plain, quoted = (
        dit_attn.spans(pipe, prompt, "red cube")[0].positions[0]
        for prompt in ("a red cube that says cafe", 'a red cube that says "cafe"')
    )
    glyphs = pipe.tokenizer_2('Text "cafe". ').input_ids
    assert quoted == plain + len(glyphs)


def test_cut_tokens_are_counted_and_the_other_encoder_has_them() -> None:
    pipe = pipe_of("sd3")
    prompt = "a blue ball " * 40 + "and a red cube"
    spans = {span.encoder: span for span in dit_attn.spans(pipe, prompt, "red cube")}
    assert (spans["text_encoder"].positions, spans["text_encoder"].cut) == ((), 2)
    assert len(spans["text_encoder_3"].positions) == 2 and spans["text_encoder_3"].cut == 0


def test_a_piece_of_which_a_part_is_cut_off_says_how_much() -> None:
    pipe, prompt = pipe_of("flux"), "a small house and a red cube"
    (whole,) = dit_attn.spans(pipe, prompt, "red cube")
    room = whole.positions[1] + 1  # one token, and the one that ends the text
    (span,) = dit_attn.spans(pipe, prompt, "red cube", max_sequence_length=room)
    assert span.positions == whole.positions[:1] and span.cut == len(whole.positions) - 1


def test_instructions_before_a_prompt_are_not_counted() -> None:
    """Sana keeps the first token and the end of what it encodes: the instruction between them is dropped."""
    pipe = SanaPipeline(
        tokenizer=kinds.gemma(),
        text_encoder=WordEncoder(8),
        vae=None,
        transformer=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    prompt, swapped = "a red cube and a ball", "a cube red and a ball"
    for instruction in (None, ["Generate an image, a red cube:", "- a blue ball"]):
        options = {"complex_human_instruction": instruction, "max_sequence_length": 40}
        rows = [
            pipe.encode_prompt(text, do_classifier_free_guidance=False, device="cpu", **options)[0]
            for text in (prompt, swapped)
        ]
        changed = (rows[0] != rows[1]).any(-1)[0].nonzero().flatten().tolist()
        (span,) = dit_attn.spans(pipe, prompt, "red cube", **options)
        assert list(span.positions) == changed


def test_a_pipeline_that_normalizes_every_token_keeps_their_places() -> None:
    """Cosmos 2.5: no mark is left in what it encodes, and every token stays where it is."""
    cosmos = pytest.importorskip("diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict")
    pipe = object.__new__(cosmos.Cosmos2_5_PredictBasePipeline)
    parts = {"tokenizer": kinds.qwen(), "text_encoder": WordEncoder(32)}
    pipe.__dict__.update(parts, _internal_dict=SimpleNamespace(**parts))
    rows = [
        pipe.encode_prompt(text, do_classifier_free_guidance=False, device="cpu", max_sequence_length=80)[0]
        for text in ("a red cube and a ball", "a cube red and a ball")
    ]
    changed = (rows[0] - rows[1]).abs().amax(-1)[0].gt(1e-4).nonzero().flatten().tolist()
    (span,) = dit_attn.spans(pipe, "a red cube and a ball", "red cube", max_sequence_length=80)
    assert list(span.positions) == changed


def test_encoding_touches_neither_the_pipeline_nor_the_prompts_nor_the_noise() -> None:
    pipe, prompts = pipe_of("z-image"), ["a red cube", "a red ball"]
    before = {name: id(part) for name, part in vars(pipe).items()}
    pipe.text_encoder.forward = None  # it is not called
    state = torch.get_rng_state()
    encoded(pipe, "red", prompt=prompts)
    assert prompts == ["a red cube", "a red ball"]
    assert {name: id(part) for name, part in vars(pipe).items()} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_slow_tokenizer_of_a_pipeline_counts_as_its_fast_form() -> None:
    """Tokenizers without offsets are read by bytes, or by the fast form they convert to."""
    pipe = pipe_of("wan")
    pipe.tokenizer = kinds.byt5()
    (span,) = dit_attn.spans(pipe, "a réd cube", "réd")
    assert (span.positions, span.tokens) == ((2, 3, 4, 5), ("r", "é", "é", "d"))


def test_no_prompt_is_said_in_one_line() -> None:
    with pytest.raises(DitAttnError, match="given no prompt; its tokens are not known from embeddings"):
        encode(pipe_of("flux"), {"prompt": None, "prompt_embeds": torch.zeros(1, 2, 3)}, ["red"])


def test_a_range_needs_a_single_prompt() -> None:
    with pytest.raises(DitAttnError, match="needs a single prompt"):
        encode(pipe_of("flux"), {"prompt": ["a red cube", "a ball"]}, [(2, 5)])


def test_a_pipeline_without_tokenizer_is_refused_in_one_line() -> None:
    pipe = pipe_of("wan")
    pipe.tokenizer = None
    with pytest.raises(DitAttnError, match="WanPipeline has no tokenizer"):
        dit_attn.spans(pipe, "a red cube", "red")


def test_arguments_that_a_pipeline_does_not_take_are_said() -> None:
    with pytest.raises(DitAttnError, match="cannot encode the prompt by itself"):
        dit_attn.spans(pipe_of("flux"), "a red cube", "red", max_sequence_length="long")
