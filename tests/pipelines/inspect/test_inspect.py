"""An inspection changes nothing about a run, measures every layer, head, step and branch, and survives the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.eval import attention_stats as stats
from dit_attn.pipelines.inspect import inspect as inspection
from dit_attn.pipelines.inspect.inspect import Collector, Inspection, inspect
from dit_attn.processors.attach.attach import session_of
from dit_attn.processors.core.call import AttentionCall
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.tokens import Span, Tokens
from tests._support.compose import pipeline_run, tiny_pipeline

STEPS, GRID, TEXT = 2, (2, 4, 4), 8
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


def arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, "seed": 5}


@pytest.fixture(scope="module", params=("wan", "flux", "pixart", "cogvideox", "sd3"))
def watched(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], Inspection]:
    """A tiny random pipeline, its arguments and an inspection of a run."""
    pipe, kwargs = tiny_pipeline(request.param)
    return pipe, kwargs, inspect(pipe, arguments(kwargs), rows=16, block=16)


def test_the_result_is_that_of_a_run_without_watching(watched: tuple[Any, dict[str, Any], Inspection]) -> None:
    pipe, kwargs, found = watched
    assert torch.equal(found.output[0], pipeline_run(pipe, kwargs, STEPS, seed=5))
    timing = found.meta["timing"]
    assert timing["unchanged"] is True
    assert timing["overhead"] == pytest.approx(timing["observed_seconds"] / timing["plain_seconds"] - 1)
    assert 0 < timing["watching_seconds"] < timing["observed_seconds"]
    assert session_of(pipe.transformer) is None


def test_every_layer_head_and_step_has_every_statistic(watched: tuple[Any, dict[str, Any], Inspection]) -> None:
    _, _, found = watched
    axes = found.meta["axes"]
    shape = [len(axes[axis]) for axis in inspection.AXES]
    assert shape[2] == STEPS and axes["step"] == ["step 1", "step 2"] and len(set(axes["layer"])) == shape[1]
    assert {"keys_90", "blocks_90", "best_25", "recall_25", "entropy", "lse", "dh", "dw"} <= set(found.tensors)
    for name, tensor in found.tensors.items():
        assert list(tensor.shape) == shape == found.meta["statistics"][name]["shape"], name
        assert bool(tensor.isfinite().all()), name
        low, high = stats.describe(name).scale or (-torch.inf, torch.inf)
        assert low - 1e-5 <= float(tensor.min()) and float(tensor.max()) <= high + 1e-5, name


def test_masses_of_the_spans_sum_to_one_and_text_is_named(watched: tuple[Any, dict[str, Any], Inspection]) -> None:
    pipe, _, found = watched
    masses = [tensor for name, tensor in found.tensors.items() if name.startswith("mass.")]
    torch.testing.assert_close(sum(masses), torch.ones_like(masses[0]), atol=1e-4, rtol=0)
    joint = type(pipe.transformer).__name__ in ("FluxTransformer2DModel", "SD3Transformer2DModel")
    assert "mass.text" in found.tensors or not joint


def test_recall_lies_between_uniform_and_the_best_blocks(watched: tuple[Any, dict[str, Any], Inspection]) -> None:
    _, _, found = watched
    for share in ("10", "25"):
        assert bool((found.tensors[f"recall_{share}"] <= found.tensors[f"best_{share}"] + 1e-5).all())


def test_branches_of_guidance_are_kept_apart() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    found = inspect(pipe, {**arguments(kwargs), "guidance_scale": 4.0}, overhead=False)
    assert found.meta["axes"]["branch"] == ["cond", "uncond"]
    assert not torch.equal(found.tensors["lse"][0], found.tensors["lse"][1])
    alone = inspect(pipe, {**arguments(kwargs), "guidance_scale": 1.0}, overhead=False)
    assert alone.meta["axes"]["branch"] == ["cond"]
    torch.testing.assert_close(alone.tensors["lse"][0, :, 0], found.tensors["lse"][0, :, 0])
    assert found.meta["timing"]["overhead"] is None and found.meta["timing"]["unchanged"] is None


def test_the_same_seed_looks_at_the_same_rows_and_a_run_under_a_method_is_the_methods() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    first, again = (inspect(pipe, arguments(kwargs), rows=8, overhead=False) for _ in range(2))
    other = inspect(pipe, arguments(kwargs), rows=8, seed=9, overhead=False)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())
    assert not torch.equal(first.tensors["lse"], other.tensors["lse"])
    method = dit_attn.BlockSparse(density=0.2, q_block=32, kv_block=32, dense_steps=0)
    with dit_attn.enabled(pipe, method):
        sparse = inspect(pipe, arguments(kwargs), rows=8, overhead=False)
        assert dit_attn.summary(pipe).density < 0.9
    assert not torch.equal(first.tensors["lse"][:, -1], sparse.tensors["lse"][:, -1])


def test_saved_and_loaded_it_is_the_same(watched: tuple[Any, dict[str, Any], Inspection], tmp_path: Path) -> None:
    _, _, found = watched
    tensors, meta = found.save(tmp_path / "a" / "b")
    assert sorted(path.name for path in meta.parent.iterdir()) == [meta.name, tensors.name]
    back = Inspection.load(tmp_path / "a" / "b")
    assert back.meta == json.loads(json.dumps(found.meta))
    assert set(back.tensors) == set(found.tensors)
    assert all(torch.equal(tensor, back.tensors[name]) for name, tensor in found.tensors.items())


def test_damaged_files_are_refused_in_one_line(
    watched: tuple[Any, dict[str, Any], Inspection], tmp_path: Path
) -> None:
    _, _, found = watched
    with pytest.raises(DitAttnError, match=r"holds no inspection.*inspect\.json"):
        Inspection.load(tmp_path)
    tensors, meta = found.save(tmp_path)
    tensors.write_bytes(tensors.read_bytes()[:40])
    with pytest.raises(DitAttnError, match="holds no inspection"):
        Inspection.load(tmp_path)
    found.save(tmp_path)
    meta.write_text(json.dumps({**found.meta, "statistics": {"lse": {}}}))
    with pytest.raises(DitAttnError, match="not of one run"):
        Inspection.load(tmp_path)


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
    monkeypatch.setattr(inspection, "_AT_ONCE", at_once)  # one head at a time, and all at once
    picks, block = torch.arange(TEXT, S, 3), 8
    found = inspection.measure(one, picks, block)
    k = one.k.repeat_interleave(4 // one.k.shape[2], 2).double()
    logits = torch.einsum("brhd,bshd->bhrs", one.q[:, picks].double(), k) * (one.scale or 8**-0.5)
    if one.mask is not None:
        mask = one.mask[:, None, None] if one.mask.ndim == 2 else one.mask[:, :, picks]
        logits = logits + mask if mask.is_floating_point() else logits.masked_fill(~mask, -torch.inf)
    spans = (("text", 0, TEXT), ("video", TEXT, S))
    for name, value in stats.row_statistics(logits, spans, (TEXT, GRID, picks - TEXT), block).items():
        torch.testing.assert_close(found[name].double(), value, atol=2e-5, rtol=2e-5, msg=name)
    kept = (logits.softmax(-1) * recalled(one, k, picks, block, 0.5)).sum(-1).mean(-1)
    if one.mask is None:
        torch.testing.assert_close(found["recall_50"].double(), kept, atol=2e-5, rtol=2e-5)


def recalled(one: AttentionCall, k: torch.Tensor, picks: torch.Tensor, block: int, share: float) -> torch.Tensor:
    """(B, H, R, S) keys in the best ``share`` of the blocks by means, row by row."""
    kept = torch.zeros(2, 4, len(picks), S)
    for b in range(2):
        for h in range(4):
            for i, row in enumerate(picks.tolist()):
                first = TEXT + (row - TEXT) // block * block
                query = one.q[b, first : first + block, h].double().mean(0)
                score = torch.stack([query @ k[b, j : j + block, h].mean(0) for j in range(0, S, block)])
                best = score.topk(-(-len(score) * int(10 * share) // 10)).indices
                for j in best.tolist():
                    kept[b, h, i, j * block : (j + 1) * block] = 1.0
    return kept


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
        inspection.measure(one, torch.arange(rows), 64)
    assert 0 < largest.size <= heads * length * max(rows, 2 * 8 * 4) < length * length // 8


def test_rows_of_one_branch_and_calls_of_one_step_are_averaged_and_missing_steps_are_holes() -> None:
    one = call(branches=("cond", "cond"))
    collector = Collector(rows=8, block=8)
    collector(one, None, one.v)  # type: ignore[arg-type]
    alone = collector.tensors()["lse"]
    both = inspection.measure(one, stats.sample_rows(TEXT, S, 8, 0), 8)["lse"]
    torch.testing.assert_close(alone[0, 0, 0], both.mean(0))
    one.clock.step = 2
    collector(one, None, one.v)  # type: ignore[arg-type]
    collector(one, None, one.v)  # type: ignore[arg-type]
    again = collector.tensors()["lse"]
    assert again.shape == (1, 1, 3, 4) and bool(again[:, :, 1].isnan().all()) and torch.equal(again[:, :, :1], alone)
    torch.testing.assert_close(
        again[0, 0, 2], inspection.measure(one, stats.sample_rows(TEXT, S, 8, 2), 8)["lse"].mean(0)
    )


def test_calls_that_cannot_be_measured_are_counted_and_a_run_without_others_is_refused() -> None:
    collector = Collector()
    cross = call()
    cross.q = cross.q[:, :5]
    collector(cross, None, cross.v)  # type: ignore[arg-type]
    collector(call(causal=True), None, cross.v)  # type: ignore[arg-type]
    assert collector.seen == 2 and collector.skipped == {"cross attention": 1, "causal attention": 1}
    assert collector.tensors() == {}
    pipe, _ = tiny_pipeline("wan")
    with pytest.raises(DitAttnError, match=r"no self-attention call of .*no call at all"):
        inspection.watch(pipe, lambda: None, Collector(), overhead=False)
    assert session_of(pipe.transformer) is None


def test_unknown_parts_leave_out_what_needs_them() -> None:
    one = call(tokens=None)
    found = inspection.measure(one, torch.arange(0, S, 4), 8)
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
    assert [name for name, *_ in inspection.spans_of(call(tokens=tokens))] == ["image", "text", "text.2"]
