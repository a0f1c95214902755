"""Two threads on one transformer: exact or refused. Nested ``enabled`` on the transformers of one pipeline."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.attach import attach
from tests._support.compose import SPARSE, WARM, forward, pipeline_run, same, tiny, tiny_pipeline

REFUSED = "another thread is running this transformer; give each thread its own copy"


def in_thread(function: Any) -> Any:
    """Call a function in another thread; return its result, or the error that it raised."""
    found: list[Any] = []

    def work() -> None:
        try:
            with torch.no_grad():
                found.append(function())
        except dit_attn.DitAttnError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_a_second_thread_in_the_middle_of_a_pipeline_run_is_refused_and_the_run_stays_exact() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    method = dit_attn.ReTtention(density=0.5, q_block=16, kv_block=16, dense_steps=0)
    _, inputs = tiny("wan")
    dit_attn.enable(pipe, method)
    alone = pipeline_run(pipe, kwargs)
    twin = copy.copy(pipe)  # for another request: its own scheduler, the same transformer
    twin.register_modules(scheduler=copy.deepcopy(pipe.scheduler))
    errors: list[Any] = []

    def intrude(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        errors.append(in_thread(lambda: pipeline_run(twin, kwargs)))
        errors.append(in_thread(lambda: forward(pipe.transformer, inputs)))
        return {}

    assert same(pipeline_run(pipe, {**kwargs, "callback_on_step_end": intrude}), alone)
    assert len(errors) == 6 and all(REFUSED in str(error) for error in errors)
    assert same(in_thread(lambda: pipeline_run(twin, kwargs)), alone)  # in turns


def test_a_second_thread_inside_a_call_ends_the_first_with_one_error() -> None:
    model, inputs = tiny("wan")
    dit_attn.enable(model, SPARSE)
    alone = forward(model, inputs)
    found: list[Any] = []

    def once(*_: Any) -> None:
        handle.remove()
        found.append(in_thread(lambda: forward(model, inputs)))

    handle = model.blocks[0].register_forward_hook(once)  # type: ignore[union-attr,index,operator]
    with pytest.raises(dit_attn.DitAttnError, match=REFUSED):
        forward(model, inputs)
    assert same(found[0], alone) and same(forward(model, inputs), alone)


def test_without_a_method_threads_are_not_refused() -> None:
    model, inputs = tiny("wan")
    dit_attn.enable(model)
    alone, found = forward(model, inputs), []

    def once(*_: Any) -> None:
        handle.remove()
        found.append(in_thread(lambda: forward(model, inputs)))

    handle = model.blocks[0].register_forward_hook(once)  # type: ignore[union-attr,index,operator]
    assert same(forward(model, inputs), alone) and same(found[0], alone)


def test_nested_methods_give_each_transformer_back_its_own() -> None:
    pipe, _ = tiny_pipeline("wan")
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    dit_attn.enable(pipe.transformer, SPARSE)
    with dit_attn.enabled(pipe, WARM):
        pass

    def enabled_on(model: Any) -> Any:
        session = attach.session_of(model)
        return None if session is None else session.methods

    assert enabled_on(pipe.transformer) == (SPARSE,) and enabled_on(pipe.transformer_2) is None
    dit_attn.enable(pipe.transformer_2, WARM)
    with dit_attn.enabled(pipe):
        assert enabled_on(pipe.transformer) == enabled_on(pipe.transformer_2) == ()
    assert enabled_on(pipe.transformer) == (SPARSE,) and enabled_on(pipe.transformer_2) == (WARM,)
    dit_attn.enable(pipe, SPARSE)
    with dit_attn.enabled(pipe, WARM):
        pass
    first, second = (attach.session_of(model) for model in (pipe.transformer, pipe.transformer_2))
    assert first is not None and second is not None and first.clock is second.clock
    assert first.owner is pipe and first.methods == second.methods == (SPARSE,)
