"""Routing without training: the regression, gates of 0 and 1, means of heads left out, norms before QK-norm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import DitAttnError, MoH
from dit_attn.pipelines.head_drop import calibrate_routing
from dit_attn.pipelines.head_drop.route import RidgeMoments, log_energy
from dit_attn.processors.attach import attention_processor
from dit_attn.processors.methods.head_choice import HeadChoice, best_heads
from tests._support.compose import SPARSE, forward, same, tiny
from tests._support.gated_heads import Pipe
from tests._support.recorded_calls import watching

CALIBRATED = MoH(route="calibrated", top_k=1)
FILLED = MoH(route="calibrated", top_k=1, fill="mean")
QUERY = MoH(route="query", top_k=1)


def made(name: str) -> Pipe:
    model, args = tiny(name)
    return Pipe(transformer=model, args=args)


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_the_regression_recovers_a_planted_linear_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    rule, offset = torch.randn(3, 8, generator=generator), torch.tensor([5.0, -2.0, 0.5])
    moments = RidgeMoments(8, 3)
    for _ in range(4):
        x = torch.randn(50, 8, generator=generator) + 3.0
        moments.add(x, x @ rule.T + offset)
    found, shift, explained = moments.solve(ridge=1e-9)
    torch.testing.assert_close(found.float(), rule, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shift.float(), offset, atol=1e-3, rtol=1e-3)
    assert (explained > 0.999).all()


def test_energies_are_those_of_the_contributions_to_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    z, weight = torch.randn(2, 5, 3, 4, generator=generator), torch.randn(6, 12, generator=generator)
    parts = torch.stack([z[:, :, h] @ weight[:, 4 * h : 4 * h + 4].T for h in range(3)], 2)
    torch.testing.assert_close(log_energy(z, weight), parts.square().sum(-1).log())


def test_heads_are_the_best_by_prediction_shared_ones_stay_and_the_rule_is_that_of_the_runs(tmp_path: Path) -> None:
    choice = HeadChoice(2, 3, None)
    with torch.no_grad():
        choice.rule.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))  # type: ignore[union-attr]
        choice.offset.copy_(torch.tensor([0.0, 0.0, 2.0]))  # type: ignore[union-attr]
    gates, mean = choice(torch.tensor([[[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]]), 1, 1)
    assert gates.tolist() == [[[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]] and mean is None
    assert best_heads(torch.ones(4), 2).tolist() == [True, True, False, False]

    pipe = made("pixart")
    found = calibrate_routing(pipe, ["a", "b"], CALIBRATED, every=1)
    again = calibrate_routing(pipe, ["a", "b"], CALIBRATED, every=1)
    assert all(same(x, again.tensors[key]) for key, x in found.tensors.items())
    assert found.explained and all(0.0 < share <= 1.0 for share in found.explained.values())


# -- on models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixart", "wan", "sd3"])
def test_all_heads_active_is_bit_equal_to_stock(name: str, tmp_path: Path) -> None:
    pipe = made(name)
    stock = forward(pipe.transformer, pipe.args)
    whole = calibrate_routing(pipe, ["a"], MoH(route="calibrated", fill="mean"), every=1)
    for method in (MoH(route="query"), str(whole.save(tmp_path))):
        dit_attn.enable(pipe.transformer, method)
        assert same(stock, forward(pipe.transformer, pipe.args))
    dit_attn.disable(pipe.transformer)
    assert same(stock, forward(pipe.transformer, pipe.args))


def first_call(model: Any, args: dict[str, Any], layer: str) -> tuple[Any, torch.Tensor]:
    """The first call of a layer, and the input of its module."""
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda module, given, kwargs: inputs.append(given[0] if given else kwargs["hidden_states"]), with_kwargs=True
    )
    with watching() as seen:
        forward(model, args)
    handle.remove()
    return next(call for call in seen if call.layer == layer), inputs[0]


def dense_output(call: Any) -> torch.Tensor:
    scores = call.q.transpose(1, 2) @ call.k.transpose(1, 2).mT * (call.scale or call.q.shape[-1] ** -0.5)
    scores = scores if call.mask is None else scores + call.mask
    return (torch.softmax(scores, -1) @ call.v.transpose(1, 2)).transpose(1, 2)


def gated(call: Any, gates: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    """Dense attention with gates (B, rows, H) of its visual rows."""
    out = dense_output(call).clone()
    rows = slice(*call.tokens.visual_range)
    left = 0.0 if mean is None else (1.0 - gates[..., None]) * mean
    out[:, rows] = out[:, rows] * gates[..., None] + left
    return out


@pytest.mark.parametrize("name", ["pixart", "wan", "sd3", "flux", "cogvideox"])
def test_queries_choose_by_their_norms_before_normalization(name: str) -> None:
    pipe = made(name)
    model = pipe.transformer
    session = dit_attn.enable(model, QUERY)
    layer = session.layers[0]
    attention = model.get_submodule(layer.name)
    call, x = first_call(model, pipe.args, layer.name)
    with torch.no_grad():
        norms = attention.to_q(x).unflatten(-1, (attention.heads, -1)).norm(dim=-1)
    torch.testing.assert_close(call.out, gated(call, best_heads(norms, 1).float()), atol=1e-5, rtol=1e-4)
    assert layer.raw_queries is None and layer.normalizes_queries is (attention.norm_q is not None)


def test_normalized_queries_are_all_alike_and_are_not_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = made("wan")
    stock = forward(pipe.transformer, pipe.args)
    monkeypatch.setattr(attention_processor, "query_norm", lambda attention: (None, True))
    dit_attn.enable(pipe.transformer, QUERY)
    assert same(stock, forward(pipe.transformer, pipe.args))
    assert "only normalized queries are at hand" in str(dit_attn.summary(pipe.transformer))
    assert "route='calibrated'" in str(dit_attn.summary(pipe.transformer))
    with pytest.raises(DitAttnError, match="after their normalization alone"):
        calibrate_routing(pipe, ["a"], MoH(route="query", top_k=1, fill="mean"), every=1)
    raw = torch.randn(64, 8, 32, generator=torch.Generator().manual_seed(0)) * torch.rand(64, 8, 1) * 4.0
    normed = torch.nn.functional.rms_norm(raw, (32,))
    spread = [float((x.norm(dim=-1).std(0) / x.norm(dim=-1).mean(0)).mean()) for x in (raw, normed)]
    assert spread[0] > 0.3 and spread[1] < 0.05


def constant(pipe: Pipe) -> None:
    """Give every visual token the same values: the output of a head is the same for all tokens."""
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("attn1.to_v", "attn.to_v")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.normal_(module.bias)


@pytest.mark.parametrize("method", [FILLED, MoH(route="query", top_k=1, fill="mean")])
def test_the_mean_makes_up_for_a_constant_head(method: MoH, tmp_path: Path) -> None:
    pipe = made("pixart")
    constant(pipe)
    stock = forward(pipe.transformer, pipe.args)
    with calibrate_routing(pipe, ["a", "b"], method, every=1).enabled(pipe.transformer):
        torch.testing.assert_close(forward(pipe.transformer, pipe.args), stock, atol=1e-5, rtol=1e-4)
    with dit_attn.enabled(pipe.transformer, QUERY):
        assert not torch.allclose(forward(pipe.transformer, pipe.args), stock, atol=1e-3)


def test_a_file_is_enabled_saved_again_and_runs_with_sparse_attention(tmp_path: Path) -> None:
    pipe = made("sd3")
    model = pipe.transformer
    found = calibrate_routing(pipe, ["a", "b"], FILLED, every=1)
    path = found.save(tmp_path / "heads.json")
    session = dit_attn.enable(model, str(path))
    layer = session.layers[0]
    choice: Any = layer.learned[id(session.methods[0])]
    call, x = first_call(model, pipe.args, layer.name)
    gates, mean = choice(x, 0, 1)
    assert mean is not None and mean.abs().sum() > 0 and gates.sum(-1).unique().tolist() == [1.0]
    torch.testing.assert_close(call.out, gated(call, gates, mean.detach()), atol=1e-5, rtol=1e-4)
    expected = forward(model, pipe.args)
    session.save_pretrained(tmp_path / "again")
    dit_attn.disable(model)
    with dit_attn.enabled(model, str(tmp_path / "again")):
        assert same(expected, forward(model, pipe.args))
    other = copy.deepcopy(model)
    dit_attn.enable(other, str(path), SPARSE)
    forward(other, pipe.args)
    assert dit_attn.summary(other).sparse_calls


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda pipe: dit_attn.enable(pipe.transformer, CALIBRATED), "needs a calibration"),
        (lambda pipe: dit_attn.enable(pipe.transformer, MoH(route="query", fill="mean")), "needs a calibration"),
        (lambda pipe: MoH(fill="mean"), "is for routing without training"),
        (lambda pipe: calibrate_routing(pipe, ["a"], MoH()), "train it with dit-attn finetune moh"),
        (lambda pipe: calibrate_routing(pipe, ["a"], QUERY), "enable it as it is"),
        (lambda pipe: calibrate_routing(pipe, ["a"], MoH(route="calibrated", top_k=9)), "top_k is 9"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(ask: Callable[[Pipe], Any], message: str) -> None:
    pipe = made("pixart")
    stock = forward(pipe.transformer, pipe.args)
    with pytest.raises(DitAttnError, match=message) as error:
        ask(pipe)
    assert "\n" not in str(error.value) and same(stock, forward(pipe.transformer, pipe.args))
