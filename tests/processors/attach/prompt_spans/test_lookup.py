"""Pieces in the attention calls of a run: rows of branches, samples and lists, loops, and what is not known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.prompt_spans import lookup
from dit_attn.processors.core.call import AttentionCall
from tests._support.pipeline_runs import real
from tests._support.prompted_pipelines import pipeline_of
from tests.families import test_sd3
from tests.processors.attach.prompt_spans.prompted_cases import CASES


def run(name: str, piece: Any, **arguments: Any) -> list[tuple[tuple[str, ...], list[list[int]]]]:
    """Branches and places of a piece in every first-layer call of a run of one step."""
    pipe, kwargs = pipeline_of(CASES[name])
    seen: list[Any] = []

    def observe(call: AttentionCall, request: Any, out: torch.Tensor) -> None:
        if call.layer.index == 0:
            found = call.prompt_tokens(piece)
            assert found.shape == (call.q.shape[0], call.k.shape[1]) and found.dtype == torch.bool
            seen.append((call.branches, [row.nonzero().flatten().tolist() for row in found]))

    with dit_attn.observing(pipe, observe):
        pipe(**{**kwargs, **arguments}, num_inference_steps=1, output_type="latent")
    return seen


def test_a_batched_call_has_the_piece_in_the_rows_of_its_branch() -> None:
    ((branches, rows),) = run("sd3", "red cube", prompt="a red cube", negative_prompt="blurry")
    assert branches == ("uncond", "cond") and rows[0] == [] and len(rows[1]) == 4


def test_the_negative_prompt_is_searched_too() -> None:
    ((_, rows),) = run("sd3", "red", prompt="a blue cube", negative_prompt="a red image")
    assert rows[0] and rows[1] == []


def test_separate_calls_of_the_branches_have_their_own_prompt() -> None:
    (first, second) = run("cogview-4", "red", prompt="a red cube", negative_prompt="blurry, red")
    assert (first[0], second[0]) == (("cond",), ("uncond",))
    assert first[1][0] and second[1][0] and first[1] != second[1]


def test_samples_of_a_list_of_prompts_follow_their_prompt() -> None:
    prompts = ["a red cube", "a small house"]
    ((branches, rows),) = run("sd3", "red", prompt=prompts, num_images_per_prompt=2)
    assert branches == ("uncond",) * 4 + ("cond",) * 4
    assert rows[4] == rows[5] != [] and rows[6] == rows[7] == [] and rows[:4] == [[]] * 4


def test_models_that_attend_sample_by_sample_find_their_row() -> None:
    pipe, kwargs = pipeline_of(CASES["mochi"])
    seen = []

    def observe(call: AttentionCall, request: Any, out: torch.Tensor) -> None:
        if call.layer.index == 0 and call.clock.step == 0:
            seen.append((call.branches, int(call.prompt_tokens("red cube").sum())))

    with dit_attn.observing(pipe, observe):
        pipe(**kwargs, prompt="a red cube", negative_prompt="", num_inference_steps=2, output_type="latent")
    assert seen == [(("uncond",), 0), (("cond",), 2)]


def test_samples_of_one_prompt_in_a_pipeline_that_repeats_them_itself() -> None:
    ((branches, rows),) = run("z-image", "red", prompt="a red cube", negative_prompt="", num_images_per_prompt=2)
    assert branches == ("cond", "cond", "uncond", "uncond")
    assert rows[0] == rows[1] != [] and rows[2] == rows[3] == []


@pytest.mark.parametrize("batched", [True, False])
def test_perturbed_rows_are_those_of_the_prompt(batched: bool) -> None:
    pipe, kwargs = pipeline_of(CASES["sd3"])
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads="0", scale=2.0, batched=batched))
    found: dict[str, set[int]] = {}

    def observe(call: AttentionCall, request: Any, out: torch.Tensor) -> None:
        for branch, row in zip(call.branches, call.prompt_tokens("red cube").sum(1).tolist()):
            found.setdefault(branch, set()).add(row)

    with dit_attn.observing(pipe, observe):
        pipe(**kwargs, prompt="a red cube", negative_prompt="", num_inference_steps=4, output_type="latent")
    assert found == {"uncond": {0}, "cond": {4}, "perturbed": {4}}


def test_a_second_attention_over_the_image_alone_has_no_text() -> None:
    stock, kwargs = pipeline_of(CASES["sd3"])
    pipe, _ = real(test_sd3.TestSD35Medium)
    pipe.register_modules(
        **{name: part for name, part in stock.components.items() if "text" in name or "token" in name}
    )
    found: dict[str, int] = {}

    def observe(call: AttentionCall, request: Any, out: torch.Tensor) -> None:
        found.setdefault(call.layer.name, int(call.prompt_tokens("red").sum()))

    with dit_attn.observing(pipe, observe):
        pipe(**kwargs, prompt="a red cube", num_inference_steps=1, output_type="latent")
    assert found["transformer_blocks.0.attn2"] == 0 and found["transformer_blocks.0.attn"] == 2


def test_a_piece_is_encoded_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    stock = lookup.encode
    monkeypatch.setattr(lookup, "encode", lambda *args: asked.append(args[2:]) or stock(*args))
    pipe, kwargs = pipeline_of(CASES["flux"])

    def observe(call: AttentionCall, request: Any, out: torch.Tensor) -> None:
        assert call.prompt_tokens("red").any() == ("cond" in call.branches)

    with dit_attn.observing(pipe, observe):
        for prompt in ("a red cube", "a small house, a red cube"):
            pipe(**kwargs, prompt=prompt, num_inference_steps=2, output_type="latent")
    assert asked == [(["red"], False)] * 2


def sd3_call(pipe: Any, rows: int = 1) -> None:
    """A transformer call outside every pipeline."""
    text = 77 + 256
    with torch.no_grad():
        pipe.transformer(
            hidden_states=torch.randn(rows, 4, 32, 40),
            encoder_hidden_states=torch.randn(rows, text, 16),
            pooled_projections=torch.randn(rows, 16),
            timestep=torch.full((rows,), 500),
        )


def observed(pipe: Any, piece: Any, rows: int = 1, **context: Any) -> list[list[int]]:
    seen: list[torch.Tensor] = []

    def observe(call: AttentionCall, request: Any, out: torch.Tensor) -> None:
        seen.append(call.prompt_tokens(piece))

    dit_attn.enable(pipe)
    with dit_attn.observing(pipe, observe), dit_attn.run_context(pipe, step=0, steps=4, **context):
        sd3_call(pipe, rows)
    return [row.nonzero().flatten().tolist() for row in seen[0]]


def test_a_loop_gives_its_prompt() -> None:
    pipe, _ = pipeline_of(CASES["sd3"])
    image = 16 * 20
    (row,) = observed(pipe, "red cube", branch="cond", prompt="a red cube")
    spans = dit_attn.spans(pipe, "a red cube", "red cube")
    assert row == sorted({image + position for span in spans for position in span.positions})


def test_a_loop_gives_the_arguments_of_a_call() -> None:
    pipe, _ = pipeline_of(CASES["sd3"])
    both = {"prompt": "a red cube", "negative_prompt": "red"}
    (cond,) = observed(pipe, "red", branch="cond", prompt=both)
    (uncond,) = observed(pipe, "red", branch="uncond", prompt=both)
    rows = observed(pipe, "red", 2, branch=("uncond", "cond"), prompt=both)
    assert rows == [uncond, cond] and uncond != cond


def test_samples_of_the_prompts_of_a_loop_stand_next_to_each_other() -> None:
    pipe, _ = pipeline_of(CASES["sd3"])
    rows = observed(pipe, "red", 4, branch="cond", prompt=["a red cube", "a small house"])
    assert rows[0] == rows[1] != [] and rows[2] == rows[3] == []


def test_an_inner_context_keeps_the_prompt_of_the_outer_one() -> None:
    pipe, _ = pipeline_of(CASES["sd3"])
    with dit_attn.run_context(pipe, step=0, steps=4, prompt="a red cube"):
        assert observed(pipe, "red", branch="cond")[0]


def test_a_loop_without_prompt_is_told_how_to_give_it() -> None:
    pipe, _ = pipeline_of(CASES["sd3"])
    with pytest.raises(DitAttnError, match=r"run_context\(..., prompt=...\)") as error:
        observed(pipe, "red", branch="cond")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", [7, [], ["a", 7], {"negative_prompt": "a"}, {"prompt": None}])
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    pipe, _ = pipeline_of(CASES["sd3"])
    with pytest.raises(DitAttnError, match="prompt must be a text, a list of texts"):
        observed(pipe, "red", prompt=prompt)


def test_a_transformer_that_was_enabled_alone_has_nothing_that_encodes() -> None:
    pipe, _ = pipeline_of(CASES["sd3"])
    model = pipe.transformer
    dit_attn.enable(model)

    def observe(call: AttentionCall, request: Any, out: torch.Tensor) -> None:
        call.prompt_tokens("red")

    context = dit_attn.run_context(model, step=0, steps=4, prompt="a red cube")
    with dit_attn.observing(model, observe), context, pytest.raises(DitAttnError, match="give the pipeline to enable"):
        sd3_call(pipe)


def test_embeddings_without_prompt_are_said() -> None:
    with pytest.raises(DitAttnError, match="its tokens are not known from embeddings"):
        run(
            "chroma",
            "red",
            prompt_embeds=torch.zeros(1, 9, 32),
            prompt_attention_mask=torch.ones(1, 9),
            negative_prompt_embeds=torch.zeros(1, 9, 32),
            negative_prompt_attention_mask=torch.ones(1, 9),
        )


def test_a_piece_that_no_prompt_has_is_said() -> None:
    with pytest.raises(DitAttnError, match="the piece 'dog' is in no prompt of this run"):
        run("cogview-4", "dog", prompt="a red cube")


def test_a_piece_that_is_cut_off_is_said() -> None:
    with pytest.raises(DitAttnError, match="cut off before the piece 'house'"):
        run("flux", "house", prompt="a blue ball " * 20 + "house", max_sequence_length=16)


def test_a_list_that_the_pipeline_changes_is_refused() -> None:
    with pytest.raises(DitAttnError, match="changes the list of prompts"):
        run("z-image", "red", prompt=["a red cube", "a red ball"])


def test_tokens_that_something_else_adds_are_not_guessed() -> None:
    """A prompt that was encoded to more tokens than the transformer gets."""
    pipe, _ = pipeline_of(CASES["sd3"])
    with pytest.raises(DitAttnError, match="adds some"):
        observed(pipe, "red", branch="cond", prompt={"prompt": "a red cube", "max_sequence_length": 64})
