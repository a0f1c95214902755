"""The parts of tiny-edit are arranged for training as the stock pipeline arranges them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import edit_samples, edits
from dit_attn.eval.shapes_world.edit_verify import judge_edit
from dit_attn.models import evaluate_edits, export, loop, omnigen
from dit_attn.models.data import draw
from dit_attn.models.evaluate_edits import EditSample
from dit_attn.models.recipe import RECIPES, NetSize

SIZE = NetSize(hidden=48, layers=2, heads=2, text_length=128)


@pytest.fixture(scope="module")
def run():
    made = loop.Run(replace(RECIPES["tiny-edit"], net=SIZE), 0, torch.device("cpu"))
    torch.nn.init.normal_(made.model.transformer.proj_out.weight, std=0.1)
    made.average = {k: v.clone() for k, v in made.model.state_dict().items()}
    return made


@pytest.fixture(scope="module")
def pipe(run):
    pytest.importorskip("torchvision")
    made = export.pipeline_of(run)
    made.set_progress_bar_config(disable=True)
    return made


def _prompts(count):
    """Prompts, the longest first, and images before."""
    found = edit_samples.held_out_sample(count)
    found.sort(key=lambda edit: -len(edits.instruction(edit.pieces).replace(",", " ,").split()))
    before, _ = edit_samples.render_pairs(found, 64)
    before = (before * 255).round() / 255
    return [omnigen.prompt_of(edits.instruction(edit.pieces)) for edit in found], before


def test_training_arranges_the_sequence_as_the_pipeline_does_in_all_three_branches(run, pipe):
    prompts, before = _prompts(3)
    seen = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: seen.append({**kwargs, "out": out[0]}), with_kwargs=True
    )
    images = [[Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy())] for image in before]
    call = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
    pipe(prompts, input_images=images, generator=torch.Generator().manual_seed(0), **call)
    hook.remove()
    stock = seen[1]
    mine = omnigen.sequences(
        run.tokenizer, [*prompts, *[""] * 3, *[omnigen.TAG] * 3], torch.cat([before] * 3) * 2 - 1, 64
    )
    assert mine.order.tolist()[0] == 0
    for name, value in (("input_ids", mine.ids), ("attention_mask", mine.mask)):
        assert torch.equal(stock[name][mine.order], value), name
    assert torch.equal(stock["position_ids"][mine.order], mine.rest["position_ids"])
    level = stock["timestep"].float() / 1000
    with torch.no_grad():
        predicted = run.averaged()(stock["hidden_states"], level, mine.ids, mine.mask, mine.rest)
    assert torch.allclose(predicted, stock["out"][mine.order], atol=1e-4)


def test_the_branch_without_conditions_is_an_empty_instruction(run):
    tokens = run.tokenizer.convert_ids_to_tokens(run.tokenizer(omnigen.framed(omnigen.negative_prompt())).input_ids)
    assert tokens == ["<s>", "<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>"]
    assert tokens == run.tokenizer.convert_ids_to_tokens(run.tokenizer(omnigen.framed("")).input_ids)


def test_every_word_is_a_token_and_others_are_unknown(run):
    ids = run.tokenizer("turn the elephant into a cross; remove it and add").input_ids
    words = run.tokenizer.convert_ids_to_tokens(ids)
    assert words == ["<s>", "turn", "the", "<unk>", "into", "a", "cross", ",", "remove", "<unk>", ",", "add"]
    assert run.tokenizer.unk_token_id not in run.tokenizer(edits.vocabulary(), add_special_tokens=False).input_ids


def test_rows_of_a_batch_start_with_the_longest_and_some_lack_instruction_or_image(run):
    recipe = replace(run.recipe, caption_drop=0.3, image_drop=0.3)
    batch = draw(recipe, recipe.stages[1], run.tokenizer, torch.Generator().manual_seed(0), run.device)
    lengths = (batch.ids != run.tokenizer.pad_token_id).sum(1)
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
    assert (lengths == 5).any() and (lengths == 5 + 2 + 16).any() and lengths[0] == batch.ids.shape[1]
    assert len(batch.rest["input_img_latents"]) == (lengths > 5).sum() == len(batch.rest["input_image_sizes"])
    row = next(iter(batch.rest["input_image_sizes"]))
    assert batch.rest["input_img_latents"][0].shape == (1, 3, 64, 64)
    start, stop = batch.rest["input_image_sizes"][row][0]
    assert stop - start == 16 and not batch.ids[row, start:stop].any()


def test_at_first_an_output_patch_attends_to_the_input_patch_at_its_place(run):
    """Of the attention of the first layer, most goes to the two tokens at the place of the query."""
    fresh = omnigen.build_transformer(len(run.tokenizer), RECIPES["tiny-edit"].net)
    inputs = {}
    fresh.layers[0].self_attn.to_q.register_forward_hook(lambda module, args, out: inputs.update(q=out))
    fresh.layers[0].self_attn.to_k.register_forward_hook(lambda module, args, out: inputs.update(k=out))
    turns = []
    fresh.rope.register_forward_hook(lambda module, args, out: turns.append(out))
    prompts, before = _prompts(1)
    made = omnigen.sequences(run.tokenizer, prompts, before * 2 - 1, 64)
    arguments = {"input_ids": made.ids, "attention_mask": made.mask, **made.rest}
    fresh(torch.randn(1, 3, 64, 64), torch.tensor([900.0]), **arguments)
    from diffusers.models.embeddings import apply_rotary_emb

    heads = RECIPES["tiny-edit"].net.heads
    q, k = (inputs[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qk")
    q, k = (apply_rotary_emb(one, turns[0], use_real_unbind_dim=-2) for one in (q, k))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)[0, :, -16:].softmax(-1)
    start = made.rest["input_image_sizes"][0][0][0]
    own = torch.arange(16)
    assert weights[:, own, start + own].mean() > 0.25 and weights[:, own, own - 16].mean() > 0.25
    assert weights[:, own, start + (own + 1) % 16].mean() < 0.05


def test_a_missing_torchvision_is_named(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DitAttnError, match="pip install torchvision"):
        export.pipeline_of(run)


def test_an_evaluation_edits_each_item_with_its_own_noise(pipe):
    items = edit_samples.held_out_sample(5)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.5, "img_guidance_scale": 1.0}
    together = evaluate_edits.generate(pipe, items, call, seed=0, batch=5)
    alone = [evaluate_edits.generate(pipe, [item], call, seed=i)[0] for i, item in enumerate(items)]
    for one, other in zip(together, alone, strict=True):
        assert one.edit == other.edit and np.allclose(one.output, other.output, atol=0.02)


def test_figures_count_pieces_and_what_is_untouched():
    items = edit_samples.held_out_sample(24)
    before, after = (x.permute(0, 2, 3, 1).numpy() for x in edit_samples.render_pairs(items, 64))
    done = [EditSample(i, a, b, judge_edit(b, i)) for i, a, b in zip(items, before, after, strict=True)]
    undone = [EditSample(i, a, a, judge_edit(a, i)) for i, a in zip(items, before, strict=True)]
    figures = evaluate_edits.table(done)
    assert figures["passed"] and figures["single_edits"]["of"] == 6 and figures["pieces"]["4"]["of"] == 24
    assert figures["whole_edit"]["accuracy"] == 1.0
    assert figures["seen_pairs"]["of"] + figures["never_seen_pairs"]["of"] == 24
    idle = evaluate_edits.table(undone)
    assert not idle["passed"] and idle["single_edits"]["right"] == 0 and idle["untouched"]["accuracy"] == 1.0
    lines = evaluate_edits.report_lines({**idle, "edits": 24})
    assert lines[0].startswith("on 24 held-out edits: single edits 0 %, untouched 100 %") and "not passed" in lines[-1]
    assert evaluate_edits.contact_sheet(undone[:4]).size[0] > 400
