"""The summary of a run: totals over its layers, its text, its JSON values, and warnings of dropped guidance."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.attach.families import families
from dit_attn.processors.attach.guidance_summary import GuidanceSummary
from dit_attn.processors.attach.pipeline_call import PipelineCall
from dit_attn.processors.attach.session import Session
from dit_attn.processors.attach.summary import LayerSummary, Summary, _unknown, summarize
from dit_attn.processors.attach.summary_parts import PositionsSummary, TwinSummary
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.dispatch import ONLY_GUIDANCE
from dit_attn.processors.methods.presets import PresetUse
from tests._support.fake_pipeline import fake

LAYERS = (
    LayerSummary("blocks.0", 4, 3, 0.25, 0.5, {"dense step": 1}, 0.02),
    LayerSummary("blocks.1", 4, 1, 0.45, 0.25, {"dense step": 1, "cross attention": 2}, 0.07),
    LayerSummary("blocks.2", 2, 0, None, 0.0, {"dense layer": 2}),
)
METHODS: tuple[dict[str, Any], ...] = ({"method": "block-sparse", "density": 0.3, "top_p": None},)
GUIDANCE = GuidanceSummary(evaluations=4, steps=8, reused=0.25, parallel=0.17, orthogonal=1.07, relative=0.3)


def report(**changes: Any) -> Summary:
    """A report of three layers."""
    given: dict[str, Any] = {
        "families": ("wan",), "methods": METHODS, "runs": 2, "steps": 5, "layers": LAYERS, **changes,
    }  # fmt: skip
    return Summary(**given)


# -- totals -----------------------------------------------------------------------------------------------------------


def test_totals_weigh_every_layer_by_its_calls() -> None:
    found = report()
    assert (found.calls, found.sparse_calls) == (10, 4)
    assert found.density == pytest.approx((3 * 0.25 + 0.45) / 4)
    assert found.run_density == pytest.approx((3 * 0.25 + 0.45 + 6) / 10)
    assert list(found.fallbacks.items()) == [("dense step", 2), ("cross attention", 2), ("dense layer", 2)]
    assert found.worst_error == (0.07, "blocks.1")


def test_a_run_without_calls_has_no_densities() -> None:
    found = report(layers=(LayerSummary("blocks.0", 0, 0, None, 0.0, {}),))
    assert found.density is found.run_density is found.worst_error is None and found.fallbacks == {}
    assert "- in sparse calls, - over the run" in str(found)
    dense = report(layers=LAYERS[2:])
    assert dense.density is None and dense.run_density == 1.0


def test_json_values_hold_the_fields_and_the_totals() -> None:
    found = report(guidance=GUIDANCE, warnings=("careful",))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["layers"][1] == {
        "name": "blocks.1", "calls": 4, "sparse_calls": 1, "density": 0.45, "seconds": 0.25,
        "fallbacks": {"dense step": 1, "cross attention": 2}, "error": 0.07,
        "biased_calls": 0, "scaled_calls": 0, "replaced_calls": 0, "dense_calls": 0, "dense_seconds": 0.0,
        "measurements": 0, "measuring": 0.0, "kernels": {},
    }  # fmt: skip
    assert data["guidance"]["parallel"] == 0.17 and data["warnings"] == ["careful"]
    for name in ("calls", "sparse_calls", "biased_calls", "density", "run_density", "fallbacks"):
        assert data[name] == getattr(found, name)


# -- text -------------------------------------------------------------------------------------------------------------


def lines(found: Summary) -> dict[str, list[str]]:
    """The rows of the text by their first column."""
    rows: dict[str, list[str]] = {}
    for line in str(found).splitlines():
        rows.setdefault(line[:16].strip(), []).append(line[17:])
    return rows


def test_the_text_says_what_ran_and_what_did_not() -> None:
    rows = lines(report(families=("wan", "wan"), warnings=("careful",), source="pipeline call"))
    assert rows == {
        "family": ["wan, wan"],
        "methods": ["block-sparse(density=0.3)"],
        "runs": ["2 (last: 5 steps)"],
        "known from": ["pipeline call"],
        "layers": ["2 of 3 sparse"],
        "sparse calls": ["4 of 10 attention calls"],
        "density": ["30.0 % in sparse calls, 72.0 % over the run"],
        "time in method": ["0.75 s"],
        "worst error": ["0.07 of the norm, blocks.1"],
        "fallback": [
            "2 x dense step",
            "2 x cross attention; no method computes such a layer; nothing to do",
            "2 x dense layer",
        ],
        "warning": ["careful"],
    }
    assert lines(report(methods=()))["methods"] == ["none"]
    biased = report(layers=(*LAYERS, LayerSummary("blocks.3", 4, 2, 0.5, 0.0, {}, biased_calls=3)))
    assert biased.biased_calls == biased.to_dict()["biased_calls"] == 3
    assert lines(biased)["biased calls"] == ["3 of 14 attention calls, sparse or dense"]


def test_twin_passes_and_moved_positions_have_rows_of_their_own() -> None:
    found = report(twin=TwinSummary(3, 0.5), positions=PositionsSummary(4, 2, ("h x0.5, w x0.5",)))
    rows = lines(found)
    assert rows["twin"] == ["3 passes in addition to the pipeline's, which used 50.0 % of their blocks again"]
    assert rows["positions"] == ["moved at 4 steps in 2 layers: h x0.5, w x0.5"]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["twin"] == {"passes": 3, "reused": 0.5} and data["positions"]["steps"] == 4
    assert report().to_dict()["twin"] is report().to_dict()["positions"] is None


def test_settings_are_those_that_differ_from_the_preset_whose_provenance_is_said() -> None:
    use = PresetUse("block-sparse", "wan2.1-14b", "guess", ("density",))
    rows = lines(report(presets=(use,), methods=({"method": "block-sparse", "density": 0.3, "kv_block": 32},)))
    assert rows["methods"] == ["block-sparse(density=0.3)"]
    assert rows["preset"] == ["wan2.1-14b for the other settings of block-sparse (a guess, not measured)"]
    rows = lines(report(presets=(PresetUse("block-sparse", "tiny-image", "measured"),)))
    assert rows["methods"] == ["block-sparse"]
    assert rows["preset"] == ["tiny-image for block-sparse (measured on this model)"]


def test_repr_is_one_line_with_method_density_and_time() -> None:
    assert repr(report()) == (
        "<Summary: block-sparse(density=0.3), runs 2, density 30.0 % in sparse calls, 0.75 s in method>"
    )
    assert repr(report(runs=0)).startswith("<Summary: block-sparse(density=0.3), no run yet")
    alone = (LayerSummary("blocks.0", 4, 0, None, 0.0, {ONLY_GUIDANCE: 4}),)
    found = report(layers=alone, guidance=GUIDANCE, methods=({"method": "softpag", "u": 0.5},))
    assert repr(found) == "<Summary: softpag(u=0.5), runs 2, 8 guided steps>"


def test_before_a_run_one_line_says_so_instead_of_figures() -> None:
    rows = lines(
        report(runs=0, steps=0, guidance=GuidanceSummary(0, 0, 0.0, None, None, None, ("slg skips blocks.1",)))
    )
    assert rows == {
        "family": ["wan"],
        "methods": ["block-sparse(density=0.3)"],
        "guidance": ["slg skips blocks.1"],
        "runs": ["none yet: call the pipeline, then ask again"],
    }


def test_sparse_calls_are_compared_with_dense_ones_of_the_same_layers() -> None:
    layers = (
        LayerSummary("blocks.0", 6, 4, 0.25, 0.4, {}, dense_calls=2, dense_seconds=0.3),  # 0.10 s against 0.15 s
        LayerSummary("blocks.1", 6, 4, 0.25, 1.2, {}, dense_calls=2, dense_seconds=1.3),  # 0.30 s against 0.65 s
        LayerSummary("blocks.2", 6, 0, None, 0.0, {}, dense_calls=6, dense_seconds=9.0),  # no sparse call
        LayerSummary("blocks.3", 6, 6, 0.25, 9.0, {}),  # no dense call
    )
    found = report(layers=layers)
    assert found.call_speedup == pytest.approx(0.8 / 0.4) and found.to_dict()["call_speedup"] == found.call_speedup
    assert lines(found)["time in method"] == ["10.60 s; a sparse call takes 0.50 of the time of a dense one"]
    assert report().call_speedup is None


def test_a_notebook_gets_the_rows_of_the_text_as_a_table() -> None:
    found = report(guidance=GUIDANCE, warnings=("<careful>",))
    page = found._repr_html_()
    assert page.startswith("<table") and "block-sparse(density=0.3)" in page and "&lt;careful&gt;" in page
    assert page.count("<tr>") == len(str(found).splitlines())


def test_the_text_of_a_run_with_guidance_alone_leaves_the_sparse_rows_out() -> None:
    alone = (LayerSummary("blocks.0", 4, 0, None, 0.0, {ONLY_GUIDANCE: 4}),)
    rows = lines(report(guidance=GUIDANCE, layers=alone))
    assert set(rows) == {"family", "methods", "runs", "guidance", "cost", "update"}
    assert {"layers", "fallback", "guidance"} <= set(lines(report(guidance=GUIDANCE)))


# -- of sessions ------------------------------------------------------------------------------------------------------

WAN = next(row for row in families() if row.name == "wan")
FLUX = next(row for row in families() if row.name == "flux")


def session(model: torch.nn.Module, clock: Clock, family: Any = WAN) -> Session:
    """A session of two layers that ran, with a method."""
    model.config = getattr(model, "config", SimpleNamespace())
    made = Session(model, family, (dit_attn.BlockSparse(density=0.3),), clock)
    for name in ("blocks.0.attn1", "blocks.1.attn1"):
        made.add_layer(name)
    clock.run, clock.step, made._seen_run = 3, 4, 3
    return made


def test_statistics_of_the_layers_become_a_report() -> None:
    model = torch.nn.Module()
    found = session(model, Clock())
    stats = found.layers[0].stats
    stats.calls, stats.sparse_calls, stats.seconds, stats.error = 5, 4, 0.5, 0.01
    stats.computed = torch.tensor(1.0)  # as on an accelerator
    stats.fallbacks["dense step"], stats.biased_calls = 1, 2
    summary = summarize({"transformer": found})
    assert summary.layers[0] == LayerSummary("blocks.0.attn1", 5, 4, 0.25, 0.5, {"dense step": 1}, 0.01, 2)
    assert summary.layers[1] == LayerSummary("blocks.1.attn1", 0, 0, None, 0.0, {})
    assert (summary.families, summary.runs, summary.steps, summary.guidance) == (("wan",), 3, 5, None)
    assert summary.methods == (dit_attn.BlockSparse(density=0.3).to_dict(),)
    stats.fallbacks["dense step"] = 9
    assert summary.fallbacks == {"dense step": 1}  # a report does not change with the next run


def test_two_transformers_are_told_apart_and_one_that_did_not_run_counts_nothing() -> None:
    models, clock = [torch.nn.Module(), torch.nn.Module()], Clock()
    first, second = (session(model, clock) for model in models)
    for part in (first, second):
        part.layers[0].stats.calls = 5
    second._seen_run = 2
    summary = summarize({"transformer": first, "transformer_2": second})
    assert [layer.name for layer in summary.layers] == [
        "transformer.blocks.0.attn1", "transformer.blocks.1.attn1",
        "transformer_2.blocks.0.attn1", "transformer_2.blocks.1.attn1",
    ]  # fmt: skip
    assert summary.calls == 5


def test_before_the_first_run_there_are_no_steps() -> None:
    model = torch.nn.Module()
    found = session(model, Clock())
    found.clock.run = found.clock.step = found._seen_run = 0
    assert (summarize({"transformer": found}).runs, summarize({"transformer": found}).steps) == (0, 0)


# -- guidance that was dropped ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "scale", "embeds", "seen", "call", "warning"),
    [
        (WAN, 3.0, False, {"cond"}, {}, "guidance_scale 3 had no effect"),
        (WAN, 3.0, False, {"cond", "uncond"}, {}, None),
        (WAN, 1.0, False, {"cond"}, {}, None),
        (WAN, None, False, {"cond"}, {}, None),
        (WAN, 3.0, True, {"cond"}, {}, None),  # the scale is an input of the model
        (FLUX, None, False, {"cond"}, {"scale": 3.0}, "true_cfg_scale 3 had no effect"),
        (FLUX, None, False, {"cond"}, {"scale": 1.0}, None),
        (FLUX, None, False, {"cond"}, {"scale": 1.0, "embedded": 7.0}, "guidance_scale 7 had no effect"),
        (FLUX, None, True, {"cond"}, {"scale": 1.0, "embedded": 7.0}, None),
    ],
)
def test_a_scale_above_one_without_an_unconditional_branch_is_warned_of(
    family: Any, scale: float | None, embeds: bool, seen: set[str], call: dict[str, Any], warning: str | None
) -> None:
    model = torch.nn.Module()
    model.config = SimpleNamespace(guidance_embeds=embeds)
    found = session(model, Clock(), family)
    found.scale = call.get("scale") if scale is None else scale  # as the last call had it
    found.seen_branches, found.pipeline_call = seen, PipelineCall(running=True, **call)
    warnings = summarize({"transformer": found, "transformer_2": found}).warnings
    assert len(warnings) == (warning is not None)  # once for both transformers
    assert warning is None or warnings[0].startswith(warning)
    found._seen_run = 2
    assert summarize({"transformer": found}).warnings == ()


def test_guidance_that_was_asked_for_and_did_not_happen_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1"), "separate", 3.0)
    pipe()
    assert dit_attn.summary(pipe).warnings == ()
    pipe.guides = False  # as a pipeline that was given no negative prompt
    pipe()
    (warning,) = dit_attn.summary(pipe).warnings
    assert "guidance_scale 3 had no effect" in warning and warning in " ".join(str(dit_attn.summary(pipe)).split())


# -- what could not be known ------------------------------------------------------------------------------------------


def test_a_run_known_from_time_steps_alone_is_warned_of_with_the_remedy() -> None:
    model = torch.nn.Module()
    found = session(model, Clock())
    for source, warned in (("time steps", 1), ("cache_context", 0), ("pipeline call", 0), ("run_context", 0)):
        found.source = source
        summary = summarize({"transformer": found})
        assert summary.source == source and len(summary.warnings) == warned
        assert all("with dit_attn.run_context(transformer, step=, steps=)" in text for text in summary.warnings)
    found.source, found.methods = "time steps", ()
    assert summarize({"transformer": found}).warnings == ()  # nothing depends on it
    found._seen_run = 2
    assert summarize({"transformer": found}).source == ""


def warnings_of(found: Session) -> str:
    """What its part of a report would say."""
    return "\n".join(_unknown(found))


def test_calls_that_cannot_be_told_apart_are_warned_of_with_the_remedy() -> None:
    model = torch.nn.Module()
    found = session(model, Clock())
    found.source, found.branch_doubt = "pipeline call", "rows share their latents"
    assert summarize({"transformer": found}).warnings == ()  # no guidance to leave out
    found.guider = SimpleNamespace()  # type: ignore[assignment]
    assert "guidance was left out: rows share their latents" in warnings_of(found)
    found.doubt = "the branch cond came again in step 3"
    assert "the branch cond came again in step 3" in warnings_of(found) and "window=" in warnings_of(found)
    assert "left out" not in warnings_of(found)
