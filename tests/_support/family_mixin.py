"""The behaviours every family must show, on a tiny random model of its own class.

A family's test class inherits :class:`FamilyMixin` and says how its model and inputs are made; every test here then
runs for it. Sizes are chosen so that the sequence has at least 256 visual tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.pipelines.transformers import transformers_of
from dit_attn.processors.attach import attach, attention_processor
from dit_attn.processors.core.call import Request
from dit_attn.processors.core.positions import PositionMap
from dit_attn.processors.core.tokens import VISUAL
from dit_attn.processors.methods.re_ttention import MASKS
from tests._support.cross_mixin import CrossMixin, Observed, Scaled, check_observations, valid_rows
from tests._support.gated_heads import Gate, gated_among_keys
from tests._support.guidance_mixin import GuidedMixin
from tests._support.outputs import same
from tests._support.position_maps import Placed, Tables, along
from tests._support.recorded_calls import Seen, reference, requests, watching
from tests._support.rectified_reference import rectified
from tests._support.reshaped_reference import read_pairs, reshaped
from tests._support.sla_reference import sparse_linear
from tests._support.span_biases import SpanBiases, bias_matrix
from tests._support.two_streams import two_streams
from tests._support.window_masks import window_bias

SPARSE = dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0)
RECTIFIED = tuple(
    dit_attn.RectifiedSpaAttn(density=0.3, q_block=32, kv_block=32, dense_steps=0, compensation=name)
    for name in ("merge", "repo", "paper")
)


def _real(value: Any) -> bool:
    """Whether this is a tensor of real numbers, or a list of such."""
    return all(isinstance(item, torch.Tensor) and item.is_floating_point() for item in _listed(value))


def _moved(value: Any) -> Any:
    """A real tensor with other values, or a list of such."""
    return [item.flip(-1) for item in value] if isinstance(value, list) else value.flip(-1)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


class FamilyMixin(CrossMixin, GuidedMixin):
    """Inherit, then say how the model and its inputs are made.

    Attributes:
        kinds: kinds of the spans of the joint sequence, in order.
        grid: (T, H, W) visual tokens of :meth:`inputs`.
        text_args: forward arguments that change text tokens and nothing else in the first layer (joint models).
        sockets: number of layers that must be socketed.
        untouched: fragments of module paths that must keep their stock processor.
        probe: (t, y, x) of the token that is poked.
        refined: whether layers before the first joint one already mix the picture (then a poke moves all of it).
        no_pipeline: why no full run of a stock pipeline is tested.
        rotary: whether its layers get rotary tables.
        even_axes: axes of the grid whose tokens the model places at even distances.
        rotary_error: of the model's own tables, from computing large angles in fp32.
        joint: how the names of the layers begin whose sequence ``kinds`` is of; the first layer's, where all have one.
        run_order: branches of the runs of :meth:`pipeline`, in order, where they are not the family's usual ones.
    """

    kinds: tuple[str, ...]
    grid: tuple[int, int, int]
    text_args: tuple[str, ...] = ()
    sockets: int
    untouched: tuple[str, ...] = ()
    probe: tuple[int, int, int] = (0, 3, 5)
    refined: bool = False
    joint: str = ""
    no_pipeline: str = ""
    run_order: tuple[str, ...] = ()
    rotary: bool = True
    even_axes: tuple[int, ...] = (0, 1, 2)
    rotary_error: float = 5e-6

    @property
    def has_text(self) -> bool:
        """Whether anything attends to a text."""
        return bool(self.cross_sockets) or any(kind not in VISUAL for kind in self.kinds)

    def model(self) -> torch.nn.Module:
        """A tiny random transformer; the seed is set by the caller."""
        raise NotImplementedError

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of one forward call, drawn from torch's generator."""
        raise NotImplementedError

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        """A stock pipeline around :meth:`model`, and its call arguments with guidance on.

        ``num_inference_steps``, ``generator``, ``output_type`` and ``return_dict`` are added by the tests.
        """
        raise NotImplementedError

    def made(self) -> tuple[Any, dict[str, Any]]:
        """The same from a fixed seed and without progress bars; skips the test where no pipeline is run."""
        if self.no_pipeline:
            pytest.skip(self.no_pipeline)
        torch.manual_seed(0)
        pipe, kwargs = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        return pipe, kwargs

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        """Change the visual token at (t, y, x), in place. Default: 2 x 2 patches of (B, C, [T,] H, W) latents."""
        t, y, x = at
        latents = inputs["hidden_states"]
        height = latents.shape[-2] // self.grid[1]
        width = latents.shape[-1] // self.grid[2]
        region = (slice(y * height, (y + 1) * height), slice(x * width, (x + 1) * width))
        frame = latents[:, :, t] if latents.ndim == 5 else latents
        frame[(..., *region)] += 1.0

    # -- helpers -----------------------------------------------------------------------------------------------------

    # -- behaviours --------------------------------------------------------------------------------------------------

    def test_pass_through_is_bit_equal_and_disable_restores(self, net: Any, args: Any) -> None:
        stock = {name: m.processor for name, m in net.named_modules() if hasattr(m, "processor")}
        before = self.call(net, args)
        dit_attn.enable(net)
        assert same(before, self.call(net, args))
        assert dit_attn.summary(net).calls >= self.sockets
        dit_attn.disable(net)
        dit_attn.disable(net)
        assert {name: m.processor for name, m in net.named_modules() if hasattr(m, "processor")} == stock
        assert same(before, self.call(net, args))

    def test_density_one_is_bit_equal(self, net: Any, args: Any) -> None:
        before = self.call(net, args)
        dit_attn.enable(net, dit_attn.BlockSparse(density=1.0, q_block=32, kv_block=32, dense_steps=0))
        assert same(before, self.call(net, args))

    def test_a_masked_call_under_autocast_is_stock_or_sparse(self, net: Any, args: Any) -> None:
        if not any("mask" in name for name in args):
            pytest.skip("the model takes no mask")
        with torch.autocast("cpu", torch.bfloat16):
            before = self.call(net, args)
            dit_attn.enable(net)
            assert same(before, self.call(net, args))
            dit_attn.enable(net, SPARSE)
            self.call(net, args)
        assert dit_attn.summary(net).sparse_calls == self.sockets

    def test_only_the_declared_layers_are_socketed(self, net: Any) -> None:
        dit_attn.enable(net)
        processors = {name: getattr(module, "processor", None) for name, module in net.named_modules()}
        ours = [name for name, processor in processors.items() if attention_processor.is_wrapped(processor)]
        assert len(ours) == self.sockets
        assert not [name for name in ours if any(part in name for part in self.untouched)]

    def test_token_layout_names_the_right_tokens(self, net: Any, args: Any) -> None:
        dit_attn.enable(net)
        base = self._first_keys(net, args)
        assert base.tokens is not None
        assert tuple(span.kind for span in base.tokens.spans) == self.kinds
        assert base.tokens.grid == self.grid
        moved = copy.deepcopy(args)
        self.poke_token(moved, self.probe)
        t, y, x = self.probe
        picture = next(span for span in base.tokens.spans if span.kind in ("video", "image"))
        expected = picture.start + (t * self.grid[1] + y) * self.grid[2] + x
        changed = self._changed(base, self._first_keys(net, moved))
        if self.refined:
            outside = {i for span in base.tokens.spans if span.kind == "text" for i in range(span.start, span.stop)}
            assert expected in changed and not changed & outside and len(changed) >= (picture.length or 0)
        else:
            assert changed == {expected}
        for name in self.text_args:
            moved = copy.deepcopy(args)
            moved[name] = moved[name] + 1.0
            text = {i for span in base.tokens.spans if span.kind == "text" for i in range(span.start, span.stop)}
            changed = self._changed(base, self._first_keys(net, moved))
            assert changed and changed <= text

    def test_sparse_run_equals_the_reference_on_what_the_tap_saw(self, net: Any, args: Any) -> None:
        dense = self.call(net, args)
        dit_attn.enable(net, SPARSE)
        with requests() as seen:
            sparse = self.call(net, args)
        assert len(seen) == self.sockets
        for seen_call, request, out in seen:
            assert request.layout is not None and request.layout.density < 0.9
            rows = valid_rows(seen_call)
            torch.testing.assert_close(out.double()[rows], reference(seen_call, request)[rows], atol=2e-5, rtol=1e-4)
        assert not same(dense, sparse)
        summary = dit_attn.summary(net)
        assert summary.sparse_calls == self.sockets and summary.density is not None and summary.density < 1.0

    def test_another_scale_joins_a_sparse_run(self, net: Any, args: Any) -> None:
        dit_attn.enable(net, SPARSE, self.everywhere(Scaled))
        with requests() as seen:
            self.call(net, args)
        assert len(seen) == self.sockets
        for seen_call, request, out in seen:
            assert request.scale_factor == 0.75 and seen_call.scale is not None
            rows = valid_rows(seen_call)
            torch.testing.assert_close(out.double()[rows], reference(seen_call, request)[rows], atol=2e-5, rtol=1e-4)

    def test_statistics_of_a_sparse_run_are_those_of_its_layout(self, net: Any, args: Any) -> None:
        dit_attn.enable(net, SPARSE, Observed())
        Observed.seen.clear()
        self.call(net, args)
        assert all(request.layout is not None for _, request, _ in Observed.seen)
        check_observations(self.sockets)

    def test_windows_equal_their_definition_and_one_of_the_whole_grid_is_stock(self, net: Any, args: Any) -> None:
        stock = self.call(net, args)
        dit_attn.enable(net, dit_attn.InwardWindow(window=self.grid))
        assert same(stock, self.call(net, args))
        window = tuple((n + 1) // 2 for n in self.grid)
        dit_attn.enable(net, dit_attn.InwardWindow(window=window, snap="no", q_block=32, kv_block=16))
        with requests() as seen:
            self.call(net, args)
        if len([kind for kind in self.kinds if kind in VISUAL]) > 1:
            assert not seen
            return
        assert len(seen) == self.sockets
        for seen_call, _, out in seen:
            rows = valid_rows(seen_call)
            expected = reference(seen_call, Request(), window_bias(seen_call.tokens, window))
            torch.testing.assert_close(out.double()[rows], expected[rows], atol=2e-5, rtol=1e-4)

    def test_the_text_of_a_dense_twin_pass_replaces_that_of_windows(self, net: Any, args: Any) -> None:
        stock = self.call(net, args)
        dit_attn.enable(net, dit_attn.InwardWindow(window=self.grid, override="text"))
        assert same(stock, self.call(net, args))
        window = tuple((n + 1) // 2 for n in self.grid)
        settings = {"window": window, "snap": "no", "q_block": 32, "kv_block": 16, "interval": 1}
        dit_attn.enable(net, dit_attn.InwardWindow(**settings, override="text"))
        with two_streams(net) as seen:
            self.call(net, args)
        if len([kind for kind in self.kinds if kind in VISUAL]) > 1 or not self.has_text:
            assert not seen.replaced
            return
        seen.check(window)
        assert bool(seen.replaced) is ("text" in self.kinds or self.cross_sockets > 0)  # a model may take no text

    @pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
    def test_logit_biases_of_image_and_text_rows_equal_their_equation(self, net: Any, args: Any, sparse: bool) -> None:
        stock = self.call(net, args)
        dit_attn.enable(net, SpanBiases(), *[SPARSE] * sparse)
        with requests() as seen:
            biased = self.call(net, args)
        assert len(seen) == self.sockets
        for seen_call, request, out in seen:
            assert (request.layout is not None) is sparse
            rows = valid_rows(seen_call)
            expected = reference(seen_call, request, bias_matrix(seen_call))
            torch.testing.assert_close(out.double()[rows], expected[rows], atol=2e-5, rtol=1e-4)
        assert not same(stock, biased)
        layers = [layer.stats for layer in attach.session_of(net).layers]
        assert sum(stats.biased_calls for stats in layers) == self.sockets
        dit_attn.enable(net, SpanBiases(0.0))
        assert same(stock, self.call(net, args))

    def test_positions_are_moved_in_the_tables_of_the_model_or_refused(self, net: Any, args: Any) -> None:
        stock = self.call(net, args)
        if not self.rotary:
            with pytest.raises(dit_attn.DitAttnError, match=f"{type(net).__name__} gives .* no rotary tables"):
                dit_attn.enable(net, Placed())
            assert attach.session_of(net) is None
            return
        tables = Tables(net, args)
        before = tables.grid()
        assert tables.given(PositionMap(), PositionMap(scale=(3.0, 3.0, 3.0), region=slice(0))) is tables.given()
        for axis, size in enumerate(self.grid):
            if size == 1 or axis not in self.even_axes:
                continue
            shifted = tables.grid(PositionMap(offset=along(axis, 1, 0)))
            halved = tables.grid(PositionMap(scale=along(axis, 0.5, 1)))
            own = before.narrow(axis, 1, size - 1)
            torch.testing.assert_close(shifted.narrow(axis, 0, size - 1), own, atol=self.rotary_error, rtol=0)
            half = torch.arange((size + 1) // 2)
            found, own = halved.index_select(axis, 2 * half), before.index_select(axis, half)
            torch.testing.assert_close(found, own, atol=self.rotary_error, rtol=0)
            assert not torch.equal(shifted, before) and not torch.equal(halved, before)
        placed = Placed(PositionMap(scale=(1, 0.5, 0.5), region=slice(7, 99)))
        outputs = []
        for methods in ((placed,), (placed, SPARSE), (SPARSE,)):
            dit_attn.enable(net, *methods)
            outputs.append(self.call(net, args))
        assert not any(same(a, b) for a, b in itertools.combinations((stock, *outputs), 2))
        dit_attn.enable(net, Placed(PositionMap()))
        assert same(stock, self.call(net, args))

    @pytest.mark.parametrize("settings", RECTIFIED, ids=lambda settings: settings.compensation)
    def test_rectified_run_equals_its_equations(self, net: Any, args: Any, settings: dit_attn.RectifiedSpaAttn) -> None:
        dit_attn.enable(net, settings)
        with requests() as seen:
            self.call(net, args)
        assert len(seen) == self.sockets
        call, request, out = seen[-1]
        assert request.layout is not None and call.tokens is not None and call.tokens.visual_range is not None
        visual = slice(*call.tokens.visual_range)
        expected = rectified(call, settings, request.layout)
        torch.testing.assert_close(out[:, visual].double(), expected, atol=2e-5, rtol=1e-4)

    def test_sparse_linear_run_equals_its_equations(self, net: Any, args: Any) -> None:
        settings = dit_attn.SLA(density=0.3, negligible=0.2, q_block=32, kv_block=32)
        dit_attn.enable(net, settings)
        torch.manual_seed(2)
        with torch.no_grad():
            for name, value in net.named_parameters():
                if name.startswith("dit_attn."):
                    value.normal_(std=0.3)
        with requests() as seen:
            self.call(net, args)
        assert len(seen) == self.sockets
        call, request, out = seen[-1]
        assert request.compute_visual is not None
        learned = call.layer.learned[id(attach.session_of(net).methods[0])]
        expected = sparse_linear(call, settings, learned.weight.detach(), learned.bias.detach())
        torch.testing.assert_close(out[:, call.visual].double(), expected, atol=2e-5, rtol=1e-4)

    def test_untrained_routers_of_heads_change_nothing_and_trained_ones_do(self, net: Any, args: Any) -> None:
        if self.is_refused(net, dit_attn.MoH()):
            return
        stock = self.call(net, args)
        dit_attn.enable(net, dit_attn.MoH())
        for found, expected in zip(_tensors(self.call(net, args)), _tensors(stock), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        dit_attn.enable(net, dit_attn.MoH(top_k=1))
        assert not same(stock, self.call(net, args))

    def test_a_head_that_is_left_out_is_a_head_of_zeros(self, net: Any, args: Any) -> None:
        if self.is_refused(net, dit_attn.HeadDrop(heads="*:0")):
            return
        dit_attn.enable(net, Gate())
        with gated_among_keys():
            expected = _tensors(self.call(net, args))
        dit_attn.enable(net, dit_attn.HeadDrop(heads="*:0"))
        for found, other in zip(_tensors(self.call(net, args)), expected, strict=True):
            torch.testing.assert_close(found, other, atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize("mask", sorted(MASKS))
    def test_reshaped_run_equals_its_equations(self, net: Any, args: Any, mask: str) -> None:
        settings = dit_attn.ReTtention(density=0.2, mask=mask, q_block=32, kv_block=32, dense_steps=0, stagger=False)
        session = dit_attn.enable(net, settings)
        name = session.family.timestep
        later = dict(args)
        small = 1 if float(args[name].max()) > 1.0 else 0.01
        later[name] = args[name] + small if session.family.time_grows else args[name] - small
        with requests() as seen:
            self.call(net, args)
            layout = next(iter(seen[-1][0].layer.state.values())).layout
            self.call(net, later)
        refreshes, answers = seen[: self.sockets], seen[self.sockets :]
        assert len(refreshes) == len(answers) == self.sockets
        call, _, out = answers[-1]
        pairs = read_pairs(call, layout, MASKS[mask])
        assert call.tokens is not None and call.tokens.visual_range is not None
        visual = slice(*call.tokens.visual_range)
        expected = reshaped(refreshes[-1][0], call, pairs)
        torch.testing.assert_close(out[:, visual].double(), expected, atol=2e-5, rtol=1e-4)

    def test_state_survives_an_exception(self, net: Any, args: Any) -> None:
        dit_attn.enable(net, SPARSE)
        first = self.call(net, args)
        with pytest.raises((TypeError, RuntimeError, AttributeError, ValueError, IndexError)):
            net(**{**args, "hidden_states": None})
        assert same(first, self.call(net, args))

    def test_deepcopy_runs_alone_and_state_dict_is_unchanged(self, net: Any, args: Any) -> None:
        keys = set(net.state_dict())
        dit_attn.enable(net, SPARSE)
        assert set(net.state_dict()) == keys
        before = self.call(net, args)
        clone = copy.deepcopy(net)
        assert same(before, self.call(clone, args))
        assert attach.session_of(clone) is not attach.session_of(net)
        calls = dit_attn.summary(net).calls
        dit_attn.disable(clone)
        self.call(clone, args)
        assert dit_attn.summary(net).calls == calls

    def test_clock_and_branches_over_whole_pipeline_runs(self) -> None:
        pipe, kwargs = self.made()
        session = dit_attn.enable(pipe, SPARSE)
        first = self._run(pipe, kwargs, 3)
        calls = self._first_layer(first.calls)
        assert [call.step for call in calls] == self._steps(session, 3)
        expected = self._expected_branches(session, calls)
        assert [call.branches for call in calls] == expected
        assert session.clock.total == 3 and session.clock.run == 1
        assert calls[0].tokens is not None and tuple(span.kind for span in calls[0].tokens.spans) == self.kinds
        summary = dit_attn.summary(pipe)
        assert summary.sparse_calls == summary.calls == len(first.calls), summary.fallbacks
        assert (summary.source, session.doubt, session.branch_doubt) == ("pipeline call", None, None)
        again = self._run(pipe, kwargs, 2)
        assert session.clock.run == 2 and session.clock.total == 2
        assert [call.step for call in self._first_layer(again.calls)] == self._steps(session, 2)
        with pytest.raises(InterruptedError):
            self._run(pipe, kwargs, 3, stop_after=2)
        third = self._run(pipe, kwargs, 3)
        assert [call.step for call in self._first_layer(third.calls)] == self._steps(session, 3)
        assert [call.branches for call in self._first_layer(third.calls)] == expected
        assert same(first.output, third.output)

    def test_the_pipeline_that_runs_is_the_one_that_counts(self) -> None:
        pipe, kwargs = self.made()
        method = dataclasses.replace(SPARSE, dense_steps=0.5)
        dit_attn.enable(pipe, method)
        expected = self._run(pipe, kwargs, 2)
        request = copy.copy(pipe)  # one for every request, around the same transformer
        request.scheduler = copy.deepcopy(pipe.scheduler)
        for target in (pipe, pipe.transformer) if len(transformers_of(pipe)) == 1 else (pipe,):
            session = dit_attn.enable(target, method)
            found = self._run(request, kwargs, 2)
            assert session.pipe is request and session.clock.total == 2
            assert [call.step for call in found.calls] == [call.step for call in expected.calls]
            assert [call.branches for call in found.calls] == [call.branches for call in expected.calls]
            assert same(found.output, expected.output)

    def test_a_run_of_another_size_leaves_no_trace(self) -> None:
        pipe, kwargs = self.made()
        if kwargs.get("height") == kwargs.get("width"):
            pytest.skip("the picture is square here: turned round it is of the same size")
        turned = {**kwargs, "height": kwargs["width"], "width": kwargs["height"]}  # as many tokens, another grid
        dit_attn.enable(pipe, SPARSE)
        first, other, again = (self._run(pipe, arguments, 2) for arguments in (kwargs, turned, kwargs))
        grids = [{call.tokens.grid for call in run.calls if call.tokens} for run in (first, other, again)]
        ((t, h, w),) = grids[0]
        assert grids == [{(t, h, w)}, {(t, w, h)}, {(t, h, w)}] and h != w
        assert same(first.output, again.output)
        dit_attn.enable(pipe, SPARSE)  # a session that has seen nothing
        assert same(other.output, self._run(pipe, turned, 2).output)

    def test_the_negative_prompt_moves_what_is_called_uncond_and_nothing_else(self) -> None:
        pipe, kwargs = self.made()
        other = {name: _moved(value) for name, value in kwargs.items() if name.startswith("negative_") and _real(value)}
        if not other:
            pytest.skip("the pipeline takes no embeddings of a negative prompt")
        for parameter in pipe.transformer.parameters():  # zero-initialised gates would hide the text
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        dit_attn.enable(pipe)
        first, second = self._run(pipe, kwargs, 2).calls, self._run(pipe, {**kwargs, **other}, 2).calls
        assert len(first) == len(second)
        moved, still = set(), set()
        for a, b in zip(first, second, strict=True):
            assert (a.layer, a.step, a.branches) == (b.layer, b.step, b.branches)
            if a.step == 0:  # the latents of later steps carry both branches
                for row, branch in enumerate(a.branches):
                    (still if torch.equal(a.out[row], b.out[row]) else moved).add((a.layer, branch))
        assert {branch for _, branch in moved} == {"uncond"}, (moved, still)
        assert "cond" in {branch for _, branch in still}

    # -- internals ---------------------------------------------------------------------------------------------------

    def _run(self, pipe: Any, kwargs: dict[str, Any], steps: int, stop_after: int | None = None) -> Any:
        """One pipeline run with recorded calls; ``stop_after`` raises after that many transformer calls."""
        handle, count = None, itertools.count(1)
        if stop_after is not None:

            def stop(*_: Any) -> None:
                if next(count) >= stop_after:
                    raise InterruptedError

            handle = pipe.transformer.register_forward_hook(stop)
        try:
            with watching() as seen, torch.no_grad():
                output = pipe(
                    **copy.deepcopy(kwargs),
                    num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(0),
                    output_type="latent",
                    return_dict=False,
                )
        finally:
            if handle is not None:
                handle.remove()
        return SimpleNamespace(output=output[0], calls=seen)

    def _first_layer(self, calls: list[Seen]) -> list[Seen]:
        first = next(call.layer for call in calls if call.layer.startswith(self.joint))
        return [call for call in calls if call.layer == first]

    def _steps(self, session: Any, steps: int) -> list[int]:
        calls = len(self._order(session)) if session.cfg.style == "separate" else 1
        return [step for step in range(steps) for _ in range(calls)]

    def _order(self, session: Any) -> tuple[str, ...]:
        return self.run_order or session.cfg.order

    def _expected_branches(self, session: Any, calls: list[Seen]) -> list[tuple[str, ...]]:
        order, batch = self._order(session), calls[0].q.shape[0]
        if session.cfg.style == "batched":
            return [tuple(name for name in order for _ in range(batch // len(order)))] * len(calls)
        return [(order[i % len(order)],) * batch for i in range(len(calls))]

    def _first_keys(self, model: torch.nn.Module, args: dict[str, Any]) -> Seen:
        with watching() as seen:
            self.call(model, args)
        return next(item for item in seen if item.tokens is not None and item.layer.startswith(self.joint))

    @staticmethod
    def _changed(a: Seen, b: Seen) -> set[int]:
        difference = (a.k - b.k).abs().amax(dim=(0, 2, 3))
        return set(torch.nonzero(difference > 1e-6).flatten().tolist())
