"""What methods with subjects must do on every family, on a tiny random model whose text has known pieces."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.attach.position_tables import position_table
from dit_attn.processors.attach.transformer_run import TransformerRun
from dit_attn.processors.core.call import AttentionCall
from dit_attn.processors.core.piece_maps import generated_span
from dit_attn.processors.core.row_weights import RowWeights
from tests._support.outputs import same
from tests._support.recorded_calls import reference, requests
from tests._support.reweighted import reweighted

LEFT, RIGHT = (0.0, 0.0, 0.4, 0.7), (0.5, 0.3, 1.0, 1.0)
SUBJECTS = ({"piece": "left", "box": list(LEFT)}, {"piece": "right", "box": list(RIGHT)})
PIECES = {"left": slice(0, 2), "right": slice(3, 5)}  # tokens of the text


def known_pieces(run: Any, call: AttentionCall, piece: str) -> torch.Tensor:
    """Where the pieces stand, as the pipeline would say: nowhere but in the last batch row."""
    out = torch.zeros(call.q.shape[0], call.k.shape[1], dtype=torch.bool)
    texts = [span.start for span in call.tokens.spans if span.kind == "text"] if call.tokens else []
    start = 0 if call.kind == "cross" else texts[0] if texts and call.kind == "self" else None
    if start is not None:
        out[-1, start + PIECES[piece].start : start + PIECES[piece].stop] = True
    return out


def inside(call: AttentionCall, box: tuple[float, ...]) -> list[int]:
    """Tokens of the sequence whose center is in a box."""
    assert call.tokens is not None
    span = next(span for span in call.tokens.spans if span.kind in ("video", "image"))
    assert span.grid is not None
    frames, height, width = span.grid
    return [
        span.start + (t * height + y) * width + x
        for t in range(frames)
        for y in range(height)
        for x in range(width)
        if box[0] < (x + 0.5) / width < box[2] and box[1] < (y + 0.5) / height < box[3]
    ]


def barred(call: AttentionCall, image: bool, value: float) -> torch.Tensor:
    """(B, 1, S, Sk) fp64 of what isolation adds, row by row."""
    bias = torch.zeros(call.q.shape[0], 1, call.q.shape[1], call.k.shape[1], dtype=torch.float64)
    for box, other, piece in ((LEFT, RIGHT, "right"), (RIGHT, LEFT, "left")):
        words = known_pieces(None, call, piece)[-1].nonzero().flatten().tolist()
        for row in inside(call, box):
            bias[-1, 0, row, words] = value
            if image and call.kind == "self":
                bias[:, 0, row, inside(call, other)] = value
    return bias


class SubjectsMixin:
    """Inherit, then say how the model and its inputs are made.

    Attributes:
        sockets, cross_sockets: layers with self or joint attention, and with cross attention.
        has_text: whether anything attends to a text.
    """

    sockets: int = 0
    cross_sockets: int = 0
    has_text: bool = True

    def call(self, model: torch.nn.Module, args: dict[str, Any]) -> Any:
        raise NotImplementedError

    def test_isolated_subjects_equal_the_definition(self, net: Any, args: Any, monkeypatch: Any) -> None:
        monkeypatch.setattr(TransformerRun, "find_piece", known_pieces)
        stock = self.call(net, args)
        image = self.sockets > 0
        sparse = [dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0)] if image else []
        dit_attn.enable(net, dit_attn.SubjectIsolation(subjects=SUBJECTS, isolate_image=image), *sparse)
        with requests() as seen:
            assert not same(stock, self.call(net, args))
        touched = 0
        for call, request, out in seen:
            bias = barred(call, image, -math.inf)
            touched += bool(bias.any())
            assert bool(request.biases) is bool(bias.any())
            rows = [row for box in (LEFT, RIGHT) for row in inside(call, box)]
            expected = reference(call, request, bias)[:, rows]
            torch.testing.assert_close(out.double()[:, rows], expected, atol=2e-5, rtol=1e-4)
        assert touched == self.sockets + self.cross_sockets
        dit_attn.enable(net, dit_attn.SubjectIsolation(subjects=SUBJECTS[:1]))
        assert same(stock, self.call(net, args))

    def test_subjects_are_moved_or_refused_and_those_that_stay_change_nothing(self, net: Any, args: Any) -> None:
        stock = self.call(net, args)
        moved = [{**one, "from": other["box"]} for one, other in zip(SUBJECTS, SUBJECTS[::-1])]
        table = position_table(net) is not None
        if not self.sockets or not (getattr(self, "rotary", False) or table):
            with pytest.raises(dit_attn.DitAttnError, match="no rotary tables" if self.sockets else "attention"):
                dit_attn.enable(net, dit_attn.SubjectReposition(subjects=moved))
        else:
            dit_attn.enable(net, dit_attn.SubjectReposition(subjects=moved))
            assert not same(stock, self.call(net, args))
            dit_attn.disable(net)
            assert same(stock, self.call(net, args)) and not (position_table(net) or net)._forward_hooks
        if not self.sockets:
            return
        still = [{**one, "from": one["box"]} for one in SUBJECTS]
        dit_attn.enable(net, dit_attn.SubjectReposition(subjects=still))
        assert same(stock, self.call(net, args))

    @pytest.mark.parametrize("mode", ["bias", "gain", "logit"])
    def test_rows_with_weights_equal_the_equation_of_the_mode(self, net: Any, args: Any, mode: str) -> None:
        stock = self.call(net, args)
        cells = torch.ones(1, 20, 20)
        cells[:, :14, :8] = 2.0  # the box LEFT
        columns = torch.zeros(1, 5, dtype=torch.bool)
        columns[:, PIECES["left"]] = True
        seen: list[Any] = []
        for given in (None, RowWeights(torch.ones(1, 20, 20), columns), RowWeights(cells, columns)):
            session = dit_attn.enable(net, dit_attn.AdaptiveReweighting(mode=mode, start=0, stop=9, w_max=2.5))
            session.given.update({"reweighting": given} if given is not None else {})
            with dit_attn.observing(net, lambda *done: seen.append(done), ("text",)):
                unchanged = given is None or given.weights is not cells or not self.has_text
                assert same(stock, self.call(net, args)) is unchanged
        touched = 0
        for call, request, out in seen:
            keys = known_pieces(None, call, "left")
            if not keys.any() or not (request.biases or request.key_gains):
                continue
            touched += 1
            conditioned = torch.tensor([branch == "cond" for branch in call.branches])
            rows, place = torch.ones(call.q.shape[:2], dtype=torch.float64), generated_span(call)
            weights = session.given["reweighting"].rows([0], call.tokens.grid)[0].double()
            rows[conditioned, place.start : place.stop] = weights
            expected = reweighted(call, request, mode, rows, keys[-1:] & conditioned[:, None])
            within = slice(place.start, place.stop)
            torch.testing.assert_close(out.double()[:, within], expected[:, within], atol=2e-5, rtol=1e-4)
        assert touched in (self.cross_sockets, self.sockets, self.sockets - 1) and bool(touched) is self.has_text

    def test_saas_measures_the_first_step_and_lifts_words_of_conditional_rows_in_the_next(
        self, net: Any, args: Any, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(TransformerRun, "find_piece", known_pieces)
        monkeypatch.setattr(TransformerRun, "find_prompts", lambda run, call: ("left, right",) * call.q.shape[0])
        stock = self.call(net, args)
        settings = {"stop": 1.0, "first_layer": 0.0, "min_quality": 0.0, "rival": "pieces"}
        session = dit_attn.enable(net, dit_attn.SaaS(strength=2.0, clamp=(0.1, 9.0), **settings))
        name, grows = session.family.timestep, session.family.time_grows
        small = 1 if float(args[name].max()) > 1.0 else 0.01
        later = {**args, name: args[name] + (small if grows else -small)}
        assert same(stock, self.call(net, args))
        with requests() as seen:
            self.call(net, later)
        assert len(seen) in (self.cross_sockets, self.sockets, self.sockets - 1)  # SD 3.5: one without text
        for call, request, out in seen:
            bias = request.bias(slice(0, call.q.shape[1]))
            assert bias is not None
            matrix = bias.q.double() @ bias.k.double().mT
            words = known_pieces(None, call, "left") | known_pieces(None, call, "right")
            rows = inside(call, (0.0, 0.0, 1.0, 1.0))
            assert matrix.any() and not (matrix * ~words[:, None, None]).any()
            expected = reference(call, request, matrix)[:, rows]
            torch.testing.assert_close(out.double()[:, rows], expected, atol=2e-5, rtol=1e-4)
