"""SLA: classes of blocks, both branches, the learned projection, and what a fine-tuning needs of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import SLA, BlockSparse, DitAttnError, Method, models
from dit_attn.kernels.selection.select import plan_scores
from dit_attn.processors.attach.attach import session_of
from dit_attn.processors.core.call import Request
from dit_attn.processors.methods.sla import LinearProjection, linear_blocks
from tests._support.compose import forward, same, tiny
from tests._support.recorded_calls import requests
from tests._support.sla_reference import classes, sparse_linear

BLOCKS: dict[str, Any] = {"q_block": 32, "kv_block": 32}
HALF = SLA(density=0.3, negligible=0.2, **BLOCKS)


def learned(model: Any) -> dict[str, torch.nn.Parameter]:
    """The projections by name."""
    return {name: value for name, value in model.named_parameters() if name.startswith("dit_attn.")}


def trained(model: Any, seed: int = 0) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in learned(model).values():
            value.copy_(0.3 * torch.randn(value.shape, generator=rng))


# -- classes of blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ("marginal", "noncritical", "all"))
@pytest.mark.parametrize(("density", "negligible"), ((0.05, 0.1), (0.3, 0.25), (0.6, 0.4), (0.01, 0.0)))
def test_every_row_has_the_counts_of_its_settings(density: float, negligible: float, domain: str) -> None:
    scores = torch.randn(2, 3, 5, 23, generator=torch.Generator().manual_seed(1))
    scores[0, 0, 0] = 1.0  # ties go to the lower index
    scores[1, :, :, 20:] = -torch.inf
    settings = SLA(density=density, negligible=negligible, linear_domain=domain)
    sizes = {"q_len": 40, "kv_len": 184, "q_block": 8, "kv_block": 8}
    layout = plan_scores(scores, density=density, **sizes).layout
    pairs = linear_blocks(scores, layout, domain, negligible)
    critical, linear = classes(scores, settings, torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    assert torch.equal(layout.block_mask(), critical)
    if domain == "all":
        assert pairs is None
        return
    assert pairs is not None and torch.equal(pairs, linear) and not (pairs & critical).any()
    assert (critical[0].sum(-1) == max(1, -int(-density * 23 // 1))).all()
    if domain == "marginal":
        assert ((~critical & ~pairs)[0].sum(-1) == int(negligible * 23)).all()


def test_a_constant_added_to_every_key_changes_no_class() -> None:
    """Smooth-K of the paper's code subtracts the mean of the keys: scores move by a constant per row."""
    model, args = tiny("wan")
    dit_attn.enable(model, HALF)
    with requests() as seen:
        forward(model, args)
    call = seen[0][0]
    call.q, call.k, call.v = (x.double() for x in (call.q, call.k, call.v))
    moved = copy.copy(call)
    moved.k = call.k - call.k.mean(1, keepdim=True)
    zero = torch.zeros(call.q.shape[-1], call.q.shape[-1]), torch.zeros(call.q.shape[-1])
    expected, found = (sparse_linear(each, HALF, *zero) for each in (call, moved))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)


# -- the operator ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("wan", "cogvideox", "sd3"))
@pytest.mark.parametrize(
    "settings",
    (
        HALF,
        replace(HALF, linear_domain="noncritical", feature_map="elu", order="none"),
        replace(HALF, linear_domain="all", feature_map="relu"),
    ),
    ids=lambda settings: settings.linear_domain,
)
def test_a_run_equals_its_equations_and_text_rows_stay_exact(name: str, settings: SLA) -> None:
    model, args = tiny(name)
    dit_attn.enable(model, settings)
    trained(model)
    with requests() as seen:
        forward(model, args)
    assert len(seen) == len(dit_attn.summary(model).layers)
    call, _, out = seen[-1]
    weight, bias = list(learned(model).values())[-2:]
    visual = call.visual
    torch.testing.assert_close(
        out[:, visual].double(), sparse_linear(call, settings, weight, bias), atol=2e-5, rtol=1e-4
    )
    scores = call.q.double().transpose(1, 2) @ call.k.double().transpose(1, 2).mT * call.softmax_scale
    exact = (torch.softmax(scores, -1) @ call.v.double().transpose(1, 2)).transpose(1, 2)
    text = torch.ones(out.shape[1], dtype=torch.bool)
    text[visual] = False
    torch.testing.assert_close(out.double()[:, text], exact[:, text], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("density", (0.3, 0.8))  # of the second some rows have no marginal block
def test_gradients_are_those_of_the_equations_in_double_precision(density: float) -> None:
    model, args = tiny("wan")
    settings = replace(HALF, density=density, order="none")
    dit_attn.enable(model, settings)
    trained(model)
    with requests() as seen:
        forward(model, args)
    call = seen[-1][0]
    call.layer.learned = {id(settings): call.layer.learned[id(session_of(model).methods[0])]}
    parameters = list(learned(model).values())[-2:]
    call.q, call.k, call.v = tensors = tuple(x.double().requires_grad_() for x in (call.q, call.k, call.v))
    request = Request()
    settings.plan(call, request)
    assert request.compute_visual is not None
    found, expected = request.compute_visual(), sparse_linear(call, settings, *parameters)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = (torch.autograd.grad(out, (*tensors, *parameters), grad) for out in (found, expected))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-6, rtol=1e-5)
        assert torch.isfinite(ours).all()


