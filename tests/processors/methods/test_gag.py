"""GAG against its definition in cross and joint attention, what it leaves alone, and a full run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import GAG, BlockSparse, DitAttnError, models
from dit_attn.processors.core.call import AttentionCall, Request, SDPAArgs
from dit_attn.processors.core.tokens import TokenLayout, visual_span
from dit_attn.processors.methods.base import Method
from tests._support.core_calls import GRID, JOINT, TEXT, VISUAL, Dispatched, host_run, stock_attention
from tests._support.gag_reference import guided


def arguments(keys: int = TEXT + VISUAL, rows: int = TEXT + VISUAL, mask: bool = False) -> SDPAArgs:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, rows, 4, 16, generator=draw, dtype=torch.float64)
    k, v = (torch.randn(2, keys, 2, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    there = torch.ones(2, keys, dtype=torch.bool)
    there[1, TEXT - 5 : TEXT] = False
    return SDPAArgs(q, k, v, mask=there if mask else None)


def dispatched(method: GAG, args: SDPAArgs, *others: Method) -> Dispatched:
    """A call of the second of four steps, whose first batch row is unconditional."""
    joint = args.q.shape[1] == args.k.shape[1]
    layout = JOINT if joint else TokenLayout((visual_span("video", GRID),))
    run, layer = host_run([method, *others], layout, text_kind="self" if joint else "cross")
    if not joint:
        run.remove_layers([layer])
        layer = run.add_layer("blocks.0.cross", ("cross",))
        run.begin_call(2)
    run.branches = lambda batch, first=0: ("uncond", "cond")  # type: ignore[method-assign]
    run.clock.total, run.clock.step = 4, 1
    return Dispatched(run, layer, args)


@pytest.mark.parametrize(
    "method", [GAG(), GAG(strength=0.3, orthogonal=0.5), GAG(alpha=2.0, scale=1.0), GAG(limit=0.05)], ids=str
)
@pytest.mark.parametrize("mask", [False, True])
def test_joint_attention_is_the_definition_in_image_rows_of_the_conditional_branch_alone(
    method: GAG, mask: bool
) -> None:
    args = arguments(mask=mask)
    done, stock = dispatched(method, args), stock_attention(args)
    found, expected = done.out, guided(done.call, slice(0, TEXT), method)
    torch.testing.assert_close(found[1, TEXT:], expected[1, TEXT:], atol=1e-9, rtol=1e-7)
    assert torch.equal(found[0], stock[0]) and torch.equal(found[:, :TEXT], stock[:, :TEXT])
    assert not torch.equal(found[1], stock[1])


def test_cross_attention_is_the_definition() -> None:
    args, method = arguments(keys=TEXT, rows=VISUAL, mask=True), GAG()
    done = dispatched(method, args)
    expected = guided(done.call, slice(0, TEXT), method)
    torch.testing.assert_close(done.out[1], expected[1], atol=1e-9, rtol=1e-7)
    assert torch.equal(done.out[0], stock_attention(args)[0])


def test_it_goes_on_from_whatever_computed_the_call() -> None:
    args, sparse = arguments(), BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0)
    alone = dispatched(GAG(strength=0.0), args, sparse).out
    both = dispatched(GAG(), args, sparse).out
    step = dispatched(GAG(), args).out - stock_attention(args)
    assert not torch.equal(alone, stock_attention(args))
    torch.testing.assert_close(both, alone + step)


def test_the_logit_bias_of_another_method_counts() -> None:
    class Lift(Method):
        slug = ""

        def request(self, call: AttentionCall, request: Request) -> None:
            request.add_span_bias(call, slice(0, call.q.shape[1]), slice(3, 5), math.log(4.0))

    args, method = arguments(), GAG()
    done = dispatched(method, args, Lift())
    bias = torch.zeros(1, 1, 1, TEXT + VISUAL, dtype=torch.float64)
    bias[..., 3:5] = math.log(4.0)
    expected = guided(done.call, slice(0, TEXT), method, bias)
    torch.testing.assert_close(done.out[1, TEXT:], expected[1, TEXT:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "method", [GAG(strength=0.0), GAG(start=0.5), GAG(stop=1), GAG(first_layer=1), GAG(last_layer=0)], ids=str
)
def test_strength_0_and_steps_and_layers_that_are_not_guided_are_stock(method: GAG) -> None:
    args = arguments()
    assert torch.equal(dispatched(method, args).out, stock_attention(args))


def test_a_differentiated_joint_call_stays_stock_and_says_so() -> None:
    args = arguments()
    args.q.requires_grad_(True)
    found = dispatched(GAG(), args)
    assert found.request.declined == ["guidance of a joint attention that is differentiated"]
    assert torch.equal(found.out, stock_attention(args))


@pytest.mark.parametrize("name", ["tiny-image", "tiny-joint"])
def test_a_full_run_changes_and_strength_0_is_bit_equal(name: str) -> None:
    pipe = models.load(name)
    call: dict[str, Any] = {**models.call_defaults(name), "num_inference_steps": 2, "output_type": "latent"}
    call |= {"height": 64, "width": 64}

    def run() -> torch.Tensor:
        return pipe("a large red circle at the left on white", generator=torch.manual_seed(0), **call).images

    stock = run()
    dit_attn.enable(pipe, "gag", strength=0.0)
    assert torch.equal(run(), stock)
    dit_attn.enable(pipe, "gag")
    assert not torch.equal(run(), stock)
    dit_attn.disable(pipe)
    assert torch.equal(run(), stock)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"strength": 1.5}, "strength"), ({"scale": -1.0}, "scale"), ({"alpha": 1.2}, "alpha"), ({"limit": 0.0}, "limit")],
)
def test_values_out_of_range_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(DitAttnError, match=f"gag.{said}"):
        GAG(**settings)
