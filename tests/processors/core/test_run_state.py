"""State of a run that a host without diffusers fills in: layers, token layout, branches, and perturbed passes."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.cfg import BATCHED, SEPARATE
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.run_state import RunState, run_by_handle
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from dit_attn.processors.guidance.perturbation import Perturbation

LAYOUT = TokenLayout((Span("text", None), visual_span("image", (1, 4, 5))))
PERTURBED = Perturbation({"blocks.0": {0: 1.0}})


class TwoBranches(RunState):
    """A host that says how many branches the batch stacks."""

    def branch_count(self, rows: int) -> int | None:
        return 2


def test_layers_are_numbered_in_the_order_they_are_added() -> None:
    run = RunState([], Clock())
    layers = [run.add_layer(name) for name in ("blocks.0", "blocks.1", "single.0")]
    assert run.layers == layers and run.layer_count == 3
    assert [(layer.name, layer.index) for layer in layers] == [("blocks.0", 0), ("blocks.1", 1), ("single.0", 2)]


def test_a_host_that_shows_no_prompt_says_so() -> None:
    with pytest.raises(DitAttnError, match="nothing shows them"):
        RunState([], Clock()).find_piece(None, "red")  # type: ignore[arg-type]


def test_a_run_is_found_by_its_handle_as_long_as_it_exists() -> None:
    run, other = RunState([], Clock()), RunState([], Clock())
    assert run_by_handle(run.handle) is run and run_by_handle(other.handle) is other
    handle = run.handle
    layer = run.add_layer("blocks.0")
    assert layer.id != run.id  # one sequence of numbers for both
    del run
    gc.collect()
    with pytest.raises(DitAttnError, match="another load of dit_attn, or is gone"):
        run_by_handle(handle)


def test_tokens_are_resolved_by_the_layout_of_the_current_call() -> None:
    run = RunState([], Clock())
    assert run.tokens(27) is None  # before the first call
    run.set_layout(LAYOUT)
    tokens = run.tokens(27)
    assert tokens is not None and tokens.visual_range == (7, 27) and run.tokens(27) is tokens
    assert run.tokens(19) is None
    run.set_layout(TokenLayout((visual_span("image", (1, 3, 9)),)))
    tokens = run.tokens(27)
    assert tokens is not None and tokens.visual_range == (0, 27)
    run.set_layout(None, "layout of wan: KeyError: 'grid'")
    assert run.tokens(27) is None and run.layout_error == "layout of wan: KeyError: 'grid'"
    run.set_layout(LAYOUT)
    assert run.layout_error is None


def test_branches_of_separate_calls_follow_the_clock() -> None:
    run, seen = RunState([], Clock(), SEPARATE), []
    for timestep in (900.0, 900.0, 500.0):
        run.clock.tick(timestep, run.cfg)
        run.begin_call(2)
        seen.append(run.branches(2))
    assert seen == [("cond",) * 2, ("uncond",) * 2, ("cond",) * 2]


def test_branches_of_a_model_that_attends_sample_by_sample_are_those_of_its_batch() -> None:
    run = TwoBranches([], Clock(), BATCHED)
    layer = run.add_layer("blocks.0")
    run.clock.tick(900.0, run.cfg)
    run.begin_call(4)
    assert run.rows_by_branch() == run.branches(4) == ("uncond", "uncond", "cond", "cond")
    seen = []
    for _ in range(4):
        layer.advance_rows(1)
        seen += run.branches(1, layer.rows[0])
    assert tuple(seen) == run.rows_by_branch()
    run.begin_call(4)
    assert layer.rows == (0, 0)


def test_appended_rows_are_perturbed_until_they_are_dropped() -> None:
    run = TwoBranches([], Clock(), BATCHED)
    run.clock.tick(900.0, run.cfg)
    run.begin_call(4)
    run.append_perturbed(PERTURBED, 2)
    assert run.perturbed is PERTURBED and run.first_perturbed == 4
    assert run.rows_by_branch() == ("uncond", "uncond", "cond", "cond", "perturbed", "perturbed")
    run.drop_perturbed()
    assert run.perturbed is None and run.first_perturbed == 0 and len(run.rows_by_branch()) == 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_perturbed_pass_ends_with_its_block_however_it_ends(fails: bool) -> None:
    run = TwoBranches([], Clock(), BATCHED)
    run.clock.tick(900.0, run.cfg)
    run.begin_call(4)
    try:
        with run.perturbing(PERTURBED, 2):
            assert run.perturbed is PERTURBED and run.rows_by_branch() == ("perturbed",) * 2
            if fails:
                raise InterruptedError
    except InterruptedError:
        assert fails
    assert run.perturbed is None and run.rows_by_branch() == ("uncond", "uncond", "cond", "cond")


def test_a_bare_run_state_does_not_know_how_many_branches_there_are() -> None:
    run = RunState([], Clock(), BATCHED)
    run.clock.tick(900.0, run.cfg)
    run.begin_call(4)
    assert run.branch_count(4) is None and run.rows_by_branch() == ("cond",) * 4


def test_runs_of_one_pipeline_share_a_clock() -> None:
    clock = Clock()
    first, second = RunState([], clock), RunState([], clock)
    context: Any = SimpleNamespace(name="uncond", step_index=3, num_inference_steps=8)
    first.clock.tick(900.0, SEPARATE, context=context)
    assert (second.clock.step, second.clock.total, second.rows_by_branch()) == (3, 8, ("uncond",))


def test_the_branches_of_a_sample_have_one_number() -> None:
    run = TwoBranches([], Clock(), BATCHED)
    run.clock.tick(900.0, run.cfg)
    run.begin_call(4)
    assert run.branches(4) == ("uncond", "uncond", "cond", "cond") and run.samples(4) == (0, 1, 0, 1)
    assert run.samples(1, 3) == (1,)  # models that attend to their samples one by one


def test_what_methods_store_for_all_layers_is_of_one_window_and_dropped_with_the_layers() -> None:
    run = RunState([], Clock())
    layer = run.add_layer("blocks.0")
    run.begin_call(1)
    run.shared.current["probe"] = layer.state["probe"] = 1
    with run.in_pass("twin", ("cond",)):
        assert run.shared.current == {} and run.shared.of("plain") == {"probe": 1}
    run.drop_state()
    assert not run.shared.current and not layer.state
