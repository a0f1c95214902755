"""Budgets of single heads: every head gets what it would get alone, is counted, saved, and refused where it must be."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import BlockSparse, DitAttnError, Method, RectifiedSpaAttn, ReTtention
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.dispatch import computed_fraction
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from dit_attn.processors.methods.head_budget import budget_of_call, is_full, mean_budget
from dit_attn.processors.methods.re_ttention_masks import band_layout, stack_heads, window_layout
from dit_attn.processors.methods.rectified_spaattn import COMPENSATIONS
from dit_attn.processors.methods.sparse import SparseMethod
from tests._support.compose import forward, tiny

GRID, TEXT = (3, 6, 10), 13
TOKENS: Any = TokenLayout((Span("text", TEXT), visual_span("video", GRID))).resolve(math.prod(GRID) + TEXT)
BLOCKS: dict[str, Any] = {"q_block": 16, "kv_block": 16, "dense_steps": 0}
BUDGET = (0.1, 0.6, 1.0, 0.3)
METHODS: dict[str, SparseMethod] = {
    "density": BlockSparse(density=BUDGET, **BLOCKS),
    "top_p": BlockSparse(top_p=BUDGET, keep=(), **BLOCKS),
    **{name: RectifiedSpaAttn(density=BUDGET, compensation=name, **BLOCKS) for name in COMPENSATIONS},
    "least count": RectifiedSpaAttn(density=BUDGET, top_p=(0.5, 0.3, 0.9, 0.7), **BLOCKS),
    "extra": RectifiedSpaAttn(density=BUDGET, budget="extra", **BLOCKS),
    **{
        f"{mask} {ramp}": ReTtention(density=BUDGET, mask=mask, ramp=ramp, clamp=False, stagger=False, **BLOCKS)
        for mask, ramp in (("band", "none"), ("window", "conserving"), ("window", "paper"), ("selected", "none"))
    },
}  # fmt: skip

COUNTED = ("density", "none", "paper", "repo", "merge", "window conserving")  # all heads of a budget cost the same


class Run:
    """One layer of a run: makes calls of four query heads and two key heads, step by step."""

    def __init__(self, method: SparseMethod, shard: tuple[int, int] = (0, 1)) -> None:
        self.method, self.shard = method, shard
        self.layer: Any = SimpleNamespace(index=0, state={}, stateless=None, rows=(0, 2))

    def call(self, step: int) -> AttentionCall:
        draw = torch.Generator().manual_seed(step)
        q, k, v = (torch.randn(2, TOKENS.seq_len, heads, 16, generator=draw).double() for heads in (4, 2, 2))
        (part, parts), clock = self.shard, SimpleNamespace(step=step, total=20, progress=step / 20)
        here = [x[:, :, part * x.shape[2] // parts : (part + 1) * x.shape[2] // parts] for x in (q, k, v)]
        given: Any = (*here, None, None, False, self.layer, TOKENS, clock, ("uncond", "cond"))
        return AttentionCall(*given, layer_count=4, shard=self.shard)

    def step(self, step: int) -> tuple[torch.Tensor, AttentionCall, Request]:
        """(B, Sv, H, D), the call and its request."""
        call, request = self.call(step), Request()
        self.method.request(call, request)
        assert not request.empty, request.declined
        return executor.run(call, request, executor.dense_rows(call))[:, TEXT:], call, request


def with_budget(method: SparseMethod, change: Any) -> SparseMethod:
    """The method with every budget changed."""
    names = [name for name in ("density", "top_p") if getattr(method, name, None) is not None]
    return dataclasses.replace(method, **{name: change(getattr(method, name)) for name in names})


@pytest.mark.parametrize("name", METHODS)
def test_a_head_is_computed_as_with_its_budget_for_all(name: str) -> None:
    unequal = Run(METHODS[name])
    single = [Run(with_budget(METHODS[name], lambda budget, head=head: min(budget[head], 0.999))) for head in range(4)]
    for step in range(4):
        out, _, request = unequal.step(step)
        costs = []
        for head, run in enumerate(single):
            alone, call, asked = run.step(step)
            costs.append(float(computed_fraction(call, asked)))
            if head != 2:
                torch.testing.assert_close(out[:, :, head], alone[:, :, head], atol=1e-6, rtol=1e-5)
        if name in COUNTED:
            assert float(computed_fraction(unequal.call(step), request)) == pytest.approx(sum(costs) / 4, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "least count"])
def test_a_head_with_budget_1_is_dense_at_every_step(name: str) -> None:
    run = Run(METHODS[name])
    for step in range(4):
        out, call, _ = run.step(step)
        q, k, v = (x.double().transpose(1, 2) for x in (call.q[:, TEXT:, 2], call.k[:, :, 1], call.v[:, :, 1]))
        exact = torch.softmax(q.transpose(1, 2) @ k / 4.0, -1) @ v.transpose(1, 2)
        bound = 1e-6 if isinstance(METHODS[name], ReTtention) else 1e-13
        assert (out[:, :, 2] - exact).abs().max() < bound
        assert step == 0 or (out[:, :, 0] - dense(call)[:, :, 0]).abs().max() > 1e-4


def dense(call: AttentionCall) -> torch.Tensor:
    return executor.dense_rows(call)(call.q[:, TEXT:], call.k, call.v, None)


@pytest.mark.parametrize("name", METHODS)
def test_a_device_that_holds_some_heads_uses_their_budgets(name: str) -> None:
    whole, parts = Run(METHODS[name]), [Run(METHODS[name], (part, 2)) for part in range(2)]
    for step in range(3):
        out = whole.step(step)[0]
        torch.testing.assert_close(torch.cat([run.step(step)[0] for run in parts], 2), out, atol=1e-6, rtol=1e-5)


def test_equal_budgets_are_the_number() -> None:
    for name, method in METHODS.items():
        runs = [Run(with_budget(method, change)) for change in (lambda _: (0.4,) * 4, lambda _: 0.4)]
        for step in range(2):
            first, second = (run.step(step)[0] for run in runs)
            assert torch.equal(first, second), name


def test_the_fixed_masks_of_single_heads_lie_side_by_side() -> None:
    cpu = torch.device("cpu")
    for each in (
        [band_layout(TOKENS, value, 16, 16, cpu) for value in BUDGET],
        [window_layout(TOKENS, value, None, 16, 16, cpu) for value in BUDGET],
    ):
        stacked = stack_heads(each).check()
        assert torch.equal(stacked.materialize(), torch.cat([layout.materialize() for layout in each], 1))
        assert stacked.density == pytest.approx(sum(layout.density for layout in each) / 4)
    assert band_layout(TOKENS, BUDGET, 16, 16, cpu).elements is not None


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_budgets_survive_json_a_folder_and_repr(name: str, tmp_path: Path) -> None:
    layers = 2 if "density" in METHODS[name].to_dict() and getattr(METHODS[name], "top_p", None) is None else 0
    table = dataclasses.replace(METHODS[name], densities=(BUDGET, 0.5)) if layers else METHODS[name]
    assert eval(repr(table)) == table
    saved = json.loads(json.dumps(table.to_dict()))
    assert saved == table.to_dict() and Method.from_dict(saved) == table
    table.save_pretrained(tmp_path)
    back = Method.from_pretrained(tmp_path)
    assert back == table and hash(back) == hash(table) and back.to_dict() == table.to_dict()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: BlockSparse(density=(0.5, 1.5)), "between 1e-06 and 1.0, got (0.5, 1.5)"),
        (lambda: BlockSparse(density=(0.5, float("nan"))), "between 1e-06 and 1.0"),
        (lambda: BlockSparse(top_p=()), "between 1e-06 and 1.0, got ()"),
        (lambda: ReTtention(density=(0.5, "a")), "a number or a list (a,b,...), each item a number"),  # type: ignore
        (lambda: RectifiedSpaAttn(density=(0.5, 0.2), top_p=(0.5,)), "density for 2 heads and a top_p for 1"),
        (lambda: BlockSparse(densities=((0.5, 0.0), 0.5)), "above 0 and at most 1, got 0.0"),
        (lambda: BlockSparse(densities=((), 0.5)), "above 0 and at most 1, got ()"),
        (lambda: BlockSparse(densities=(((0.5,),),)), "each item a number or a list"),  # type: ignore
    ],
)
def test_budgets_that_make_no_sense_are_refused(make: Any, words: str) -> None:
    with pytest.raises(DitAttnError, match=re.escape(words)):
        make()


def test_means_and_full_budgets() -> None:
    assert is_full((1.0, 1.0)) and is_full(1.0) and not is_full((1.0, 0.9)) and not is_full(None)
    assert mean_budget((0.5, 1.0)) == 0.75 and mean_budget(0.5) == 0.5
    call = Run(METHODS["density"], (1, 2)).call(0)
    assert call.heads == slice(2, 4) and budget_of_call(BUDGET, call) == (1.0, 0.3)
    assert budget_of_call(0.5, call) == 0.5
    assert BlockSparse(density=(1.0, 1.0)).is_dense and not BlockSparse(density=(1.0, 0.5)).is_dense
    assert BlockSparse(top_p=(1.0, 1.0)).is_dense and RectifiedSpaAttn(density=(1.0, 1.0)).is_dense
    assert ReTtention(density=(1.0, 1.0)).is_dense
    assert BlockSparse(density=(0.25, 0.75)).executed == 0.5 and BlockSparse(top_p=(0.25, 0.75)).executed is None
    assert ReTtention(density=(0.1, 0.3), period=5).executed == pytest.approx(0.4)
    assert RectifiedSpaAttn(density=(0.1, 0.3), pooled_block=32).executed == pytest.approx(0.2 + 1 / 32)
    assert BlockSparse(densities=((0.25, 0.75), (1.0, 1.0))).expected == 0.75


# -- on a model --------------------------------------------------------------------------------------------------------

ON_MODEL: dict[str, Any] = {"q_block": 32, "kv_block": 32, "dense_steps": 0, "keep": ()}


def heads_of(model: torch.nn.Module) -> int:
    return int(model.config.num_attention_heads)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("name", ("wan", "flux"))
def test_summary_and_explain_count_unequal_heads(name: str) -> None:
    model, args = tiny(name)
    budgets = (0.25,) * (heads_of(model) - 1) + (1.0,)
    dit_attn.enable(model, BlockSparse(density=budgets, **ON_MODEL))
    counted: list[float] = []

    def observe(call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        if request.layout is not None:
            visual = (call.visual.stop - call.visual.start) / call.q.shape[1]
            blocks = request.layout.block_mask().double().mean((0, 2, 3))
            assert blocks[-1] == 1.0 and blocks[:-1].lt(0.31).all()
            counted.append(visual * float(blocks.mean()) + 1.0 - visual)

    with dit_attn.observing(model, observe):
        forward(model, args)
    found = dit_attn.summary(model)
    assert counted and found.density == pytest.approx(sum(counted) / len(counted))
    expected = dit_attn.explain(model, BlockSparse(density=budgets, **ON_MODEL), height=512, width=512)
    assert expected.density == pytest.approx(mean_budget(budgets))


def test_explain_counts_rows_of_a_table() -> None:
    model, _ = tiny("wan")
    layers, full = len(dit_attn.enable(model).layers), (1.0,) * heads_of(model)
    rows = (full, *((0.25,) * (heads_of(model) - 1) + (0.5,) for _ in range(layers - 1)))
    found = dit_attn.explain(model, BlockSparse(densities=rows, **ON_MODEL), height=512, width=512)
    assert found.density == pytest.approx(sum(map(mean_budget, rows)) / layers)
    assert any(f"{100 / layers:.0f} % of the layers and parts" in line for line in found.fallbacks)


def test_a_table_may_hold_a_row_of_heads_for_a_layer() -> None:
    model, args = tiny("wan")
    layers, heads = len(dit_attn.enable(model).layers), heads_of(model)
    dit_attn.enable(model, BlockSparse(density=0.25, **ON_MODEL))
    uniform = forward(model, args)
    dit_attn.enable(model, BlockSparse(densities=((0.25,) * heads, *(0.25,) * (layers - 1)), **ON_MODEL))
    assert torch.equal(forward(model, args), uniform)
    dit_attn.enable(model, BlockSparse(densities=((0.25,) * (heads - 1) + (0.5,), *(0.25,) * (layers - 1)), **ON_MODEL))
    assert not torch.equal(forward(model, args), uniform)
    dit_attn.enable(model, BlockSparse(densities=((1.0,) * heads,) * layers, **ON_MODEL))
    out = forward(model, args)
    assert dit_attn.summary(model).fallbacks == {"density 1": layers}
    dit_attn.disable(model)
    assert torch.equal(out, forward(model, args))


@pytest.mark.parametrize("cls", (BlockSparse, RectifiedSpaAttn, ReTtention))
def test_another_number_of_heads_is_refused_before_anything_changes(cls: Any) -> None:
    model, _ = tiny("wan")
    heads, before = heads_of(model), model.blocks[0].attn1.processor  # type: ignore[union-attr, index]
    wrong = (0.5,) * (heads + 1)
    layers = len(dit_attn.enable(model).layers)
    dit_attn.disable(model)
    message = f"has {heads + 1} numbers for the heads of layer 0, but WanTransformer3DModel has {heads} heads there"
    for method in (cls(density=wrong), cls(densities=(wrong, *(0.5,) * (layers - 1)))):
        with pytest.raises(DitAttnError, match=message):
            dit_attn.enable(model, method)
        with pytest.raises(DitAttnError, match=message):
            dit_attn.explain(model, method, height=512, width=512)
    assert model.blocks[0].attn1.processor is before  # type: ignore[union-attr, index]
    dit_attn.enable(model, cls(density=wrong, dense_layers=tuple(range(layers))))
    dit_attn.disable(model)


@pytest.mark.parametrize("cls", (BlockSparse, RectifiedSpaAttn, ReTtention))
def test_a_layer_that_does_not_say_its_heads_falls_back_and_counts_why(cls: Any, monkeypatch: Any) -> None:
    model, args = tiny("wan")
    stock, heads = forward(model, args), heads_of(model)
    monkeypatch.setattr("dit_attn.processors.attach.transformer_run.head_count", lambda layer: None)
    layers = len(dit_attn.enable(model, cls(density=(0.5,) * (heads + 1), dense_steps=0)).layers)
    assert torch.equal(forward(model, args), stock)
    assert dit_attn.summary(model).fallbacks == {f"density for {heads + 1} heads, the layer has {heads}": layers}
    dit_attn.disable(model)


def test_one_bad_head_takes_the_layer_above_the_error_bound() -> None:
    model, args = tiny("wan")
    few = (1.0,) * (heads_of(model) - 1)
    errors = []
    for budget in ((*few, 0.9), (*few, 0.05)):
        dit_attn.enable(model, BlockSparse(density=budget, max_error=1e9, **ON_MODEL))
        forward(model, args)
        worst = dit_attn.summary(model).worst_error
        assert worst is not None
        errors.append(worst[0])
    assert errors[0] < errors[1]
    bound = (errors[0] + errors[1]) / 2
    for budget, sparse in (((*few, 0.9), True), ((*few, 0.05), False)):
        model, args = tiny("wan")
        with_bound = BlockSparse(density=budget, max_error=bound, **ON_MODEL)
        layers = len(dit_attn.enable(model, with_bound).layers)
        if sparse:
            forward(model, args)
        else:
            with pytest.warns(UserWarning, match="above max_error"):
                forward(model, args)
        assert (dit_attn.summary(model).sparse_calls == layers) is sparse
