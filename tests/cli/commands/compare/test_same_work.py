"""Settings that come to the same blocks are named."""

from __future__ import annotations

from dit_attn.cli.commands.compare.same_work import same_work


def row(label, flops, psnr):
    return {"label": label, "attention_flops": flops and {"value": flops}, "psnr": psnr and {"value": psnr}}


def test_variants_with_the_same_attention_and_the_same_pixels_are_named_together():
    rows = [row("dense", 1.0, None), row("a", 0.125, 27.5), row("b", 0.25, 30.0), row("c", 0.125, 27.5)]
    (line,) = same_work({"headline": rows})
    assert line.startswith("a and c computed the same attention and made the same pixels")


def test_as_much_attention_with_other_pixels_is_other_work():
    assert same_work({"headline": [row("a", 0.125, 27.5), row("b", 0.125, 27.6), row("c", None, None)]}) == []
