"""Fused projections: new-style modules keep their processor, legacy ones swap it; both orders work and undo exactly."""

from __future__ import annotations

from typing import Any

import pytest

import dit_attn
from dit_attn.processors.attach import attention_processor
from tests._support.compose import SPARSE, forward, same, tiny

NEW, LEGACY = ("wan", "flux"), ("cogvideox", "sd3", "pixart")


def kinds(model: Any) -> dict[str, type]:
    """Stock class of every processor."""
    processors = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
    wrapped = attention_processor.is_wrapped
    return {n: type(p.__dict__["_dit_stock"]) if wrapped(p) else type(p) for n, p in processors.items()}


@pytest.mark.parametrize("name", NEW + LEGACY)
@pytest.mark.parametrize("fused_first", [True, False])
def test_fusing_before_or_after_equals_stock_fused(name: str, fused_first: bool) -> None:
    stock, args = tiny(name)
    plain = forward(stock, args)
    plain_kinds = kinds(stock)
    stock.fuse_qkv_projections()  # type: ignore[operator]
    expected, fused_kinds = forward(stock, args), kinds(stock)
    stock.unfuse_qkv_projections()  # type: ignore[operator]
    unfused, unfused_kinds = forward(stock, args), kinds(stock)
    model, _ = tiny(name)
    assert kinds(model) == plain_kinds and same(plain, forward(model, args))
    if fused_first:
        model.fuse_qkv_projections()  # type: ignore[operator]
    session = dit_attn.enable(model)
    if not fused_first:
        model.fuse_qkv_projections()  # type: ignore[operator]
    assert same(expected, forward(model, args))
    assert kinds(model) == fused_kinds
    assert dit_attn.summary(model).calls >= len(session.layers)
    assert all(attention_processor.is_wrapped(model.get_submodule(layer.name).processor) for layer in session.layers)
    model.unfuse_qkv_projections()  # type: ignore[operator]
    assert same(unfused, forward(model, args))
    dit_attn.disable(model)
    assert kinds(model) == unfused_kinds
    assert same(unfused, forward(model, args))


@pytest.mark.parametrize("name", NEW + LEGACY)
def test_disable_while_fused_leaves_the_stock_fused_model(name: str) -> None:
    model, args = tiny(name)
    dit_attn.enable(model, SPARSE)
    sparse = forward(model, args)
    model.fuse_qkv_projections()  # type: ignore[operator]
    fused = forward(model, args)
    assert (fused - sparse).abs().max() < 1e-4
    assert dit_attn.summary(model).sparse_calls > 0
    dit_attn.disable(model)
    stock, _ = tiny(name)
    stock.fuse_qkv_projections()  # type: ignore[operator]
    assert kinds(model) == kinds(stock)
    assert same(forward(stock, args), forward(model, args))
