"""Attention modules with some of their heads: smaller products, weights that change, adapters, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dit_attn
from dit_attn import HeadDrop
from tests._support.compose import forward, tiny
from tests._support.gated_heads import gated, saved_drop


def test_products_are_smaller_where_weights_can_be_sliced() -> None:
    model, args = tiny("pixart")
    session = dit_attn.enable(model, HeadDrop(heads="*:0"))
    forward(model, args)
    attention, layer = session.module(session.layers[0]), session.layers[0]
    assert layer.kept_heads is None and layer.reduced.heads == attention.heads - 1
    for name in ("to_q", "to_k", "to_v"):
        stock, found = getattr(attention, name), getattr(layer.reduced, name)
        assert found.cached[0].shape[0] == stock.out_features * (attention.heads - 1) // attention.heads


def test_weights_that_are_loaded_moved_or_adapted_afterwards_are_the_ones_that_run() -> None:
    model, args = tiny("pixart")
    dit_attn.enable(model, HeadDrop(heads="*:0"))
    forward(model, args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    torch.testing.assert_close(forward(model, args), gated(model, args), atol=2e-6, rtol=1e-5)
    session = dit_attn.enable(model, HeadDrop(heads="*:0"))
    model.double()
    session.reduce_heads()
    assert session.layers[0].reduced.to_q.cached[0].dtype == torch.float64


def test_adapters_and_fused_projections_are_respected() -> None:
    peft = pytest.importorskip("peft")
    model, args = tiny("sd3")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    dit_attn.enable(model, HeadDrop(heads="*:0"))
    torch.testing.assert_close(forward(model, args), gated(model, args), atol=2e-6, rtol=1e-5)
    wan, args = tiny("wan")
    expected = gated(wan, args)
    wan.fuse_qkv_projections()
    dit_attn.enable(wan, HeadDrop(heads="*:0"))
    torch.testing.assert_close(forward(wan, args), expected, atol=2e-6, rtol=1e-5)


def test_gradients_reach_the_stock_weights_and_the_refit(tmp_path: Path) -> None:
    model, args = tiny("pixart")
    name = saved_drop(model, args, tmp_path)
    session = dit_attn.enable(model, str(name))
    model.train()
    model(**args, return_dict=False)[0].square().mean().backward()
    attention = session.module(session.layers[0])
    assert all(x.grad is not None and bool(x.grad.any()) for x in session.learned.parameters())
    kept = attention.to_v.weight.grad.unflatten(0, (attention.heads, -1))
    assert not kept[0].any() and bool(kept[1].any())
