"""Hooks on a transformer: what they show the session, and what is left of them in a copy and in a file."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.attach import attach, hooks
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.run_state import RunState
from tests._support import fake_pipeline
from tests._support.fake_pipeline import fake


class Transformer(torch.nn.Module):
    """The arguments of a transformer, in another order than the family names them."""

    def forward(self, hidden_states: Any, text: Any = None, timestep: Any = None, frames: int = 1) -> Any:
        """Nothing of interest."""
        return hidden_states

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Any:
        """Of a cache mixin: remembers what it was given."""
        self.given = (name, kwargs)
        yield


class Session:
    """Remembers what it is shown; stands for the session of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.guider, self.twin, self.negative, self.shown = model, None, None, None, list[Any]()
        self.family = SimpleNamespace(timestep="timestep", forward_args=("frames", "absent"), shown=dict)
        self.context: Any = None
        self.is_step = True
        self.on_forward = self.shown.append


def hooked() -> tuple[Transformer, Any, hooks.ForwardHook]:
    """A transformer with a forward hook, and its session."""
    model = Transformer()
    session: Any = Session(model)
    hook = hooks.ForwardHook(session)
    model.register_forward_pre_hook(hook, with_kwargs=True)
    return model, session, hook


# -- the forward arguments --------------------------------------------------------------------------------------------


def test_arguments_are_shown_by_name_however_they_are_passed() -> None:
    model, session, hook = hooked()
    assert hook.names == ("timestep", "hidden_states", "frames", "absent")
    x, time = torch.zeros(1), torch.tensor([3.0])
    model(x, None, time, 5)
    model(x, timestep=time, frames=5)
    model(hidden_states=x)
    full = {"timestep": time, "hidden_states": x, "frames": 5}
    assert session.shown == [full, full, {"timestep": None, "hidden_states": x, "frames": None}]


def test_processors_are_looked_after_before_the_session_is_told_and_the_guider_may_change_the_call() -> None:
    model, session, hook = hooked()
    order: list[str] = []
    hook.rewrap = lambda session: order.append("rewrap")
    session.on_forward = lambda values: order.append("on_forward")
    session.guider = SimpleNamespace(
        before=lambda module, args, kwargs: order.append("before") or ((), {"hidden_states": args[0] + 1})
    )
    assert torch.equal(model(torch.zeros(1)), torch.ones(1))
    assert order == ["rewrap", "on_forward", "before"]


def test_a_compiled_transformer_shows_its_arguments_through_one_operator() -> None:
    session = RunState([], Clock())
    shown: list[dict[str, Any]] = []
    session.on_forward, session.twin = shown.append, None  # type: ignore[attr-defined]
    session.negative, session.reduced = None, None  # type: ignore[attr-defined]
    torch.ops.dit_attn.on_forward(
        session.handle,
        [torch.tensor([3.0]), torch.zeros(2)],
        "timestep\nframes=5\nhidden_states\nname='a=b'\nnone=None",
    )
    (values,) = shown
    assert (values["frames"], values["name"], values["none"]) == (5, "a=b", None)
    assert torch.equal(values["timestep"], torch.tensor([3.0])) and values["hidden_states"].shape == (2,)


# -- the cache context ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_context_of_a_call_is_known_inside_it_only(fails: bool) -> None:
    model = Transformer()
    session: Any = Session(model)
    hook = hooks.ContextHook(model, session)
    try:
        with hook("uncond", step_index=3, num_inference_steps=8):
            found = session.context
            assert (found.name, found.step_index, found.num_inference_steps) == ("uncond", 3, 8)
            assert model.given == ("uncond", {"step_index": 3, "num_inference_steps": 8})  # diffusers' own still runs
            if fails:
                raise InterruptedError
    except InterruptedError:
        assert fails
    assert session.context is None
    with hook("cond"):
        assert (session.context.step_index, session.context.num_inference_steps) == (None, None)


# -- guidance ---------------------------------------------------------------------------------------------------------


def test_the_guider_gets_the_output_and_without_one_it_stays() -> None:
    model = Transformer()
    session: Any = Session(model)
    model.register_forward_hook(hooks.GuidanceHook(session), with_kwargs=True)
    x = torch.zeros(1)
    assert model(x) is x

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return (module is model, args, kwargs, output)

    session.guider = SimpleNamespace(after=after, outside=False)
    assert model(x, frames=2) == (True, (x,), {"frames": 2}, x)
    session.guider.outside = True  # behind the graph of a transformer that is compiled in place
    assert model(x) is x


# -- copies and files -------------------------------------------------------------------------------------------------


def enabled(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, attach.Session]:
    """A transformer with every kind of hook."""
    monkeypatch.setattr(fake_pipeline.FakeTransformer, "cache_context", Transformer.cache_context, raising=False)
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1"), "separate", 3.0)
    session = attach.session_of(pipe.transformer)
    assert session is not None
    return pipe.transformer, session


def found_hooks(model: torch.nn.Module) -> list[Any]:
    """The hooks of a transformer, all three of them."""
    found = [*model._forward_pre_hooks.values(), *model._forward_hooks.values(), vars(model)["cache_context"]]
    assert [type(hook) for hook in found] == [hooks.ForwardHook, hooks.GuidanceHook, hooks.ContextHook]
    return found


def test_hooks_of_a_copied_transformer_belong_to_its_own_session(monkeypatch: pytest.MonkeyPatch) -> None:
    model, session = enabled(monkeypatch)
    clone = copy.deepcopy(model)
    sessions = {id(hook.session) for hook in found_hooks(clone)}
    other = attach.session_of(clone)
    assert other is not None and sessions == {id(other)} and other is not session
    assert other.model is clone and other.guider is not None and other.guider.session is other
    assert {id(hook.session) for hook in found_hooks(model)} == {id(session)}
    with vars(clone)["cache_context"]("cond"):
        assert other.context.name == "cond" and session.context is None and clone.given[0] == "cond"
    attach.detach(clone)
    assert not clone._forward_pre_hooks and not clone._forward_hooks and "cache_context" not in vars(clone)
    assert not clone._forward_hooks_with_kwargs and not clone._forward_pre_hooks_with_kwargs
    found_hooks(model)


def test_hooks_of_a_saved_transformer_come_back_without_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    model, session = enabled(monkeypatch)
    loaded = pickle.loads(pickle.dumps(model))
    assert [hook.session for hook in found_hooks(loaded)] == [None] * 3
    assert attach.session_of(loaded) is None and attach.session_of(model) is session
    forward, guidance, context = found_hooks(loaded)
    assert forward(loaded, (), {}) is None and guidance(loaded, (), {}, "output") == "output"
    with context("cond"):
        assert loaded.given == ("cond", {})
    attach.detach(loaded)
    assert not loaded._forward_pre_hooks and not loaded._forward_hooks and "cache_context" not in vars(loaded)
