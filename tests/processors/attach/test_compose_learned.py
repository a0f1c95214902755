"""Learned tensors with what people train with: accelerate, moving averages, PEFT, offloading, torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers.training_utils import EMAModel

import dit_attn
from dit_attn.processors.attach.attach import session_of
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.methods.saved import FILE_NAME, TENSORS
from tests._support.compose import SPARSE, forward, pipeline_run, same, tiny, tiny_pipeline
from tests._support.learning import HeadGate, SpanLift, registered, values


def loss_of(model: Any, args: dict[str, Any]) -> torch.Tensor:
    return model(**copy.deepcopy(args), return_dict=False)[0].square().mean()


@pytest.fixture
def accelerator(tmp_path: Path) -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(cpu=True, project_dir=str(tmp_path))
    AcceleratorState._reset_state(True)


def test_accelerate_trains_saves_and_resumes_them(accelerator: Any, tmp_path: Path) -> None:
    model, args = tiny("wan")
    dit_attn.enable(model.train(), SpanLift(), HeadGate())
    trained = values(model)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=0.1))
    for _step in range(2):
        accelerator.backward(loss_of(prepared, args))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(tmp_path / "state"))
    reached = [x.detach().clone() for x in trained]
    assert all(x.any() for x in reached)
    with torch.no_grad():
        for x in trained:
            x.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert all(map(same, values(accelerator.unwrap_model(prepared)), reached))
    assert [x is y for x, y in zip(values(model), trained)] == [True] * 4
    momentum = optimizer.state[trained[0]]["exp_avg"]
    assert bool(momentum.any())


def test_a_state_that_was_saved_without_the_method_is_resumed_with_it(accelerator: Any, tmp_path: Path) -> None:
    model, _ = tiny("wan")
    accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))
    dit_attn.enable(model, SpanLift(start=2.0))
    with pytest.warns(UserWarning, match="none of the tensors that the enabled methods learn"):
        accelerator.load_state(str(tmp_path / "state"))
    assert all(bool((x == 2).all()) for x in values(model))


@pytest.mark.parametrize("foreach", [False, True])
def test_a_moving_average_follows_them_and_its_own_file_is_a_stock_model(foreach: bool, tmp_path: Path) -> None:
    model: Any
    model, args = tiny("wan")
    dit_attn.enable(model, SpanLift())
    average = EMAModel(
        model.parameters(), model_cls=type(model), model_config=model.config, foreach=foreach, min_decay=0.5
    )
    average.step(model.parameters())  # the first one copies
    with torch.no_grad():
        for x in model.parameters():
            x.add_(1.0)
    average.step(model.parameters())
    average.save_pretrained(tmp_path / "ema")
    average.store(model.parameters())
    average.copy_to(model.parameters())
    assert all(torch.allclose(x, torch.full_like(x, 0.5)) for x in values(model))
    averaged = forward(model, args)
    model.save_pretrained(tmp_path / "whole")
    average.restore(model.parameters())
    assert all(bool((x == 1).all()) for x in values(model))
    loaded = type(model).from_pretrained(tmp_path / "whole").eval()
    stock = type(model).from_pretrained(tmp_path / "ema").eval()
    torch.testing.assert_close(forward(loaded, args), forward(stock, args))
    with registered(SpanLift):
        dit_attn.enable(loaded, str(tmp_path / "whole"))
    torch.testing.assert_close(forward(loaded, args), averaged)


def test_an_adapter_is_trained_with_them_and_saved_without(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model: Any
    model, args = tiny("wan")
    session = dit_attn.enable(model.train(), SpanLift())
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not any(x.requires_grad for x in values(model))  # PEFT freezes all but the adapter
    session.learned.requires_grad_(True)
    loss_of(model, args).backward()
    moved = {name for name, x in model.named_parameters() if x.grad is not None and x.grad.any()}
    assert {name.split(".")[0] for name in moved} == {"dit_attn", "blocks"}
    assert all("lora" in name for name in moved if name.startswith("blocks"))
    assert not [name for name in peft.get_peft_model_state_dict(model) if "dit_attn" in name]
    session.save_pretrained(tmp_path)
    dit_attn.disable(model)
    assert not values(model) and any("lora" in name for name, _ in model.named_parameters())


def test_a_pipeline_is_saved_stock_with_the_method_in_the_folder_of_its_transformer(tmp_path: Path) -> None:
    pipe, kwargs = tiny_pipeline("wan")
    dit_attn.enable(pipe, SpanLift(start=1.5))
    with torch.no_grad():
        expected = pipeline_run(pipe, kwargs, steps=1)
    pipe.save_pretrained(tmp_path)
    assert {FILE_NAME, TENSORS["transformer"]} <= {path.name for path in (tmp_path / "transformer").iterdir()}
    loaded = type(pipe).from_pretrained(tmp_path, text_encoder=None, tokenizer=None, transformer_2=None)
    loaded.set_progress_bar_config(disable=True)
    with torch.no_grad():
        assert not torch.allclose(pipeline_run(loaded, kwargs, steps=1), expected, atol=1e-3)
        with registered(SpanLift):
            dit_attn.enable(loaded, str(tmp_path / "transformer"))
        torch.testing.assert_close(pipeline_run(loaded, kwargs, steps=1), expected, rtol=1e-4, atol=1e-4)


# -- where weights are brought for each call --------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["method", "offload"])
def test_weights_that_are_offloaded_layer_by_layer_come_with_them(first: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, args = tiny("wan")
    dit_attn.enable(model, SpanLift(start=1.0), HeadGate(start=0.5))
    expected = forward(model, args)
    if first == "offload":
        dit_attn.disable(model)
        accelerate.cpu_offload(model, torch.device("cpu"))
        dit_attn.enable(model, SpanLift(start=1.0), HeadGate(start=0.5))
        assert not any(x.is_meta for x in values(model))
    else:
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert all(x.is_meta for x in values(model))
        session = session_of(model)
        assert session is not None
        with pytest.raises(dit_attn.DitAttnError, match="remove_all_hooks"):
            session.save_pretrained("nowhere")
    assert next(model.parameters()).is_meta and same(expected, forward(model, args))
    dit_attn.disable(model)
    assert not values(model)


@pytest.mark.parametrize("first", ["method", "offload"])
def test_weights_that_are_offloaded_by_groups_come_with_them(first: str) -> None:
    model: Any
    model, args = tiny("wan")
    if not hasattr(model, "enable_group_offload"):
        pytest.skip("this diffusers has no group offloading")
    dit_attn.enable(model, SpanLift(start=1.0))
    expected = forward(model, args)
    if first == "offload":
        dit_attn.disable(model)
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    if first == "offload":
        dit_attn.enable(model, SpanLift(start=1.0))
    assert same(expected, forward(model, args))


def test_a_model_without_weights_yet_gets_them_with_its_weights() -> None:
    model, args = tiny("wan")
    state = model.state_dict()
    dit_attn.enable(model, SpanLift(start=1.0))
    expected = forward(model, args)
    dit_attn.disable(model)
    with torch.device("meta"):
        empty = type(model).from_config(model.config)  # type: ignore[attr-defined]
    dit_attn.enable(empty, SpanLift(start=1.0))
    assert not any(x.is_meta for x in values(empty))
    with pytest.warns(UserWarning, match="keep their values"):
        empty.load_state_dict(state, assign=True)
    empty.rope = copy.deepcopy(model.rope)  # buffers that are not saved
    assert same(expected, forward(empty.eval(), args))


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_a_compiled_model_uses_the_values_of_now_and_is_not_trained(name: str) -> None:
    torch._dynamo.reset()
    model, args = tiny(name)
    model.requires_grad_(False)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    session = dit_attn.enable(compiled, SpanLift(start=1.0), HeadGate())
    first = forward(compiled, args)
    assert same(first, forward(model, args))
    with torch.no_grad():
        values(model)[0].fill_(-2.0)
    second = forward(compiled, args)
    assert same(second, forward(model, args)) and not same(first, second)
    with pytest.raises(dit_attn.DitAttnError, match=r"cannot be trained inside torch\.compile"):
        compiled(**args, return_dict=False)
    session.learned.requires_grad_(False)
    assert same(second, compiled(**args, return_dict=False)[0])
    dit_attn.disable(compiled)
    assert not values(model)
    torch._dynamo.reset()


# -- other sites ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextLift(SpanLift):
    """Rows attend more or less to the first token of the text, in cross attention."""

    slug: ClassVar[str] = ""
    sites: ClassVar[tuple[str, ...]] = ("cross",)

    def request(self, call: AttentionCall, request: Request) -> None:
        request.add_span_bias(call, slice(None), slice(0, 1), self.parameters(call)())


def test_a_method_of_cross_attention_learns_in_those_layers_alone() -> None:
    model, args = tiny("wan")
    stock = forward(model, args)
    dit_attn.enable(model, SPARSE, TextLift())
    names = [name for name, _ in model.named_parameters()][-2:]
    assert names == [f"dit_attn.TextLift.blocks.{index}.attn2.value" for index in (0, 1)]
    loss_of(model, args).backward()
    assert all(bool(x.grad.any()) for x in values(model))  # type: ignore[union-attr]
    dit_attn.disable(model)
    assert same(stock, forward(model, args))
