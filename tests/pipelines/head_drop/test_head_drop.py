"""Dropped heads: the profile, the refit in closed form, the budget over layers, sliced weights, and back again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import DitAttnError
from dit_attn.pipelines.head_drop import (
    DroppedHeads,
    HeadProfile,
    choose_heads,
    first_heads,
    load_profile,
    named_heads,
    profile_heads,
    profile_parts,
    random_heads,
    save_profile,
)
from dit_attn.pipelines.head_drop.refit import dropping_error, refit
from dit_attn.processors.attach.layer_shape import output_projection
from tests._support.compose import forward, same, tiny, tiny_pipeline
from tests._support.gated_heads import Pipe


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
    dit_attn.enable(pipe.transformer, dit_attn.HeadDrop(heads=f"{layers[-1]}:{head}"))
    exact = (forward(pipe.transformer, args) - full).square().sum() / full.square().sum()
    assert float(profile.layers[-1].ablation[head]) == pytest.approx(float(exact), rel=0.5)


def enabled_from(pipe: Pipe, drop: DroppedHeads, folder: Path) -> torch.Tensor:
    """The output with the saved file enabled."""
    dit_attn.enable(pipe.transformer, str(drop.save(folder / "heads.json")))
    return forward(pipe.transformer, pipe.args)


def test_nothing_dropped_changes_nothing_and_disabling_is_bit_equal(
    profiled: tuple[str, HeadProfile], tmp_path: Path
) -> None:
    name, profile = profiled
    pipe = made(name)
    before = forward(pipe.transformer, pipe.args)
    drop = choose_heads(profile, 0)
    assert drop.dropped == (0,) and same(before, enabled_from(pipe, drop, tmp_path))
    dit_attn.disable(pipe.transformer)
    state = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    assert not same(before, enabled_from(pipe, choose_heads(profile, 0.5), tmp_path))
    dit_attn.disable(pipe.transformer)
    dit_attn.disable(pipe.transformer)
    assert same(before, forward(pipe.transformer, pipe.args))
    assert all(torch.equal(value, state.pop(key)) for key, value in pipe.transformer.state_dict().items()) and not state


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
    drop = choose_heads(profile, 1, refitted=False)
    assert drop.kept == ({profile.layers[0].name: tuple(range(1, attention.heads))},) and drop.expected < 1e-12
    dit_attn.enable(pipe.transformer, drop.method)
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
    plain, refit = (dropping_error(layer, kept, refitted=way, ridge=1e-9) for way in (False, True))
    assert refit < 1e-5 * plain


def test_the_refit_is_never_worse_on_what_was_measured(profiled: tuple[str, HeadProfile]) -> None:
    _, profile = profiled
    for layer in profile.layers:
        assert dropping_error(layer, range(layer.heads)) < 1e-9
        for head in range(layer.heads):
            kept = [other for other in range(layer.heads) if other != head]
            assert dropping_error(layer, kept) <= dropping_error(layer, kept, refitted=False) * (1 + 1e-9)


def test_chosen_heads_are_expected_to_be_no_worse_than_random_ones(profiled: tuple[str, HeadProfile]) -> None:
    _, profile = profiled
    most = profile.heads - len(profile.layers)
    for count in range(1, most + 1):
        chosen = choose_heads(profile, count)
        others = [random_heads(profile, count, seed) for seed in range(4)]
        assert chosen.dropped == (count,) == others[0].dropped
        assert chosen.expected <= min(other.expected for other in others) * (1 + 1e-9)
    with pytest.raises(DitAttnError, match="every layer keeps one"):
        choose_heads(profile, most + 1)


def test_saved_heads_fit_their_model_only(profiled: tuple[str, HeadProfile], tmp_path: Path) -> None:
    name, profile = profiled
    pipe = made(name)
    enabled_from(pipe, choose_heads(profile, 1), tmp_path)
    assert dit_attn.Method.from_pretrained(tmp_path / "heads.json").weights == str(tmp_path / "heads.safetensors")
    other, _ = tiny("wan")
    with pytest.raises(DitAttnError, match=r"no (self or joint )?attention layer|there is no layer|has tensors of"):
        dit_attn.enable(other, str(tmp_path / "heads.json"))
    (tmp_path / "heads.safetensors").unlink()
    with pytest.raises(DitAttnError, match=r"there are no tensors .*heads\.safetensors"):
        dit_attn.enable(made(name).transformer, str(tmp_path / "heads.json"))


def test_the_refit_is_the_nearest_projection(profiled: tuple[str, HeadProfile], tmp_path: Path) -> None:
    """What is enabled from the file is W' and b' of the closed form."""
    name, profile = profiled
    pipe = made(name)
    drop = choose_heads(profile, 1)
    ((layer, kept),) = drop.kept[0].items()
    session = dit_attn.enable(pipe.transformer, str(drop.save(tmp_path)))
    reduced = next(here.reduced for here in session.layers if here.name == layer)
    found = next(one for one in profile.layers if one.name == layer)
    for stream, moments in found.streams.items():
        weight, shift = refit(moments, found.channels(kept))
        module = output_projection(session.model.get_submodule(layer), stream)
        new = output_projection_of(reduced, stream)
        torch.testing.assert_close(new.cached[0].double(), weight.T, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(new.cached[1].double(), module.bias.double() + shift, atol=1e-6, rtol=1e-4)


def output_projection_of(reduced: Any, stream: str) -> Any:
    found = getattr(reduced, stream)
    return found[0] if isinstance(found, torch.nn.ModuleList) else found


def test_parts_of_the_run_have_profiles_and_heads_of_their_own(tmp_path: Path) -> None:
    pipe, call = tiny_pipeline("pixart")
    stock, steps = pipe.__call__, {"num_inference_steps": 4}

    class Prompted(SimpleNamespace):
        """The pipeline, which has no text encoder, with its prompt embeddings."""

        def __call__(self, prompt: str, **kwargs: Any) -> None:
            stock(**call, **kwargs)

    pipe = Prompted(transformer=pipe.transformer)
    first, last = profile_parts(pipe, ["a", "b"], (0.5,), call=steps, every=1)
    whole = profile_heads(pipe, ["a", "b"], call=steps, every=1)
    assert first.end == 0.5 and first.calls + last.calls == whole.calls
    for a, b, both in zip(first.layers, last.layers, whole.layers, strict=True):
        torch.testing.assert_close(
            a.streams["to_out"].square + b.streams["to_out"].square, both.streams["to_out"].square
        )
    drop = choose_heads([first, last], 1)
    assert drop.until == (0.5,) and sum(drop.dropped) == 2  # one head in the mean
    dit_attn.enable(pipe, str(drop.save(tmp_path)))
    seen: list[tuple[int, Any, int]] = []

    def note(call: Any, request: Any, out: torch.Tensor) -> None:
        seen.append((call.clock.step, call.layer, call.q.shape[2]))

    with dit_attn.observing(pipe, note):
        pipe(prompt="a", **steps)
    for step, layer, count in seen:
        kept = drop.kept[step >= 2].get(layer.name)
        assert count == (whole.layers[0].heads if kept is None else len(kept))


def test_named_heads_and_the_first_of_a_list_are_left_out(profiled: tuple[str, HeadProfile]) -> None:
    _, profile = profiled
    layer = profile.layers[0]
    expected = {layer.name: tuple(range(1, layer.heads))}
    assert named_heads(profile, "L0H0").kept == (expected,)
    every = [(layer.name, head) for head in range(layer.heads)]
    assert first_heads(profile, every, 1).kept == (expected,)
    with pytest.raises(DitAttnError, match="a layer keeps one at least"):
        named_heads(profile, "0")


def test_heads_that_share_a_norm_and_layers_without_a_projection_of_their_own() -> None:
    assert len(profile_heads(made("wan"), ["a"], every=1).layers) == 2
    flux = profile_heads(made("flux"), ["a"], every=1)
    assert flux.count == 3 and [layer.name for layer in flux.layers] == ["transformer_blocks.0.attn"]


def test_a_saved_profile_chooses_the_same_heads(profiled: tuple[str, HeadProfile], tmp_path: Path) -> None:
    _, profile = profiled
    again = load_profile(save_profile(profile, tmp_path / "made" / "profile.safetensors"))
    assert (again.transformer, again.count, again.runs) == (profile.transformer, profile.count, profile.runs)
    first, second = choose_heads(profile, 1), choose_heads(again, 1)
    assert first == second and all(torch.equal(x, second.tensors[key]) for key, x in first.tensors.items())
    first.save(tmp_path / "heads.json")
    for path, message in ((tmp_path / "none", "no such file"), (tmp_path / "heads.safetensors", "is no head profile")):
        with pytest.raises(DitAttnError, match=message):
            load_profile(path)
