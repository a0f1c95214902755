"""Maps of a run agree with its summary, and their error with the dense attention of the same inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dit_attn
from dit_attn import models
from dit_attn.pipelines.compare import attention_map
from dit_attn.pipelines.compare.attention_map import AttentionRecorder
from dit_attn.processors.core.call import AttentionCall
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.tokens import Span, Tokens

HALF = dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=1)


def call(mask: torch.Tensor | None = None, kv_heads: int = 4, **changes: Any) -> AttentionCall:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, heads, 8) for heads in (4, kv_heads, kv_heads))
    tokens = Tokens((Span("text", 8, None, 0), Span("video", 32, (2, 4, 4), 8)), 40)
    facts: Any = {"scale": None, "causal": False, "layer": None, "tokens": tokens, "clock": Clock(), **changes}
    return AttentionCall(q, k, v, mask, **facts)


def dense(one: AttentionCall) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (one.q, one.k, one.v))
    mask = one.mask[:, None, None] if one.mask is not None and one.mask.ndim == 2 else one.mask
    return F.scaled_dot_product_attention(q, k, v, mask, scale=one.scale, enable_gqa=True).transpose(1, 2)


def square() -> torch.Tensor:
    mask = torch.rand(2, 4, 40, 40, generator=torch.Generator().manual_seed(3)) > 0.3
    return mask | torch.eye(40, dtype=torch.bool)


@pytest.mark.parametrize(
    "one",
    [
        call(),
        call(kv_heads=2, scale=0.5),
        call(torch.arange(40).expand(2, -1) < torch.tensor([[40], [25]])),
        call(square()),
        call(square()[:, :1]),
        call(torch.randn(2, 4, 40, 40, generator=torch.Generator().manual_seed(4))),
        call(torch.randn(1, 1, 1, 40, generator=torch.Generator().manual_seed(5))),
    ],
    ids=["plain", "grouped heads", "keys", "square by head", "square", "bias by head", "bias by key"],
)
@pytest.mark.parametrize("at_once", [1, 1 << 26])
def test_exact_rows_are_those_of_dense_attention(
    one: AttentionCall, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_map, "_MAX_ELEMENTS", at_once)  # one head at a time, and all at once
    picks = attention_map.sample_visual_rows(one, 12)
    assert len(picks) == 12 and int(picks.min()) >= 8 and len(set(picks.tolist())) == 12
    torch.testing.assert_close(attention_map.exact_rows(one, picks), dense(one)[:, picks])
    assert attention_map.attention_error(one, dense(one)) == pytest.approx(0.0, abs=1e-5)
    assert attention_map.attention_error(one, 1.25 * dense(one)) == pytest.approx(0.25, rel=1e-4)


def test_text_rows_do_not_count_and_what_has_no_exact_counterpart_is_none() -> None:
    out = dense(call())
    out[:, :8] = 99.0
    assert attention_map.attention_error(call(), out) == pytest.approx(0.0, abs=1e-5)
    assert attention_map.attention_error(call(causal=True), out) is None
    assert attention_map.attention_error(call(), out * float("nan")) is None
    assert attention_map.attention_error(call(tokens=None), dense(call())) == pytest.approx(0.0, abs=1e-5)


def test_sampling_leaves_the_noise_of_the_run_alone() -> None:
    one = call()
    before = torch.get_rng_state()
    attention_map.attention_error(one, torch.zeros(2, 40, 4, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, Any], Any]:
    """Maps and summary of three steps of the embedded image model with guidance."""
    pipe: Any = models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    arguments = {**models.call_defaults("tiny-image"), "num_inference_steps": 3, "height": 64, "width": 64}
    recorder = AttentionRecorder()
    with dit_attn.enabled(pipe, HALF):
        with dit_attn.observing(pipe, recorder):
            pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="latent", **arguments)
        return recorder.maps(), dit_attn.summary(pipe)


def test_the_density_is_what_the_summary_counts(recorded: tuple[dict[str, Any], Any]) -> None:
    maps, summary = recorded
    assert maps["steps"] == 3 and maps["layers"] == [layer.name for layer in summary.layers]
    cells = [value for row in maps["density"] for value in row]
    assert sum(cells) / len(cells) == pytest.approx(summary.run_density, rel=1e-4)
    assert all(row[0] == 1.0 and row[1] == pytest.approx(0.5, abs=0.1) for row in maps["density"])


def test_dense_steps_are_exact_and_sparse_ones_are_not(recorded: tuple[dict[str, Any], Any]) -> None:
    maps, _ = recorded
    assert all(row[0] < 1e-5 and row[1] > 1e-3 and row[2] > 1e-3 for row in maps["error"])


def test_branches_of_a_step_are_averaged_and_a_step_without_calls_is_a_hole() -> None:
    class Stats:
        sparse_calls, computed = 0, 0.0

    class Layer:
        name, stats = "a", Stats()

    recorder, layer = AttentionRecorder(), Layer()
    one = call(layer=layer)
    for step, computed in ((0, None), (0, 0.25), (2, 0.5)):  # the first stays dense
        if computed is not None:
            layer.stats.sparse_calls, layer.stats.computed = (
                layer.stats.sparse_calls + 1,
                layer.stats.computed + computed,
            )
        one.clock.step = step
        recorder(one, None, (1.1 if computed else 1.0) * dense(one))  # type: ignore[arg-type]
    maps = recorder.maps()
    assert maps["density"] == [[0.625, None, 0.5]]
    assert maps["error"][0] == [pytest.approx(0.05, rel=1e-3), None, pytest.approx(0.1, rel=1e-3)]
