"""Dropped heads: the profile, the refit in closed form, the budget over layers, sliced weights, and back again."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import DitAttnError
from dit_attn.pipelines.head_drop import HeadDrop, HeadProfile, choose_heads, profile_heads, random_heads
from dit_attn.pipelines.head_drop.drop import dropping_error
from dit_attn.pipelines.head_drop.profile import output_projection
from tests._support.compose import forward, same, tiny


class Pipe(SimpleNamespace):
    """A transformer with the inputs of one call, which a run repeats with other noise."""

    def __call__(self, prompt: str, generator: torch.Generator, output_type: str) -> None:
        args = copy.deepcopy(self.args)
        args["hidden_states"] = torch.randn(args["hidden_states"].shape, generator=generator)
        with torch.no_grad():
            self.transformer(**args, return_dict=False)


def made(name: str) -> Pipe:
    model, args = tiny(name)
    return Pipe(transformer=model, args=args)


def attentions(pipe: Pipe) -> list[Any]:
    with dit_attn.enabled(pipe.transformer) as session:
        names = [layer.name for layer in session.layers if layer.kind == "self"]
    return [pipe.transformer.get_submodule(name) for name in names]


@pytest.fixture(scope="module", params=("pixart", "sd3"))
def profiled(request: pytest.FixtureRequest) -> tuple[str, HeadProfile]:
    return request.param, profile_heads(made(request.param), ["a", "b", "c"], every=1)


def test_the_profile_is_of_the_heads_and_changes_nothing(profiled: tuple[str, HeadProfile]) -> None:
    name, profile = profiled
    pipe = made(name)
    before, args = forward(pipe.transformer, pipe.args), pipe.args
    again = profile_heads(pipe, ["a", "b", "c"], every=1)
    assert same(before, forward(pipe.transformer, args)) and again.calls == profile.calls == 3
    for layer, attention in zip(profile.layers, attentions(pipe), strict=True):
        assert layer.heads == attention.heads and layer.ablation.shape == (layer.heads,) and (layer.energy > 0).all()
        assert torch.allclose(layer.redundancy.diagonal(), torch.ones(layer.heads).double())
        moments = layer.streams["to_out"]
        total = moments.gram(layer.heads).sum()
        squares = (moments.weight.T @ (moments.square / moments.count) @ moments.weight).trace()
        torch.testing.assert_close(total, squares)
    assert all(p.requires_grad for p in pipe.transformer.parameters())


def test_the_ablation_error_is_that_of_a_head_taken_out_to_first_order(profiled: tuple[str, HeadProfile]) -> None:
    """Over many probes; a head whose output is small is in the linear regime."""
    name, _ = profiled
    pipe = made(name)
    attention, head = attentions(pipe)[-1], 1
    size = attention.to_q.out_features // attention.heads
    with torch.no_grad():
        for stream in ("to_out", "to_add_out"):
            if (projection := output_projection(attention, stream)) is not None:
                projection.weight[:, head * size : (head + 1) * size] *= 0.05
    profile = profile_heads(pipe, ["a"] * 40, every=1)
    generator = torch.Generator().manual_seed(0)
    args = {**pipe.args, "hidden_states": torch.randn(pipe.args["hidden_states"].shape, generator=generator)}
    full = forward(pipe.transformer, args)
    layers = [layer.name for layer in profile.layers]
    kept = tuple(h for h in range(attention.heads) if h != head)
    drop = HeadDrop(profile.transformer, {layers[-1]: kept}, {layers[-1]: attention.heads})
    drop.apply(pipe)
    exact = (forward(pipe.transformer, args) - full).square().sum() / full.square().sum()
    assert float(profile.layers[-1].ablation[head]) == pytest.approx(float(exact), rel=0.5)


def test_nothing_dropped_changes_nothing_and_removing_is_bit_equal(profiled: tuple[str, HeadProfile]) -> None:
    name, profile = profiled
    pipe = made(name)
    before = forward(pipe.transformer, pipe.args)
    drop = choose_heads(profile, 0)
    drop.apply(pipe)
    assert not drop.kept and same(before, forward(pipe.transformer, pipe.args))
    state = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    drop = choose_heads(profile, 0.5)
    drop.apply(pipe)
    for attention, layer in zip(attentions(pipe), profile.layers, strict=True):
        count = len(drop.kept.get(layer.name, range(layer.heads)))
        size = layer.streams["to_out"].total.numel() // layer.heads
        assert attention.heads == count and attention.to_q.out_features == count * size
    assert not same(before, forward(pipe.transformer, pipe.args))
    with pytest.raises(DitAttnError, match="taken out already"):
        drop.apply(pipe)
    drop.remove(pipe)
    drop.remove(pipe)
    assert same(before, forward(pipe.transformer, pipe.args))
    assert all(torch.equal(value, state[key]) for key, value in pipe.transformer.state_dict().items())


def test_a_head_without_a_projection_costs_nothing_and_goes_first(profiled: tuple[str, HeadProfile]) -> None:
    pipe = made(profiled[0])
    attention = attentions(pipe)[0]
    size = attention.to_q.out_features // attention.heads
    with torch.no_grad():
        for stream in ("to_out", "to_add_out"):
            if (projection := output_projection(attention, stream)) is not None:
                projection.weight[:, :size] = 0.0
    before = forward(pipe.transformer, pipe.args)
    profile = profile_heads(pipe, ["a"], every=1)
    drop = choose_heads(profile, 1, refit=False)
    assert drop.kept == {profile.layers[0].name: tuple(range(1, attention.heads))} and drop.expected < 1e-12
    drop.apply(pipe)
    torch.testing.assert_close(forward(pipe.transformer, pipe.args), before, atol=1e-5, rtol=1e-4)


def test_a_duplicate_head_is_made_up_for_by_the_refit(profiled: tuple[str, HeadProfile]) -> None:
    pipe = made(profiled[0])
    attention = attentions(pipe)[0]
    size = attention.to_q.out_features // attention.heads
    with torch.no_grad():
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            part = getattr(attention, name, None)
            if part is not None:
                part.weight[size : 2 * size] = part.weight[:size]
                if part.bias is not None:
                    part.bias[size : 2 * size] = part.bias[:size]
    layer = profile_heads(pipe, ["a", "b"], every=1).layers[0]
    kept = [head for head in range(layer.heads) if head != 1]
    plain, refit = (dropping_error(layer, kept, refit=way, ridge=1e-9) for way in (False, True))
    assert refit < 1e-5 * plain


def test_the_refit_is_never_worse_on_what_was_measured(profiled: tuple[str, HeadProfile]) -> None:
    _, profile = profiled
    for layer in profile.layers:
        assert dropping_error(layer, range(layer.heads)) < 1e-9
        for head in range(layer.heads):
            kept = [other for other in range(layer.heads) if other != head]
            assert dropping_error(layer, kept) <= dropping_error(layer, kept, refit=False) * (1 + 1e-9)


def test_chosen_heads_are_expected_to_be_no_worse_than_random_ones(profiled: tuple[str, HeadProfile]) -> None:
    _, profile = profiled
    most = profile.heads - len(profile.layers)
    for count in range(1, most + 1):
        chosen = choose_heads(profile, count)
        others = [random_heads(profile, count, seed) for seed in range(4)]
        assert chosen.dropped == count == others[0].dropped
        assert chosen.expected <= min(other.expected for other in others) * (1 + 1e-9)
    with pytest.raises(DitAttnError, match="every layer keeps one"):
        choose_heads(profile, most + 1)


def test_saved_heads_come_back_and_fit_their_model_only(profiled: tuple[str, HeadProfile], tmp_path: Path) -> None:
    name, profile = profiled
    pipe = made(name)
    drop = choose_heads(profile, 1)
    drop.apply(pipe)
    expected = forward(pipe.transformer, pipe.args)
    loaded = HeadDrop.load(drop.save(tmp_path / "heads"))
    drop.remove(pipe)
    loaded.apply(pipe)
    assert loaded == drop
    assert same(expected, forward(pipe.transformer, pipe.args))
    with pytest.raises(DitAttnError, match="these heads are those of"):
        HeadDrop.load(tmp_path / "heads").apply(made("wan"))
    with pytest.raises(DitAttnError, match="has other heads than were measured"):
        HeadDrop.load(tmp_path / "heads").apply(pipe)
    (tmp_path / "heads/heads.json").write_text("[]")
    with pytest.raises(DitAttnError, match="has no dropped heads"):
        HeadDrop.load(tmp_path / "heads")


def test_sparse_methods_go_on_top(profiled: tuple[str, HeadProfile]) -> None:
    name, profile = profiled
    pipe = made(name)
    choose_heads(profile, 1).apply(pipe)
    dit_attn.enable(pipe.transformer, dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0))
    assert torch.isfinite(forward(pipe.transformer, pipe.args)).all()
    assert dit_attn.summary(pipe.transformer).sparse_calls == len(profile.layers)


def test_heads_that_share_a_norm_are_refused() -> None:
    with pytest.raises(DitAttnError, match="norm_q normalizes over all heads at once"):
        profile_heads(made("wan"), ["a"])
