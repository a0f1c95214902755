"""What a method may ask of the cross attention of every family, on a tiny random model of its own class."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch

import dit_attn
from dit_attn.processors.attach import attach, attention_processor, intercepted_call, key_cache
from dit_attn.processors.attach.families import family_of
from dit_attn.processors.core import dispatch
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.observation import Observation
from dit_attn.processors.methods.base import Method
from tests._support import gag_reference, nag_reference
from tests._support.outputs import same
from tests._support.recorded_calls import reference, requests, watching, weights
from tests._support.subjects_mixin import SubjectsMixin


@dataclass(frozen=True)
class TextBiases(Method):
    """Lift some text tokens for half of the rows, more so in the first sample, and bar others from a few rows."""

    sites: ClassVar[tuple[str, ...]] = ("cross",)

    value: float = 1.1

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add the biases."""
        for rows, keys, value in entries(call, self.value) if self.value else [(slice(None), slice(None), 0.0)]:
            request.add_span_bias(call, rows, keys, value)


def entries(call: AttentionCall, value: float) -> Iterator[tuple[Any, Any, Any]]:
    """Rows, keys and value of every bias."""
    assert call.kind == "cross" and call.tokens is not None
    batch, rows = call.q.shape[:2]
    lifts = torch.full((batch, 1), value)
    lifts[0] *= 2.0
    yield slice(0, rows // 2), slice(0, call.k.shape[1] // 2), lifts
    some = torch.zeros(batch, rows, dtype=torch.bool)
    some[-1, rows // 4 : rows // 3] = True
    yield some, slice(2, 3), -math.inf


def text_bias_matrix(call: AttentionCall, value: float = 1.1) -> torch.Tensor:
    """(B, 1, S, Sk) fp64."""
    batch, rows = call.q.shape[:2]
    matrix = torch.zeros(batch, 1, rows, call.k.shape[1], dtype=torch.float64)
    for chosen, keys, amount in entries(call, value):
        where = chosen
        if isinstance(chosen, slice):
            where = torch.zeros(batch, rows, dtype=torch.bool)
            where[:, chosen] = True
        matrix[:, 0, :, keys] += torch.where(where, torch.as_tensor(amount, dtype=torch.float64), 0.0)[..., None]
    return matrix


@dataclass(frozen=True)
class Scaled(Method):
    """Another softmax scale, by two requests."""

    factor: float = 0.5

    def request(self, call: AttentionCall, request: Request) -> None:
        """Multiply the scale."""
        request.multiply_scale(self.factor)
        request.multiply_scale(1.5 if self.factor != 1.0 else 1.0)


@dataclass(frozen=True)
class Outputs(Method):
    """Record the output of every call, then use what was recorded."""

    seen: ClassVar[list[torch.Tensor]] = []

    replay: bool = False

    def request(self, call: AttentionCall, request: Request) -> None:
        """Record, or replace."""
        if self.replay:
            request.replace_output(self.seen.pop(0))
        else:
            request.record_output(self.seen.append)


@dataclass(frozen=True)
class Observed(Method):
    """Observe every call, with biases of the text in cross attention."""

    seen: ClassVar[list[tuple[AttentionCall, Request, Observation]]] = []

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add a probe."""
        if call.kind == "cross":
            TextBiases().request(call, request)
        spans = (slice(0, 3), slice(2, call.k.shape[1] // 2))
        request.observe(lambda found: self.seen.append((call, request, found)), spans, (slice(5, 40), slice(None)))


def check_observations(count: int) -> None:
    """Compare what was observed of ``count`` calls with the formula."""
    assert len(Observed.seen) == count
    for call, request, found in Observed.seen:
        matrix, lse = weights(call, request, text_bias_matrix(call) if call.kind == "cross" else None)
        masses = torch.stack([matrix[..., :3].sum(-1), matrix[..., 2 : call.k.shape[1] // 2].sum(-1)], -1)
        regions = torch.stack([masses[:, :, 5:40].mean(2), masses.mean(2)], 2)
        torch.testing.assert_close(found.lse.double(), lse, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(found.row_mass.double(), masses, atol=5e-6, rtol=1e-4)
        torch.testing.assert_close(found.mass.double(), regions, atol=5e-6, rtol=1e-4)
    Observed.seen.clear()


class CrossMixin(SubjectsMixin):
    """Inherit, then say how the model and its inputs are made.

    Attributes:
        sockets: layers with self or joint attention that methods may apply to.
        cross_sockets: layers with cross attention to the text; 0 where the text is part of the sequence.
        cross_calls: kinds of the attention calls of each of them, in order.
        cross_keys: number of keys of each kind.
    """

    sockets: int = 0
    cross_sockets: int = 0
    cross_calls: tuple[str, ...] = ("cross",)
    cross_keys: Mapping[str, int] = MappingProxyType({"cross": 7})

    def model(self) -> torch.nn.Module:
        """A tiny random transformer; the seed is set by the caller."""
        raise NotImplementedError

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of one forward call, drawn from torch's generator."""
        raise NotImplementedError

    @pytest.fixture
    def net(self) -> torch.nn.Module:
        torch.manual_seed(0)
        model = self.model().eval()
        for parameter in model.parameters():  # zero-initialised gates would hide the attention
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        return model

    @pytest.fixture
    def args(self) -> dict[str, Any]:
        torch.manual_seed(1)
        return self.inputs()

    def call(self, model: torch.nn.Module, args: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(**copy.deepcopy(args), return_dict=False)

    def is_refused(self, net: Any, method: Method) -> bool:
        """Whether the family refuses a method; ``enable`` says so."""
        why = family_of(net, ()).refused_methods.get(method.slug)
        if why is not None:
            with pytest.raises(dit_attn.DitAttnError, match=f"{method.slug} cannot be enabled on .*: {why}"):
                dit_attn.enable(net, method)
        return why is not None

    def has_cross_attention(self, net: Any) -> bool:
        """Whether the family has cross attention; where it has none, a method that wants it is refused."""
        if not self.cross_sockets:
            with pytest.raises(dit_attn.DitAttnError, match=f"TextBiases needs .*{type(net).__name__} has"):
                dit_attn.enable(net, TextBiases())
            assert not any(attention_processor.is_wrapped(getattr(m, "processor", None)) for m in net.modules())
        return self.cross_sockets > 0

    def everywhere(self, kind: type[Method], *settings: Any) -> Method:
        """A method that applies to all attention calls of the family."""
        sites = ("self",) * bool(self.sockets) + ("cross", "image") * bool(self.cross_sockets)
        return type(kind.__name__, (kind,), {"sites": sites})(*settings)

    # -- behaviours --------------------------------------------------------------------------------------------------

    def test_biases_of_cross_attention_equal_their_equation(self, net: Any, args: Any) -> None:
        if not self.has_cross_attention(net):
            return
        stock = self.call(net, args)
        session = dit_attn.enable(net, TextBiases())
        with requests() as seen:
            biased = self.call(net, args)
        assert len(seen) == self.cross_sockets
        assert {call.layer.index for call, _, _ in seen} == set(range(self.cross_sockets))
        for seen_call, request, out in seen:
            assert (seen_call.kind, seen_call.layer_count) == ("cross", self.cross_sockets)
            expected = reference(seen_call, request, text_bias_matrix(seen_call))
            torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-4)
        assert not same(stock, biased)
        assert all(layer.calls == self.cross_calls and layer.kind == "cross" for layer in session.layers)
        summary = dit_attn.summary(net)
        assert sum(layer.biased_calls for layer in summary.cross_layers) == self.cross_sockets
        assert not summary.layers and summary.calls == 0
        dit_attn.enable(net, TextBiases(0.0))
        assert same(stock, self.call(net, args))

    def test_an_observer_sees_the_cross_attention_it_asks_for_and_leaves_no_trace(self, net: Any, args: Any) -> None:
        if not self.has_cross_attention(net):
            return
        stock, seen = self.call(net, args), []
        processors = {name: module.processor for name, module in net.named_modules() if hasattr(module, "processor")}
        with dit_attn.observing(net, lambda call, request, out: seen.append((call, out)), ("cross", "image")):
            assert same(stock, self.call(net, args))
        assert [call.kind for call, _ in seen] == list(self.cross_calls) * self.cross_sockets
        for call, out in seen:
            assert call.k.shape[1] == self.cross_keys[call.kind] and call.tokens is not None
            torch.testing.assert_close(out.double(), reference(call, Request()), atol=2e-5, rtol=1e-4)
        assert {name: m.processor for name, m in net.named_modules() if hasattr(m, "processor")} == processors

    def test_attention_to_the_text_extrapolated_from_dense_to_sparse_equals_its_definition(
        self, net: Any, args: Any
    ) -> None:
        stock, method = self.call(net, args), dit_attn.GAG()
        dit_attn.enable(net, method)
        seen: list[tuple[Any, torch.Tensor]] = []
        with dit_attn.observing(net, lambda call, request, out: seen.append((call, out)), ("text",)):
            assert same(stock, self.call(net, args)) is not self.has_text
        touched = 0
        for call, out in seen:
            spans = [span for span in call.tokens.spans if span.kind == "text"] if call.kind == "self" else []
            if call.kind == "self" and not spans:
                continue
            places = [torch.arange(span.start, span.stop) for span in spans]
            text = torch.cat(places) if places else slice(0, call.k.shape[1])
            rows = call.visual if spans else slice(None)
            chosen = [row for row, branch in enumerate(call.branches) if branch == "cond"]
            expected = gag_reference.guided(call, text, method)[chosen][:, rows]
            torch.testing.assert_close(out.double()[chosen][:, rows], expected, atol=1e-4, rtol=1e-3)
            touched += 1
        assert bool(touched) is self.has_text
        dit_attn.enable(net, dit_attn.GAG(strength=0.0))
        assert same(stock, self.call(net, args))

    def test_attention_to_the_text_moved_away_from_a_negative_one_equals_its_definition(
        self, net: Any, args: Any
    ) -> None:
        if self.is_refused(net, dit_attn.NAG()):
            return
        if key_cache.is_used(args):
            dit_attn.enable(net, dit_attn.NAG()).given["nag"] = nag_reference.other_text(args)
            with pytest.raises(dit_attn.DitAttnError, match="attends to keys of an earlier step"):
                self.call(net, args)
            return
        stock, method = self.call(net, args), dit_attn.NAG()
        dit_attn.enable(net, method).given["nag"] = nag_reference.other_text(args)
        seen: list[tuple[Any, torch.Tensor]] = []
        with dit_attn.observing(net, lambda call, request, out: seen.append((call, out)), ("text",)):
            assert not same(stock, self.call(net, args))
        seen = [(call, out) for call, out in seen if call.attends_to_text]
        assert seen
        for call, out in seen:
            expected = nag_reference.guided(call, reference(call, Request()), method)
            image = nag_reference.image_rows(call)
            pairs = nag_reference.pairs(call)
            assert len(pairs) == call.branches.count("cond") > 0
            for plus, minus in pairs:
                assert torch.equal(call.q[plus, image], call.q[minus, image])
                assert call.kind == "cross" or torch.equal(call.k[plus, image], call.k[minus, image])
                rows = (torch.tensor([plus, minus]), slice(None) if call.kind == "cross" else call.visual)
                torch.testing.assert_close(out.double()[rows], expected[rows], atol=5e-5, rtol=1e-3)
        dit_attn.enable(net, dit_attn.NAG(scale=0.0))
        assert same(stock, self.call(net, args))

    def test_another_scale_of_stock_attention_equals_its_equation(self, net: Any, args: Any) -> None:
        stock = self.call(net, args)
        dit_attn.enable(net, self.everywhere(Scaled))
        with watching() as seen:
            scaled = self.call(net, args)
        assert len(seen) >= self.sockets + self.cross_sockets and not same(stock, scaled)
        for item in seen:
            factor = 0.75 * (item.q.shape[-1] ** -0.5 if item.scale is None else item.scale)
            rows = valid_rows(item)
            expected = reference(replace(item, scale=factor), Request())
            torch.testing.assert_close(item.out.double()[rows], expected[rows], atol=2e-5, rtol=1e-4)
        layers = attach.session_of(net).layers  # type: ignore[union-attr]
        assert all(layer.stats.scaled_calls == layer.stats.calls > 0 and not layer.stats.fallbacks for layer in layers)
        dit_attn.enable(net, self.everywhere(Scaled, 1.0))
        assert same(stock, self.call(net, args))

    def test_recorded_outputs_put_back_give_the_stock_run_without_any_attention(self, net: Any, args: Any) -> None:
        stock = self.call(net, args)
        Outputs.seen.clear()
        dit_attn.enable(net, self.everywhere(Outputs))
        assert same(stock, self.call(net, args))
        dit_attn.enable(net, self.everywhere(Outputs, True))

        backend = intercepted_call._stock_backend

        def refuse(*given: Any) -> Any:
            if len(given) == 5 and dispatch.is_among_keys(given[0], given[1], given[4]):
                return backend(*given)
            raise AssertionError("stock attention was computed")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(intercepted_call, "stock_torch", refuse)
            patch.setattr(attention_processor, "stock_torch", refuse)
            patch.setattr(intercepted_call, "_stock_backend", refuse)
            assert same(stock, self.call(net, args))
        layers = attach.session_of(net).layers  # type: ignore[union-attr]
        assert not Outputs.seen and len(layers) == self.sockets + self.cross_sockets
        assert all(layer.stats.replaced_calls == layer.stats.calls > 0 for layer in layers)

    def test_statistics_of_attention_equal_their_equation(self, net: Any, args: Any) -> None:
        stock = self.call(net, args)
        Observed.seen.clear()
        dit_attn.enable(net, self.everywhere(Observed))
        observed = self.call(net, args)
        assert same(stock, observed) is (not self.cross_sockets)  # cross attention is biased
        check_observations(self.sockets + self.cross_sockets * len(self.cross_calls))


def valid_rows(call: Any) -> tuple[Any, ...]:
    """Rows whose result means something: a model's padded rows hold whatever its mask leaves."""
    if call.tokens is not None and call.tokens.keys_alone and call.q.shape[1] == call.k.shape[1]:
        return slice(None), torch.cat([torch.arange(*run) for run in call.tokens.queries])  # nobody gets the others
    mask = call.mask
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[2] == 1:
        return (slice(None),)
    return torch.nonzero(mask.any(-1)[:, 0], as_tuple=True)
