"""Methods that learn: their tensors are the transformer's while they are enabled, and leave no trace afterwards."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dit_attn
from dit_attn import DitAttnError, Method
from dit_attn.processors.attach.attach import attach, session_of
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.parameters import LayerShape
from dit_attn.processors.methods.learned import LearnedMethod
from dit_attn.processors.methods.saved import FILE_NAME, TENSORS
from tests._support.compose import SPARSE, forward, same, tiny
from tests._support.learning import HeadGate, SpanLift, first_half, registered, values

WAN = ("blocks.0.attn1", "blocks.1.attn1")
FILE = TENSORS["transformer"]


class Pipe(SimpleNamespace):
    """A pipeline's components; sessions refer to it weakly."""


def trained(model: Any, seed: int = 0) -> None:
    """Give every learned number a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in values(model):
            value.copy_(torch.randn(value.shape, generator=generator))


def names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters()]


# -- where they are ---------------------------------------------------------------------------------------------------


def test_they_are_the_last_parameters_under_the_names_of_method_and_layer() -> None:
    model, _ = tiny("wan")
    stock, keys = names(model), list(model.state_dict())
    dit_attn.enable(model, SpanLift(), HeadGate())
    ours = [f"dit_attn.{method}.{layer}" for method in ("span_lift", "head_gate") for layer in WAN]
    assert names(model) == [*stock, *(f"{name}.value" for name in ours)]
    assert list(model.state_dict()) == [*keys, *(f"{name}.{part}" for name in ours for part in ("value", "seen"))]


def test_disable_leaves_no_trace() -> None:
    model, args = tiny("wan")
    state, parameters, attributes = model.state_dict(), dict(model.named_parameters()), set(vars(model))
    children, stock = list(model._modules), forward(model, args)
    dit_attn.enable(model, SpanLift(start=1.0))
    assert not same(stock, forward(model, args))
    for _twice in range(2):
        dit_attn.disable(model)
        assert list(model.state_dict()) == list(state) and list(model._modules) == children
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert set(vars(model)) == attributes and same(stock, forward(model, args))


def test_a_method_that_learns_nothing_adds_nothing() -> None:
    model, _ = tiny("wan")
    keys = list(model.state_dict())
    session = dit_attn.enable(model, SPARSE)
    assert list(model.state_dict()) == keys and not list(session.learned.parameters())
    assert "save_pretrained" not in vars(model)


def test_a_layer_may_have_none() -> None:
    model, args = tiny("wan")
    session = dit_attn.enable(model, SpanLift(start=1.0, last_layer=False))
    assert names(model)[-1] == f"dit_attn.span_lift.{WAN[0]}.value" and len(values(model)) == 1
    forward(model, args)
    assert [layer.stats.biased_calls for layer in session.layers] == [1, 0]


def test_two_of_one_method_and_two_of_other_settings_do_not_share_tensors() -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model, SpanLift(), SpanLift(start=2.0), SpanLift())
    assert [name.split(".")[1] for name in names(model)[-6:]] == ["span_lift"] * 2 + ["span_lift_2"] * 2 + [
        "span_lift_3"
    ] * 2
    assert len({value.data_ptr() for value in values(model)}) == 6
    assert [value[0].item() for value in values(model)] == [0, 0, 2, 2, 0, 0]


def test_every_layer_knows_its_own_module() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, SpanLift())
    with torch.no_grad():
        values(model)[1].fill_(1.5)  # of the second layer
    biases: dict[str, float] = {}
    with dit_attn.observing(model, lambda call, request, _: biases.update({call.layer.name: len(request.biases)})):
        forward(model, args)
    assert biases == {WAN[0]: 0, WAN[1]: 1}


def test_the_shape_is_that_of_the_layer_and_random_starts_use_up_no_random_numbers() -> None:
    shapes: list[LayerShape] = []

    class Random(LearnedMethod):
        def parameters_for(self, shape: LayerShape) -> torch.nn.Module:
            shapes.append(shape)
            return torch.nn.Linear(shape.hidden_size, shape.heads, dtype=shape.dtype)

    model, _ = tiny("wan")
    model.to(torch.bfloat16)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.device("meta"):
        dit_attn.enable(model, Random())
    assert torch.equal(torch.get_rng_state(), before)
    sizes = (2, 2, 2, 12, 24, torch.bfloat16, (("to_out", 24),))
    assert shapes[-2:] == [LayerShape(name, "self", i, *sizes) for i, name in enumerate(WAN)]
    first = [value.clone() for value in values(model)]
    assert first[0].device.type == "cpu" and first[0].dtype == torch.bfloat16 and first[0].any()
    dit_attn.disable(model)
    dit_attn.enable(model, Random())
    assert all(map(same, first, values(model)))


# -- what a module does -----------------------------------------------------------------------------------------------


def test_they_follow_the_transformer() -> None:
    model, _ = tiny("wan")
    session = dit_attn.enable(model.eval(), SpanLift())
    assert not session.learned.training and all(value.requires_grad for value in values(model))
    model.train().requires_grad_(False).double()
    assert session.learned.training and values(model)[0].dtype == torch.float64
    assert not any(value.requires_grad for value in session.learned.parameters())
    session.learned.requires_grad_(True)
    assert [name for name, x in model.named_parameters() if x.requires_grad] == names(model)[-2:]
    model.to("meta")
    assert all(value.is_meta for value in values(model))


def test_a_copied_transformer_has_copies_that_are_trained_alone() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, SpanLift(), HeadGate())
    trained(model)
    expected = forward(model, args)
    clone = copy.deepcopy(model)
    assert names(clone) == names(model) and same(expected, forward(clone, args))
    trained(clone, seed=1)
    assert same(expected, forward(model, args)) and not same(expected, forward(clone, args))
    dit_attn.disable(clone)
    assert len(values(clone)) == 0 and len(values(model)) == 4
    assert same(expected, forward(model, args))


def test_a_pickled_transformer_comes_back_without_them() -> None:
    model, args = tiny("wan")
    stock, keys = forward(model, args), list(model.state_dict())
    dit_attn.enable(model, SpanLift(start=1.0))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert list(loaded.state_dict()) == keys and same(stock, forward(loaded, args))
    dit_attn.enable(loaded, SpanLift())
    dit_attn.disable(loaded)
    assert list(loaded._modules) == [name for name in model._modules if name != "dit_attn"]
    assert "save_pretrained" not in vars(loaded)


def test_attention_processors_that_are_handed_out_bring_them() -> None:
    model: Any
    model, args = tiny("wan")
    processors = dit_attn.attn_processors(model, SpanLift(start=1.0))
    model.set_attn_processor(processors)
    dit_attn.enable(other := tiny("wan")[0], SpanLift(start=1.0))
    assert len(values(model)) == 2 and same(forward(other, args), forward(model, args))
    dit_attn.disable(model)
    assert not values(model)


# -- enabled again ----------------------------------------------------------------------------------------------------


def test_a_method_that_is_enabled_again_keeps_its_tensors_until_it_is_disabled() -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model, SpanLift())
    before = values(model)
    dit_attn.enable(model, HeadGate(), SpanLift())
    assert [a is b for a, b in zip(values(model)[2:], before)] == [True, True]
    dit_attn.enable(model, SpanLift(last_layer=False))
    assert values(model)[0] is not before[0]
    dit_attn.disable(model)
    dit_attn.enable(model, SpanLift())
    assert values(model)[0] is not before[0]


def test_a_block_with_other_methods_gives_them_back() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, SpanLift())
    trained(model)
    before, expected = values(model), forward(model, args)
    with dit_attn.enabled(model, SPARSE):
        assert not values(model)
    assert all(a is b for a, b in zip(values(model), before)) and same(expected, forward(model, args))
    with pytest.raises(ZeroDivisionError), dit_attn.enabled(model, HeadGate(), SpanLift()):
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(values(model), before))


def test_what_fails_leaves_nothing() -> None:
    class Broken(LearnedMethod):
        def parameters_for(self, shape: LayerShape) -> torch.nn.Module:
            if shape.index:
                raise RuntimeError("no more")
            return torch.nn.Linear(1, 1)

    model, _ = tiny("wan")
    keys, attributes = list(model.state_dict()), set(vars(model))
    with pytest.raises(RuntimeError, match="no more"):
        dit_attn.enable(model, SpanLift(), Broken())
    assert list(model.state_dict()) == keys and set(vars(model)) == attributes and session_of(model) is None
    session = dit_attn.enable(model, SpanLift())
    with pytest.raises(DitAttnError, match="has no dit_attn_method"):
        dit_attn.enable(model, HeadGate(weights=str(Path(__file__).parent)))
    assert session_of(model) is session and len(values(model)) == 2


def test_a_transformer_that_is_wrapped_for_several_processes_is_refused() -> None:
    model, _ = tiny("wan")
    wrapper: Any = type("DataParallel", (torch.nn.Module,), {})()
    wrapper.module = model
    with pytest.raises(DitAttnError, match=r"enable it before accelerator\.prepare"):
        dit_attn.enable(wrapper, SpanLift())
    with pytest.raises(DitAttnError, match=r"enable it before accelerator\.prepare"):
        dit_attn.enable(Pipe(transformer=wrapper), SpanLift())
    assert not values(model)
    dit_attn.enable(wrapper, SPARSE)
    dit_attn.enable(model, SpanLift())
    known = values(model)
    dit_attn.enable(wrapper, SPARSE, SpanLift())  # the wrapper has these
    assert all(x is y for x, y in zip(values(model), known, strict=True))


# -- gradients --------------------------------------------------------------------------------------------------------


def attention(call: Any, bias: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """(B, S, H, D) in plain torch: a bias per head for the first half of the keys, a gate per head."""
    q, k, v = (x.double().transpose(1, 2) for x in (call.q, call.k, call.v))
    logits = q @ k.mT * call.softmax_scale
    chosen = torch.zeros(q.shape[2], dtype=torch.float64)
    chosen[first_half(call)] = 1.0
    logits = logits + bias[None, :, None, None] * chosen
    return (gate[None, :, None, None] * (logits.softmax(-1) @ v)).transpose(1, 2)


@pytest.mark.parametrize("frozen", [True, False], ids=["alone", "with the transformer"])
@pytest.mark.parametrize("methods", [(SpanLift(),), (HeadGate(),), (SpanLift(), HeadGate())], ids=len)
def test_gradients_are_those_of_the_formula(methods: tuple[Any, ...], frozen: bool) -> None:
    model, args = tiny("wan")
    model.double().requires_grad_(not frozen)
    dit_attn.enable(model, *methods)
    trained(model)
    calls: list[Any] = []
    with dit_attn.observing(model, lambda call, _, out: calls.append((call, out))):
        model(**{**args, **{k: v.double() for k, v in args.items() if v.is_floating_point()}}, return_dict=False)
    learned = dict(session_of(model).learned.named_parameters())  # type: ignore[union-attr]
    for call, out in calls:
        weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        bias, gate = (learned.get(f"{name}.{call.layer.name}.value") for name in ("span_lift", "head_gate"))
        asked = [x for x in (bias, gate) if x is not None]
        plain = torch.zeros(2).double(), torch.ones(2).double()
        expected = attention(call, *(x if x is not None else start for x, start in zip((bias, gate), plain)))
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-8)
        found = torch.autograd.grad((out * weight).sum(), asked, retain_graph=True)
        for ours, reference in zip(found, torch.autograd.grad((expected * weight).sum(), asked, retain_graph=True)):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["wan", "flux"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_a_loop_that_trains_them_alone_reduces_the_loss(name: str, checkpointing: bool) -> None:
    model: Any
    model, args = tiny(name)
    model.requires_grad_(False)
    stock = forward(model, args)
    session = dit_attn.enable(model.train(), SpanLift(), HeadGate())
    if checkpointing:
        model.enable_gradient_checkpointing()
    trained(model)
    target = forward(model, args)
    with torch.no_grad():
        for value, start in zip(values(model), [0.0] * len(session.layers) + [1.0] * len(session.layers)):
            value.fill_(start)
    assert not same(stock, target)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.3)
    losses = []
    for _step in range(6):
        optimizer.zero_grad()
        loss = (model(**copy.deepcopy(args), return_dict=False)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(bool(value.isfinite().all()) for value in values(model))


def test_a_learned_zero_changes_nothing_when_sampling_and_gets_a_gradient_when_training() -> None:
    model, args = tiny("wan")
    stock = forward(model, args)
    dit_attn.enable(model, SpanLift())
    assert same(stock, forward(model, args)) and dit_attn.summary(model).calls == 2
    model(**args, return_dict=False)[0].square().mean().backward()
    assert all(bool(value.grad.any()) for value in values(model))  # type: ignore[union-attr]


def test_nan_disables_the_layer_and_says_so() -> None:
    model, args = tiny("wan")
    stock = forward(model, args)
    dit_attn.enable(model, HeadGate())
    with torch.no_grad():
        values(model)[0].fill_(torch.nan)
    with pytest.warns(UserWarning, match=r"blocks\.0\.attn1 goes back to dense attention"):
        out = forward(model, args)
    torch.testing.assert_close(out, stock)


# -- saved and loaded -------------------------------------------------------------------------------------------------


def test_a_session_saves_settings_and_tensors_that_enable_brings_back(tmp_path: Path) -> None:
    model, args = tiny("wan")
    session = dit_attn.enable(model, SpanLift(last_layer=False), SPARSE)
    trained(model)
    expected = forward(model, args)
    assert session.save_pretrained(tmp_path / "m") == tmp_path / "m"
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [FILE_NAME, FILE]
    assert sorted(load_file(tmp_path / "m" / FILE)) == [f"{WAN[0]}.seen", f"{WAN[0]}.value"]
    dit_attn.disable(model)
    with registered(SpanLift):
        for source in (str(tmp_path / "m"), str(tmp_path / "m" / FILE_NAME), Method.from_pretrained(tmp_path / "m")):
            session = dit_attn.enable(model, source, SPARSE)
            assert same(expected, forward(model, args))
            assert session.methods[0] == SpanLift(weights=str(tmp_path / "m"), last_layer=False)
            dit_attn.disable(model)


def test_a_folder_is_read_again_when_it_is_named_again(tmp_path: Path) -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model, SpanLift(start=2.0)).save_pretrained(tmp_path)
    with registered(SpanLift):
        method = Method.from_pretrained(tmp_path)
        session = dit_attn.enable(model, method)
        session.learned.load_state_dict({name: x * 0 for name, x in session.learned.state_dict().items()})
        dit_attn.enable(model, method, SPARSE)
        assert not values(model)[0].any()
        dit_attn.enable(model, str(tmp_path), SPARSE)
        assert bool((values(model)[0] == 2).all())


def test_several_that_learn_have_a_folder_each(tmp_path: Path) -> None:
    model, _ = tiny("wan")
    session = dit_attn.enable(model, HeadGate(start=3.0), SpanLift(start=4.0))
    session.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head_gate", "span_lift"]
    dit_attn.disable(model)
    with registered(SpanLift, HeadGate):
        dit_attn.enable(model, str(tmp_path / "span_lift"), str(tmp_path / "head_gate"))
    assert [value[0].item() for value in values(model)] == [4, 4, 3, 3]


def test_both_transformers_of_a_pipeline_are_saved_and_loaded_with_tensors_of_their_own(tmp_path: Path) -> None:
    pipe = Pipe(transformer=tiny("wan")[0], transformer_2=tiny("wan")[0])
    session = dit_attn.enable(pipe, SpanLift())
    for seed, model in enumerate((pipe.transformer, pipe.transformer_2)):
        trained(model, seed)
    expected = [copy.deepcopy(values(model)) for model in (pipe.transformer, pipe.transformer_2)]
    with dit_attn.enabled(pipe, SPARSE):
        pass
    session_of(pipe.transformer).save_pretrained(tmp_path)  # type: ignore[union-attr]
    written = [FILE_NAME, TENSORS["transformer"], TENSORS["transformer_2"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(written)
    assert session.detached
    dit_attn.disable(pipe)
    with registered(SpanLift):
        dit_attn.enable(pipe, str(tmp_path))
        for model, before in zip((pipe.transformer, pipe.transformer_2), expected):
            assert all(map(same, values(model), before))
        (tmp_path / TENSORS["transformer_2"]).unlink()
        with pytest.raises(DitAttnError, match=r"has no dit_attn_method_2\.safetensors in it"):
            dit_attn.enable(pipe, str(tmp_path))


def test_settings_that_name_tensors_are_saved_with_them(tmp_path: Path) -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model, SpanLift(start=2.0)).save_pretrained(tmp_path / "a")
    with registered(SpanLift):
        method = Method.from_pretrained(tmp_path / "a")
        method.save_pretrained(tmp_path / "b")
        for name in (FILE_NAME, FILE):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert Method.from_dict(method.to_dict()) == method != SpanLift(start=2.0)
        SpanLift(start=5.0).save_pretrained(tmp_path / "c")
        assert Method.from_pretrained(tmp_path / "c") == SpanLift(start=5.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop(f"{WAN[1]}.value"), r"blocks\.1\.attn1\.value is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra is no tensor of the method"),
        (lambda state: state.update({f"{WAN[0]}.value": torch.zeros(3)}), r"attn1\.value is \(3,\) and must be \(2,\)"),
        (lambda state: state[f"{WAN[0]}.value"].fill_(torch.nan), r"attn1\.value has values that are not finite"),
    ],
    ids=["missing", "extra", "shape", "nan"],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(change: Any, words: str, tmp_path: Path) -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model, SpanLift()).save_pretrained(tmp_path)
    dit_attn.disable(model)
    from safetensors import safe_open

    state = load_file(tmp_path / FILE)
    with safe_open(tmp_path / FILE, "pt") as file:
        about = file.metadata()
    change(state)
    save_file(state, tmp_path / FILE, about)
    with registered(SpanLift), pytest.raises(DitAttnError, match=words) as caught:
        dit_attn.enable(model, str(tmp_path))
    assert "\n" not in str(caught.value) and session_of(model) is None


def test_tensors_of_another_method_model_or_number_of_layers_are_refused(tmp_path: Path) -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model, SpanLift()).save_pretrained(tmp_path / "lift")
    with pytest.raises(DitAttnError, match=r"tensors of span-lift for Wan.* do not fit head-gate for Wan"):
        dit_attn.enable(model, HeadGate(weights=str(tmp_path / "lift")))
    with pytest.raises(DitAttnError, match=r"Wan\w* with 2 layers.*FluxTransformer2DModel with \d layers"):
        dit_attn.enable(tiny("flux")[0], SpanLift(weights=str(tmp_path / "lift")))
    deeper = type(model).from_config({**model.config, "num_layers": 3})  # type: ignore[attr-defined]
    with pytest.raises(DitAttnError, match=r"with 2 layers, which do not fit .* with 3 layers"):
        attach(deeper, (SpanLift(weights=str(tmp_path / "lift")),), Clock())
    with pytest.raises(DitAttnError, match="no enabled method learns"):
        dit_attn.enable(model, SPARSE).save_pretrained(tmp_path)


def test_a_file_of_tensors_that_is_broken_is_refused(tmp_path: Path) -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model, SpanLift()).save_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes(b"\x80\x02cos\nsystem\n")
    with registered(SpanLift), pytest.raises(DitAttnError, match="no file of weights alone"):
        dit_attn.enable(model, str(tmp_path))


def test_a_saved_method_names_no_tensors_but_its_own(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"method": "span-lift", "weights": "/etc"}')
    with registered(SpanLift), pytest.raises(DitAttnError, match=r"has its tensors beside it.*'/etc'"):
        Method.from_pretrained(tmp_path)


# -- with the transformer's own files ---------------------------------------------------------------------------------


def test_save_pretrained_writes_a_stock_model_and_the_method_next_to_it(tmp_path: Path) -> None:
    model: Any
    model, args = tiny("wan")
    stock = forward(model, args)
    dit_attn.enable(model, SpanLift())
    trained(model)
    expected, keys = forward(model, args), list(model.state_dict())
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == keys
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and same(stock, forward(loaded.eval(), args))
    with registered(SpanLift):
        dit_attn.enable(loaded, str(tmp_path))
    assert same(expected, forward(loaded, args))
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / FILE_NAME).exists()


def test_a_state_dict_with_them_is_loaded_whole_and_a_stock_one_leaves_them() -> None:
    model, _ = tiny("wan")
    stock = {name: x * 2 for name, x in copy.deepcopy(model.state_dict()).items()}
    dit_attn.enable(model, SpanLift(start=2.0))
    with pytest.warns(UserWarning, match="none of the tensors that the enabled methods learn"):
        model.load_state_dict(stock)
    assert same(model.state_dict()["proj_out.bias"], stock["proj_out.bias"]) and bool((values(model)[0] == 2).all())
    full = {name: x * 0 for name, x in model.state_dict().items()}
    model.load_state_dict(full)
    assert not values(model)[1].any()
    del full[f"dit_attn.span_lift.{WAN[0]}.value"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(full)