def test_before_training_it_is_block_sparse_attention_and_density_1_is_stock() -> None:
    model, args = tiny("wan")
    stock = forward(model, args)
    dit_attn.enable(model, SLA(density=0.3, order="none", **BLOCKS))
    found = forward(model, args)
    dit_attn.enable(model, BlockSparse(density=0.3, keep=(), dense_steps=0, **BLOCKS))
    assert same(found, forward(model, args)) and not same(found, stock)
    dit_attn.enable(model, SLA(density=1.0, **BLOCKS))
    trained(model)
    assert same(stock, forward(model, args))


def test_shares_of_the_mass_learn_nothing_and_are_the_branches_weighted() -> None:
    model, args = tiny("wan")
    method = replace(HALF, combine="mass", order="none")
    dit_attn.enable(model, method)
    assert not learned(model)
    found = forward(model, args)
    dit_attn.enable(model, replace(HALF, order="none"))
    assert not same(found, forward(model, args))
    all_critical = replace(method, density=0.99, negligible=0.0)
    dit_attn.enable(model, all_critical)
    found = forward(model, args)
    dit_attn.disable(model)
    torch.testing.assert_close(found, forward(model, args), atol=1e-4, rtol=1e-3)


def test_the_summary_counts_the_linear_branch() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, SLA(density=0.25, negligible=0.0, order="none", **BLOCKS))
    with requests() as seen:
        forward(model, args)
    tokens, dim = seen[0][0].q.shape[1], seen[0][0].q.shape[-1]
    blocks = -(-tokens // 32)
    expected = -(-blocks // 4) / blocks + dim / tokens + dim / (2 * 32 * 32)
    assert dit_attn.summary(model).density == pytest.approx(expected)


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def test_the_projection_gets_a_gradient_at_once_and_the_features_after_it() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, HALF)
    output = model(**args, return_dict=False)[0]
    output.square().mean().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in learned(model).values())


def test_another_density_keeps_the_tensors_and_another_domain_does_not() -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model, HALF)
    trained(model)
    before = learned(model)
    dit_attn.enable(model, replace(HALF, density=0.1))
    assert all(value is before[name] for name, value in learned(model).items())
    dit_attn.enable(model, replace(HALF, linear_domain="all"))
    assert not any(value.any() for value in learned(model).values())


def test_projections_stay_fp32_and_run_in_the_type_of_the_model() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, HALF)
    trained(model)
    model.to(torch.bfloat16)
    values = learned(model).values()
    assert all(value.dtype == torch.float32 for value in values) and model.dtype == torch.bfloat16
    args = {name: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in args.items()}
    assert torch.isfinite(forward(model, args)).all() and dit_attn.summary(model).sparse_calls
    assert LinearProjection(4).to(torch.float64).weight.dtype == torch.float32


def test_tensors_are_saved_beside_the_settings_and_come_back(tmp_path: Path) -> None:
    model, args = tiny("wan")
    session = dit_attn.enable(model, HALF)
    trained(model)
    expected = forward(model, args)
    session.save_pretrained(tmp_path / "tuned")
    again, _ = tiny("wan")
    dit_attn.enable(again, str(tmp_path / "tuned"))
    assert same(expected, forward(again, args))
    assert session_of(again).methods[0] == replace(HALF, weights=str(tmp_path / "tuned"))
    clone = copy.deepcopy(model)
    assert same(expected, forward(clone, args))


def test_a_compiled_model_gives_the_same() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, HALF)
    trained(model)
    expected = forward(model, args)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(forward(compiled, args), expected, atol=1e-5, rtol=1e-4)


def test_a_whole_run_of_a_pipeline_counts_sparse_calls() -> None:
    pipe = models.load("tiny-video")
    dit_attn.enable(pipe, SLA(density=0.2, q_block=36, kv_block=36, order="none"))
    pipe.set_progress_bar_config(disable=True)
    pipe("a circle", **{**models.call_defaults("tiny-video"), "num_inference_steps": 1}, output_type="latent")
    summary = dit_attn.summary(pipe)
    assert summary.sparse_calls == summary.calls > 0


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: SLA(density=0.8, negligible=0.3), "more than all blocks; lower one"),
        (lambda: SLA(densities=(0.5, 0.5)), "sla takes no densities"),
        (lambda: SLA(combine="mass", weights="folder"), "learns nothing; leave out weights"),
        (lambda: SLA(linear_domain="marginals"), "linear_domain"),
        (lambda: SLA(tile=(1, 2)), "three positive sizes"),
        (lambda: Method.from_dict({"method": "sla", "topk": 0.1}), "topk"),
    ),
)
def test_bad_settings_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(DitAttnError, match=message):
        make()
