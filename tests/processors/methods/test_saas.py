"""SaaS step by step: the factor and its rule, before and after the lift, the gate, the loop, reports, bad input."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import DitAttnError, SaaS
from dit_attn.processors.core.call import Request, SDPAArgs
from dit_attn.processors.core.prompt_pieces import split_prompt
from dit_attn.processors.core.region_maps import region_masks
from dit_attn.processors.core.tokens import EmbeddedImage, Span, TokenLayout, visual_span
from tests._support.core_calls import Dispatched, host_run, stock_attention
from tests._support.prompted_pipelines import pipeline_of
from tests._support.recorded_calls import weights
from tests._support.released_saas import ReleasedSaaS, released_region, released_split
from tests.processors.attach.prompt_spans.prompted_cases import CASES

GRID = (1, 8, 9)
N, TEXT = 72, 12
LAYOUT = TokenLayout((Span("text", TEXT), visual_span("image", GRID)))
WITH_REFERENCE = TokenLayout((Span("text", TEXT), visual_span("image", GRID), visual_span("reference", (1, 5, 5))))
WORDS = {"red circle": [1, 2, 3], "blue cross": [5, 6]}
EVERY: dict[str, Any] = {"stop": 1.0, "first_layer": 0.0, "min_quality": 0.0, "clamp": None, "pieces": tuple(WORDS)}
STEPS = 6


class Run:
    """A run of some layers on fixed queries and keys, at as many steps as wanted."""

    def __init__(self, method: SaaS, layout: TokenLayout = LAYOUT, layers: int = 1) -> None:
        self.run, self.layer = host_run([method], layout, rows=2)
        seq_len = TEXT + N + (25 if layout is WITH_REFERENCE else 0)
        draw = torch.Generator().manual_seed(3)
        self.layers = []
        for number in range(layers):
            q, k, v = (torch.randn(2, seq_len, 4, 16, generator=draw, dtype=torch.float64) for _ in range(3))
            layer = self.run.add_layer(f"blocks.{number}") if number else self.layer
            self.layers.append((layer, SDPAArgs(q, k, v)))
        self.run.clock.total = STEPS
        self.run.clock.step = 0

        def find(call: Any, piece: str) -> torch.Tensor:
            out = torch.zeros(2, call.k.shape[1], dtype=torch.bool)
            out[:, WORDS[piece]] = True
            return out

        self.run.find_piece = find  # type: ignore[method-assign]
        self.run.find_prompts = lambda call: ("red circle, blue cross",) * 2  # type: ignore[method-assign]
        self.run.branches = lambda batch, first=0: ("uncond", "cond")  # type: ignore[method-assign]
        self.run.samples = lambda batch, first=0: (0, 0)  # type: ignore[method-assign]

    def steps(self, count: int = STEPS) -> list[Dispatched]:
        done = []
        for step in range(count):
            self.run.clock.step = step
            self.run.begin_call(2)
            done += [Dispatched(self.run, layer, args) for layer, args in self.layers]
        return done

    @property
    def traces(self) -> Any:
        return self.run.reports["saas"].traces


def test_the_rule_of_the_paper_step_by_step() -> None:
    """Outputs, regions and factors of two layers over a run are those of the published code's rule, in float64."""
    run = Run(SaaS(**EVERY, measure="post"), WITH_REFERENCE, layers=2)
    rows, image = slice(TEXT, TEXT + N), slice(TEXT + N, TEXT + N + 25)
    code = ReleasedSaaS(list(WORDS.values()), image, rows, GRID[1:])
    steps = run.steps()
    for step in range(STEPS):
        calls = steps[2 * step : 2 * step + 2]
        factors = code.factors or [1.0, 1.0]
        if step:
            applied = [[trace.wanted[step - 1], trace.factors[step - 1]] for trace in run.traces]
            assert applied == [[pytest.approx(factor, rel=1e-4)] * 2 for factor in factors]
            shares = [float(mask.float().mean()) for mask in code.masks]
            assert [trace.areas[step - 1] for trace in run.traces] == pytest.approx(shares, abs=1e-6)
        matrices = []
        for done in calls:
            assert done.call is not None
            matrices.append(weights(done.call, Request())[0][1])
        for done, matrix in zip(calls, code.step(matrices), strict=True):
            assert done.call is not None
            expected = torch.einsum("hqk,khd->qhd", matrix, done.call.v[1])
            torch.testing.assert_close(done.out[1], expected, atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(done.out[0], stock_attention(done.call)[0])
    assert min(code.factors) > 1.0


def test_the_strength_multiplies_the_ratio_of_the_paper() -> None:
    run = Run(SaaS(**EVERY, measure="post", strength=0.5), WITH_REFERENCE)
    code = ReleasedSaaS(list(WORDS.values()), slice(TEXT + N, TEXT + N + 25), slice(TEXT, TEXT + N), GRID[1:], 0.5)
    for done in run.steps(3):
        assert done.call is not None
        (matrix,) = code.step([weights(done.call, Request())[0][1]])
        expected = torch.einsum("hqk,khd->qhd", matrix, done.call.v[1])
        torch.testing.assert_close(done.out[1], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_regions_are_those_of_the_published_rule(seed: int) -> None:
    maps = torch.rand(2, N, generator=torch.Generator().manual_seed(seed)) ** 3
    expected = torch.stack([released_region(one, GRID[1:]) for one in maps])
    assert torch.equal(region_masks(maps, GRID), expected)


def test_the_split_of_the_published_code_on_tokens_is_that_on_characters() -> None:
    """The code counts tokens behind the first image; ``release`` counts characters. Both leave the same words out."""
    prompt = "<img><|image_1|></img>, make the circle red, and add a dog, also remove it"
    suffix = ["<|end|>", "", "<|assistant|>", "", "<|diffusion|>"]
    tokens = ["<img>", "image", "</img>", *re.findall(r"\w+|,", prompt.partition("</img>")[2]), *suffix]
    pieces = [" ".join(tokens[a:b]) for a, b in released_split(tokens, tokens.index("</img>") + 2, len(suffix))]
    assert pieces == ["make the circle red", "add a dog", "remove it"]
    assert [prompt[a:b] for a, b in split_prompt(prompt, "release")] == pieces


@pytest.mark.parametrize("number", [1, 2, 0])
def test_images_among_the_text_are_the_rival_where_they_stand_in_every_row(number: int) -> None:
    """OmniGen writes its input images into the instruction, behind padding that differs from row to row."""
    images = tuple(EmbeddedImage(*place) for place in ((0, 9, 11), (1, 7, 9), (1, 10, 12)))
    run = Run(SaaS(**EVERY, observe=True, rival="reference", reference=number), replace(LAYOUT, embedded=images))
    (done,) = run.steps(1)
    run.steps(2)
    assert done.call is not None
    matrix = weights(done.call, Request())[0][1].mean(0)[TEXT : TEXT + N]
    keys = {1: [7, 8], 2: [10, 11], 0: [7, 8, 10, 11]}[number]
    for trace, words in zip(run.traces, WORDS.values()):
        (mask,) = region_masks(matrix[:, words].sum(1)[None], GRID)
        assert trace.shares[0] == pytest.approx(float(matrix[mask][:, words].sum(1).mean()), abs=2e-6)
        assert trace.rivals[0] == pytest.approx(float(matrix[mask][:, keys].sum(1).mean()), abs=2e-6)


def test_measured_before_the_lift_the_factor_is_steady_and_after_it_swings() -> None:
    found = {}
    for measure in ("pre", "post"):
        run = Run(SaaS(**EVERY, measure=measure), WITH_REFERENCE)
        run.steps()
        found[measure] = torch.tensor(run.traces[0].factors).log()
    assert float(found["pre"].std()) < 1e-3 * float(found["pre"].mean())
    assert bool((found["post"][0::2][:2] > 3 * found["post"][1::2].abs()[:2]).all())


def test_without_a_reference_the_weaker_piece_is_lifted() -> None:
    run = Run(SaaS(**{**EVERY, "clamp": (1.0, 4.0)}))
    run.steps()
    ratios = [trace.ratio for trace in run.traces]
    assert min(ratios) < 1.0 < max(ratios)
    for trace in run.traces:
        assert all(f == pytest.approx(min(4.0, max(1.0, trace.ratio)), rel=0.02) for f in trace.factors)
    with pytest.raises(DitAttnError, match="rival is the reference, and this run has none"):
        Run(SaaS(**EVERY, rival="reference")).steps(1)


def test_the_closed_loop_holds_the_share_of_every_piece_at_its_target() -> None:
    run = Run(SaaS(**EVERY, target=0.2, gain=1.0))
    run.steps()
    for trace in run.traces:
        assert abs(trace.shares[0] - 0.2) > 0.01 and trace.shares[-1] == pytest.approx(0.2, abs=0.01)


def test_a_region_that_is_not_trusted_is_not_lifted_and_the_summary_says_so() -> None:
    run = Run(SaaS(**{**EVERY, "min_quality": 1.0}), WITH_REFERENCE)
    done = run.steps()
    held = [trace for trace in run.traces if trace.held_back]
    assert held and all(f == 1.0 for trace in held for f, q in zip(trace.factors, trace.quality) if q < 1.0)
    assert any("is not reliable (quality" in text for text in run.run.reports["saas"].warnings)
    assert done[0].stock_calls == 1


def test_a_piece_acts_in_the_regions_that_are_given_and_the_others_are_found() -> None:
    left, right = [0.0, 0.0, 0.5, 1.0], [0.75, 0.0, 1.0, 1.0]
    subjects = [{"piece": "red circle", "box": left}, {"piece": "red circle", "box": right}, {"piece": "blue cross"}]
    settings = {**EVERY, "pieces": (), "clamp": (3.0, 3.0), "min_quality": 1.0}
    run = Run(SaaS(**settings, subjects=tuple(subjects)), WITH_REFERENCE)
    run.steps(3)
    circle, cross = run.traces
    assert set(circle.quality) == {1.0} and set(circle.factors) == {3.0} and min(cross.quality) < 1.0
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[:, :, :4], inside[:, :, 7:] = True, True  # a token that is half covered is outside
    assert circle.areas == [pytest.approx(float(inside.float().mean()))] * 2
    alone = Run(SaaS(**settings, subjects=tuple(subjects[:2])), WITH_REFERENCE).steps(2)[1]
    stock = Run(SaaS(strength=0.0), WITH_REFERENCE).steps(2)[1]
    changed = (alone.out - stock.out)[1].abs().amax((-1, -2))[TEXT : TEXT + N] > 1e-12
    assert torch.equal(changed, inside.flatten())
    torch.testing.assert_close(alone.out[0], stock.out[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{"observe": True}, {"strength": 0.0}, {"stop": 0}, {"last_layer": 0}])
def test_nothing_to_lift_is_stock_attention(settings: dict[str, Any]) -> None:
    run = Run(SaaS(**{**EVERY, **settings}), WITH_REFERENCE)
    assert all(done.stock_calls == 1 and not done.request.biases for done in run.steps())
    report = run.run.reports.get("saas")
    assert (report is not None) is ("observe" in settings)
    if report is not None:
        assert not report.warnings and report.neglected and "its rival" in str(report) and "lifted" not in str(report)
        assert report.figures()["pieces"][0]["factor"] == 1.0


def test_measuring_ends_at_stop_and_the_last_factor_acts_a_step_later() -> None:
    run = Run(SaaS(**{**EVERY, "stop": 3}), WITH_REFERENCE)
    lifted = [bool(done.request.biases) for done in run.steps()]
    assert lifted == [False, True, True, True, False, False] and run.traces[0].steps == [0, 1, 2]


def test_a_run_without_steps_that_can_be_told_apart_is_left_alone() -> None:
    run = Run(SaaS(**EVERY), WITH_REFERENCE)
    run.layer.stateless = "the latents changed within step 0"
    assert run.steps(1)[0].request.declined == ["the latents changed within step 0"]


def test_a_run_of_a_pipeline_lifts_in_the_rows_with_the_prompt_and_sums_up() -> None:
    pipe, kwargs = pipeline_of(CASES["sd3"])
    settings = {**EVERY, "pieces": (), "clamp": (0.5, 8.0)}
    prompts = ["a red cube, and a ball", "a small house, a green tree and the sea"]
    dit_attn.enable(pipe, SaaS(**settings))
    pipe(**{**kwargs, "prompt": prompts}, num_inference_steps=3, output_type="latent")
    report = dit_attn.summary(pipe).reports["saas"]
    assert [(one.sample, one.piece) for one in report.traces] == [
        (0, "a red cube"), (0, "a ball"), (1, "a small house"), (1, "a green tree"), (1, "the sea"),
    ]  # fmt: skip
    assert all(one.steps == [0, 1] for one in report.traces) and report.applied
    text = str(dit_attn.summary(pipe))
    assert "'a green tree'" in text and "lifted" in text
    assert dit_attn.summary(pipe).to_dict()["reports"]["saas"]["traces"][0]["piece"] == "a red cube"
    dit_attn.disable(pipe)


def test_a_piece_that_is_asked_for_and_not_in_the_prompt_is_an_error() -> None:
    pipe, kwargs = pipeline_of(CASES["sd3"])
    dit_attn.enable(pipe, SaaS(**{**EVERY, "pieces": ("a yellow hat",)}))
    with pytest.raises(DitAttnError, match="the piece 'a yellow hat' is in no prompt"):
        pipe(**{**kwargs, "prompt": "a red cube"}, num_inference_steps=1, output_type="latent")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"clamp": (2.0, 1.0)}, "clamp must be two factors above 0"),
        ({"clamp": (0.0, 1.0)}, "clamp must be two factors above 0"),
        ({"threshold": 1.5}, "threshold must be otsu, or between"),
        ({"pieces": (" ",)}, "pieces must be words of the prompt"),
        ({"pieces": ("a",), "subjects": ({"piece": "a"},)}, "has pieces and subjects; give one of them"),
        ({"subjects": ({"piece": [0, 3]},)}, "a piece must be words of the prompt here"),
        ({"measure": "both"}, "unknown value of saas.measure"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(DitAttnError, match=problem):
        SaaS(**settings)
