"""Statistics of sampled rows equal those of the full softmax with its mask and scale, without an S x S tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval import attention_stats as stats
from dit_attn.pipelines.inspect import collector as collector_module
from dit_attn.pipelines.inspect.collector import Collector, measure_rows, named_spans
from dit_attn.processors.core.call import AttentionCall
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.tokens import Span, Tokens

GRID, TEXT = (2, 4, 4), 8
S = TEXT + 32


class Layer:
    """Stands for a layer."""

    name, session = "layer", None


def call(mask: torch.Tensor | None = None, kv_heads: int = 4, **changes: Any) -> AttentionCall:
    torch.manual_seed(0)
    q, k, v = (2 * torch.randn(2, S, heads, 8) for heads in (4, kv_heads, kv_heads))
    tokens = Tokens((Span("text", TEXT, None, 0), Span("video", S - TEXT, GRID, TEXT)), S)
    facts: Any = {"scale": None, "causal": False, "layer": Layer(), "tokens": tokens, "clock": Clock()}
    return AttentionCall(q, k, v, mask, **{**facts, "branches": ("cond", "uncond"), **changes})


def square() -> torch.Tensor:
    mask = torch.rand(2, 4, S, S, generator=torch.Generator().manual_seed(3)) > 0.3
    return mask | torch.eye(S, dtype=torch.bool)


@pytest.mark.parametrize(
    "one",
    [
        call(),
        call(kv_heads=2, scale=0.5),
        call(torch.arange(S).expand(2, -1) < torch.tensor([[S], [25]])),
        call(square()),
        call(torch.randn(2, 1, S, S, generator=torch.Generator().manual_seed(4))),
    ],
    ids=["plain", "grouped heads", "keys", "square by head", "bias"],
)
@pytest.mark.parametrize("at_once", [1, 1 << 25])
def test_a_call_is_measured_with_its_mask_scale_and_heads(
    one: AttentionCall, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector_module, "_MAX_ELEMENTS", at_once)  # one head at a time, and all at once
    picks, block = torch.arange(TEXT, S, 3), 8
    found = measure_rows(one, picks, block)
    k = one.k.repeat_interleave(4 // one.k.shape[2], 2).double()
    logits = torch.einsum("brhd,bshd->bhrs", one.q[:, picks].double(), k) * (one.scale or 8**-0.5)
    if one.mask is not None:
        mask = one.mask[:, None, None] if one.mask.ndim == 2 else one.mask[:, :, picks]
        logits = logits + mask if mask.is_floating_point() else logits.masked_fill(~mask, -torch.inf)
    spans = (("text", 0, TEXT), ("video", TEXT, S))
    for name, value in stats.row_statistics(logits, spans, (TEXT, GRID, picks - TEXT), block).items():
        torch.testing.assert_close(found[name].double(), value, atol=2e-5, rtol=2e-5, msg=name)
    attended = (logits.softmax(-1) * recalled(one, k, picks, block, 0.5)).sum(-1).mean(-1)
    if one.mask is None:
        torch.testing.assert_close(found["recall_50"].double(), attended, atol=2e-5, rtol=2e-5)


def recalled(one: AttentionCall, k: torch.Tensor, picks: torch.Tensor, block: int, share: float) -> torch.Tensor:
    """(B, H, R, S) keys in the best ``share`` of the blocks by means, row by row."""
    attended = torch.zeros(2, 4, len(picks), S)
    for b in range(2):
        for h in range(4):
            for i, row in enumerate(picks.tolist()):
                first = TEXT + (row - TEXT) // block * block
                query = one.q[b, first : first + block, h].double().mean(0)
                score = torch.stack([query @ k[b, j : j + block, h].mean(0) for j in range(0, S, block)])
                best = score.topk(-(-len(score) * int(10 * share) // 10)).indices
                for j in best.tolist():
                    attended[b, h, i, j * block : (j + 1) * block] = 1.0
    return attended


def test_no_tensor_of_queries_by_keys_is_made() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.numel())
            return out

    length, heads, rows = 4096, 2, 16
    q, k = torch.randn(1, length, heads, 8), torch.randn(1, length, heads, 8)
    tokens = Tokens((Span("video", length, (4, 32, 32), 0),), length)
    one = AttentionCall(q, k, k, None, None, False, Layer(), tokens, Clock())  # type: ignore[arg-type]
    with Largest() as largest:
        measure_rows(one, torch.arange(rows), 64)
    assert 0 < largest.size <= heads * length * max(rows, 2 * 8 * 4) < length * length // 8


def test_rows_of_one_branch_and_calls_of_one_step_are_averaged_and_missing_steps_are_holes() -> None:
    one = call(branches=("cond", "cond"))
    collector = Collector(rows=8, block=8)
    collector(one, None, one.v)  # type: ignore[arg-type]
    alone = collector.tensors()["lse"]
    both = measure_rows(one, stats.sample_rows(TEXT, S, 8, 0), 8)["lse"]
    torch.testing.assert_close(alone[0, 0, 0], both.mean(0))
    one.clock.step = 2
    collector(one, None, one.v)  # type: ignore[arg-type]
    collector(one, None, one.v)  # type: ignore[arg-type]
    again = collector.tensors()["lse"]
    assert again.shape == (1, 1, 3, 4) and bool(again[:, :, 1].isnan().all()) and torch.equal(again[:, :, :1], alone)
    torch.testing.assert_close(again[0, 0, 2], measure_rows(one, stats.sample_rows(TEXT, S, 8, 2), 8)["lse"].mean(0))


def test_calls_that_cannot_be_measured_are_counted() -> None:
    collector = Collector()
    cross = call()
    cross.q = cross.q[:, :5]
    collector(cross, None, cross.v)  # type: ignore[arg-type]
    collector(call(causal=True), None, cross.v)  # type: ignore[arg-type]
    assert collector.calls == 2 and collector.skipped == {"cross attention": 1, "causal attention": 1}
    assert collector.tensors() == {}


def test_unknown_parts_leave_out_what_needs_them() -> None:
    one = call(tokens=None)
    found = measure_rows(one, torch.arange(0, S, 4), 8)
    assert "lse" in found and not {"dt", "dh", "same_frame", "mass.text"} & set(found)


def test_not_a_number_in_a_call_is_a_hole() -> None:
    one = call(branches=("cond", "uncond"))
    one.q[1] = torch.nan
    collector = Collector(rows=8, block=8)
    collector(one, None, one.v)  # type: ignore[arg-type]
    for name, tensor in collector.tensors().items():
        assert bool(tensor[0].isfinite().all()) and bool(tensor[1].isnan().all()), name


def test_rows_and_blocks_must_be_positive() -> None:
    with pytest.raises(DitAttnError, match="at least 1, got 0 and 64"):
        Collector(rows=0)


def test_parts_of_one_kind_are_numbered() -> None:
    tokens = Tokens((Span("image", 10, None, 0), Span("text", 5, None, 10), Span("text", 25, None, 15)), S)
    assert [name for name, *_ in named_spans(call(tokens=tokens))] == ["image", "text", "text.2"]
