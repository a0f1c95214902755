"""Scale, recorded and replaced outputs of a dispatched call: on the stock path, with layouts, biases and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from dit_attn import BlockSparse
from dit_attn.errors import DitAttnError
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.dispatch import dispatch_attention
from dit_attn.processors.core.tokens import TokenLayout, visual_span
from dit_attn.processors.guidance.perturbation import Perturbation
from tests._support.core_calls import TEXT, Dispatched, host_run, random_args, stock_attention
from tests._support.recorded_calls import reference
from tests.processors.core.test_sequence_parallel import Mesh, Ranks, sharded

SPARSE = BlockSparse(density=0.4, q_block=32, kv_block=32, dense_steps=0)


@dataclass
class Asks:
    """A method that asks what it is given to ask."""

    scale: float = 1.0
    bias: float = 0.0
    decline: str = ""
    record: Any = None
    output: torch.Tensor | None = None

    role, min_tokens, sites = "", 0, ("self",)

    def request(self, call: AttentionCall, request: Request) -> None:
        request.multiply_scale(self.scale)
        request.add_span_bias(call, slice(0, 30), slice(4, 12), self.bias)
        if self.decline:
            request.decline(self.decline)
        if self.record is not None:
            request.record_output(self.record)
        if self.output is not None:
            request.replace_output(self.output)


def biased(value: float) -> torch.Tensor:
    matrix = torch.zeros(1, 1, 308, 308, dtype=torch.float64)
    matrix[:, :, :30, 4:12] = value
    return matrix


@pytest.mark.parametrize("decline", ["", "not now"])
def test_stock_attention_has_the_scale_also_where_the_method_declines(decline: str) -> None:
    run, layer = host_run([Asks(0.5, decline=decline), Asks(3.0)])
    args = random_args(scale=0.4)
    done = Dispatched(run, layer, args)
    assert done.stock_calls == 1 and torch.equal(done.out, stock_attention(replace(args, scale=0.4 * 1.5)))
    assert layer.stats.scaled_calls == 1 and layer.stats.fallbacks == ({decline: 1} if decline else {})


@pytest.mark.parametrize("bias", [0.0, 1.1, -math.inf])
@pytest.mark.parametrize("sparse", [False, True])
def test_scale_joins_a_bias_and_a_layout_that_is_chosen_by_it(sparse: bool, bias: float) -> None:
    methods = [*[SPARSE] * sparse, Asks(2.5, bias)]
    run, layer = host_run(methods)
    done = Dispatched(run, layer, random_args(scale=0.2))
    assert done.call is not None and done.call.scale == 0.5 and (done.request.layout is not None) is sparse
    truth = reference(done.call, done.request, biased(bias))
    torch.testing.assert_close(done.out.double(), truth, atol=5e-6, rtol=2e-5)


def test_a_factor_of_one_is_bit_equal_and_nothing_is_counted() -> None:
    run, layer = host_run([Asks(1.0)])
    args = random_args()
    assert torch.equal(Dispatched(run, layer, args).out, stock_attention(args))
    assert layer.stats.scaled_calls == 0 and layer.stats.fallbacks == {"nothing requested": 1}


def test_a_perturbed_pass_has_the_scale() -> None:
    run, layer = host_run([Asks(4.0)])
    args = random_args()
    run.perturbed = Perturbation({"blocks.0": {1: 0.5}}, target="mean-query")
    out = Dispatched(run, layer, args).out
    run, layer = host_run([])
    run.perturbed = Perturbation({"blocks.0": {1: 0.5}}, target="mean-query")
    assert torch.equal(out, Dispatched(run, layer, replace(args, scale=4.0 * 16**-0.5)).out)


@pytest.mark.parametrize("methods", [[], [SPARSE], [Asks(bias=1.0)]], ids=["stock", "sparse", "biased"])
def test_the_recorded_output_is_that_of_the_call_and_recording_changes_nothing(methods: list[Any]) -> None:
    seen: list[torch.Tensor] = []
    plain = Dispatched(*host_run(methods), random_args())
    run, layer = host_run([*methods, Asks(record=seen.append)])
    done = Dispatched(run, layer, random_args())
    assert torch.equal(done.out, plain.out) and len(seen) == 1 and torch.equal(seen[0], done.out)
    assert layer.stats.fallbacks == ({} if methods else {"only observed": 1})


def test_what_is_recorded_is_not_perturbed_so_that_it_can_be_put_back() -> None:
    seen: list[torch.Tensor] = []
    outs = []
    for ask in (Asks(record=seen.append), None):
        run, layer = host_run([Asks(output=seen[0]) if ask is None else ask])
        run.perturbed = Perturbation({"blocks.0": {0: 1.0}})
        outs.append(Dispatched(run, layer, random_args()).out)
    assert torch.equal(*outs) and not torch.equal(outs[0], seen[0])


def test_a_replaced_output_is_used_and_nothing_else_is_computed_or_planned() -> None:
    class Planned(Asks):
        role = "sparse"

        def request(self, call: AttentionCall, request: Request) -> None:
            raise AssertionError("a layout of a call that is not computed")

    value = torch.randn(2, 308, 4, 16, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    run, layer = host_run([Planned(), Asks(2.0, 1.0, output=value), Asks(record=seen.append)])
    done = Dispatched(run, layer, random_args())
    assert done.stock_calls == 0 and torch.equal(done.out, value.float()) and torch.equal(seen[0], done.out)
    stats = layer.stats
    assert (stats.replaced_calls, stats.biased_calls, stats.sparse_calls) == (1, 0, 0) and not stats.fallbacks


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(DitAttnError, match="must be finite and above 0"):
            Request().multiply_scale(factor)
    with pytest.raises(DitAttnError, match=r"replaces blocks\.0 must be .* = \(2, 308, 4, 16\), got \(1, 308"):
        Dispatched(*host_run([Asks(output=torch.zeros(1, 308, 4, 16))]), random_args())
    with pytest.raises(DitAttnError, match="two methods replace"):
        Dispatched(*host_run([Asks(output=torch.zeros(2, 308, 4, 16))] * 2), random_args())


@pytest.mark.parametrize("bias", [0.0, 1.1], ids=["stock", "biased"])
def test_two_ranks_scale_record_and_replace_as_one(bias: float) -> None:
    full, parts = random_args(scale=0.3), [TEXT, 288]
    per_head = torch.tensor([[0.5, -1.0, 2.0, -math.inf]])  # of the model's four heads

    class PerHead(Asks):
        def request(self, call: AttentionCall, request: Request) -> None:
            super().request(call, request)
            if self.bias:
                request.add_span_bias(call, slice(40, 60), slice(0, 5), per_head)
                request.add_bias(call, torch.ones(1, 4, 308, 1), torch.full((1, 2, 308, 1), 0.25))
            heads.append(call.heads)

    heads: list[slice] = []
    alone = Dispatched(*host_run([PerHead(2.0, bias)]), full)

    def work(mesh: Mesh) -> Any:
        q, k, v = (sharded(x, parts, 2, mesh.rank) for x in (full.q, full.k, full.v))
        args = replace(full, q=q, k=k, v=v, mesh=mesh)
        seen: list[torch.Tensor] = []

        def stock(args: Any) -> torch.Tensor:
            assert args.scale == 0.6
            return sharded(stock_attention(replace(full, scale=args.scale)), parts, 2, mesh.rank)

        run, layer = host_run([PerHead(2.0, bias, record=seen.append)])
        out = dispatch_attention(run, layer, args, stock)
        run, layer = host_run([Asks(output=seen[0])])
        again = dispatch_attention(run, layer, args, stock)
        return out, again, seen[0]

    for rank, (out, again, seen) in enumerate(Ranks(2).run(work)):
        torch.testing.assert_close(out, sharded(alone.out, parts, 2, rank), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen, alone.out[:, :, 2 * rank : 2 * rank + 2], atol=1e-5, rtol=1e-4)
        assert torch.equal(again, out)
    assert sorted((part.start, part.stop) for part in heads) == [(0, 2), (0, 4), (2, 4)]


def test_a_bias_of_another_number_of_heads_is_an_error_on_one_device_and_on_many() -> None:
    layout = TokenLayout((visual_span("image", (1, 4, 6)),))
    args = random_args(24)
    for shard in ((0, 1), (1, 2)):
        run, layer = host_run([], layout)
        call = AttentionCall(args.q, args.k, args.v, None, None, False, layer, run.tokens(24), run.clock, shard=shard)
        with pytest.raises(DitAttnError, match="H=4"):
            Request().add_span_bias(call, slice(0, 3), slice(0, 3), torch.ones(1, 3))
