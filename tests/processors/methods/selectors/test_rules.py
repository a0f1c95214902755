"""Every rule ranks blocks as its paper says, in float64; forced blocks, costs, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_attn import BlockSparse, DitAttnError, RectifiedSpaAttn
from dit_attn.kernels import pool_blocks
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import Request
from dit_attn.processors.methods import pooled_scores
from dit_attn.processors.methods.selecting import MEASURED, SELECTORS
from dit_attn.processors.methods.selectors import RULES
from dit_attn.processors.methods.selectors.base import SelectorInput
from tests._support import selector_references as references
from tests._support.rectified_reference import Setup
from tests.processors.methods.test_rectified_spaattn import call, method, run

CASES = [("", 0), ("last", 5), ("first", 0)]


def given(settings: RectifiedSpaAttn, text: str, masked: int) -> tuple[SelectorInput, Setup]:
    case = call(text, masked=masked)
    request = Request()
    assert executor.read_mask(case, request) is None
    return settings.selector_input(settings.rows_of(case, request), 0.25), Setup(case, settings, 1, 3)


def check(found: torch.Tensor, expected: torch.Tensor, atol: float = 2e-5) -> None:
    assert torch.equal(found == float("-inf"), expected == float("-inf"))
    finite = expected > float("-inf")
    torch.testing.assert_close(found.double()[finite], expected[finite], atol=atol, rtol=2e-4)


def test_the_choices_are_the_rules() -> None:
    assert (*RULES, MEASURED) == tuple(SELECTORS)


@pytest.mark.parametrize("text, masked", CASES)
def test_sol_attn_standardizes_by_the_moments_of_the_key_means(text: str, masked: int) -> None:
    seen, setup = given(method(selector="sol"), text, masked)
    check(RULES["sol"].rank(seen).scores[1, 3], references.sol(setup, 16), 1e-4)
    near = RULES["sol"].forced(seen)
    assert near is not None
    distance = torch.arange(near.shape[2])[:, None] - torch.arange(near.shape[3])
    visual = torch.arange(near.shape[3]) < (240 // 16)
    assert torch.equal(near[0, 0], (distance.abs() <= 1) & visual)


@pytest.mark.parametrize("text, masked", CASES)
def test_sub_block_is_a_log_sum_exp_over_quarters(text: str, masked: int) -> None:
    seen, setup = given(method(selector="sub-block"), text, masked)
    assert seen.probe == 4
    check(RULES["sub-block"].rank(seen).scores[1, 3], references.sub_block(setup, 16, 4))


@pytest.mark.parametrize("text, masked", CASES)
def test_dfs_sums_the_softmax_of_tiles(text: str, masked: int) -> None:
    seen, setup = given(method(selector="dfs", probe=8), text, masked)
    check(RULES["dfs"].rank(seen).scores[1, 3], references.dfs(setup, 16, 8))
    assert method(selector="dfs", q_block=64, kv_block=64).selector_input(seen.rows, 1.0).probe == 16


@pytest.mark.parametrize("text, masked", CASES)
def test_pisa_adds_the_log_variance_of_the_keys(text: str, masked: int) -> None:
    seen, setup = given(method(selector="pisa"), text, masked)
    if not text:
        check(RULES["pisa"].rank(seen).scores[1, 3], references.pisa(setup, 16))
        return
    blocks = setup.visual // 16
    check(RULES["pisa"].rank(seen).scores[1, 3, :, :blocks], references.pisa(setup, 16)[:, :blocks])


@pytest.mark.parametrize("probe", [None, 4])
@pytest.mark.parametrize("text, masked", CASES)
def test_ear_is_the_value_form_of_the_paper(text: str, masked: int, probe: int | None) -> None:
    seen, setup = given(method(selector="ear", probe=probe), text, masked)
    check(RULES["ear"].rank(seen).scores[1, 3], references.ear(setup, 16, probe or 16), 1e-3)


@pytest.mark.parametrize("compensation", ["merge", "none"])
@pytest.mark.parametrize("text, masked", CASES)
def test_the_centered_form_is_the_norm_of_the_summed_error(text: str, masked: int, compensation: str) -> None:
    settings = method(selector="ear-centered", probe=8, compensation=compensation, pooled_block=8)
    seen, setup = given(settings, text, masked)
    pooled = 8 if compensation == "merge" else None
    probes = pool_blocks(seen.rows.q, 8)[1, 3].double()
    expected = 0.5 * references.block_error(setup, 16, probes, 2, pooled).log()
    check(RULES["ear-centered"].rank(seen).scores[1, 3], expected, 2e-3)


@pytest.mark.parametrize("name", list(RULES))
def test_a_few_heads_at_a_time_rank_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _ = given(method(selector=name), "last", 3)
    whole = RULES[name].rank(seen)
    monkeypatch.setattr(pooled_scores, "AT_ONCE", 1)
    apart = RULES[name].rank(seen)
    torch.testing.assert_close(whole.scores, apart.scores, atol=1e-5, rtol=1e-5)
    assert whole.scores.shape == (2, 4, 15, 17)
    assert whole.scores.dtype == torch.float32 and bool(torch.isfinite(whole.comparable[0]).all())


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("text", ["", "first"])
def test_both_methods_take_every_rule_within_their_budget(name: str, text: str) -> None:
    case = call(text)
    for settings in (
        method(selector=name, keep=(), compensation="none"),
        BlockSparse(selector=name, density=0.3, q_block=16, kv_block=16, dense_steps=0, keep=()),
    ):
        out, request = run(case, settings)  # type: ignore[arg-type]
        assert request.layout is not None and out.isfinite().all()
        counts = request.layout.kv_num_blocks
        assert int(counts.max()) == int(counts.min()) == -(-3 * request.layout.nk // 10)
        assert request.selection_cost == pytest.approx(settings.selection_cost)


def test_block_sparse_leaves_out_text_that_it_need_not_keep() -> None:
    case = call("first", k=torch.zeros(2, 261, 2, 16))
    settings: dict[str, Any] = {"density": 0.06, "q_block": 16, "kv_block": 16, "dense_steps": 0, "selector": "pisa"}
    for keep, text in ((("diagonal",), False), (("text", "diagonal"), True)):
        _, request = run(case, BlockSparse(keep=keep, **settings))  # type: ignore[arg-type]
        assert request.layout is not None
        assert bool(request.layout.block_mask()[..., 15:].all()) is text


def test_costs_are_shares_of_dense_attention() -> None:
    sizes: dict[str, Any] = {"q_block": 64, "kv_block": 128}
    assert BlockSparse(selector="ear", **sizes).selection_cost == 0.5 / 64
    assert BlockSparse(selector="ear-centered", probe=16, **sizes).selection_cost == 1 / 16
    assert BlockSparse(selector="sub-block", **sizes).selection_cost == 0.5 / 16**2
    assert BlockSparse(selector="dfs", **sizes).executed == pytest.approx(0.25 + 0.5 / 16**2)
    assert BlockSparse(selector="sol", **sizes).selection_cost == 0.0


def test_a_probe_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DitAttnError, match=r"probe is 8.*sol looks at whole blocks"):
        BlockSparse(selector="sol", probe=8)
    with pytest.raises(DitAttnError, match=r"probe must divide q_block 128 and kv_block 128, got 24"):
        RectifiedSpaAttn(selector="dfs", probe=24)
    assert BlockSparse(selector="ear", q_block=96, probe=24).probe == 24
    with pytest.raises(DitAttnError, match=r"selector.*'sole'"):
        BlockSparse(selector="sole")
