"""Positions that methods ask for reach every attention processor, on every path, and leave nothing behind."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dit_attn
from dit_attn.processors.attach import attach, rotary
from dit_attn.processors.attach.summary_parts import PositionsSummary
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.positions import PositionMap, PositionSite
from dit_attn.processors.core.sequence_parallel import Exchange
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from dit_attn.processors.methods.base import Method
from tests._support.compose import SPARSE, forward, pipeline_run, same, tiny, tiny_pipeline
from tests._support.family_mixin import FamilyMixin
from tests._support.position_maps import Placed, Tables
from tests.families.test_allegro import TestAllegro as AllegroCase
from tests.families.test_anyflow import TestAnyFlow as AnyFlowCase
from tests.families.test_ernie_image import TestErnieImage as ErnieImageCase
from tests.families.test_hidream import TestHiDream as HiDreamCase
from tests.families.test_hunyuan_dit import TestHunyuanDiT as HunyuanDiTCase
from tests.families.test_ltx_2 import TestLtx2 as Ltx2Case
from tests.families.test_mochi import TestMochi as MochiCase
from tests.families.test_qwen_image import TestQwenImage as QwenImageCase

HALF = PositionMap(scale=(1, 0.5, 0.5))


@dataclass(frozen=True)
class Asked(Method):
    """Calls a function for its positions."""

    function: Any = None

    def __post_init__(self) -> None:
        """Nothing to check."""

    def request(self, call: AttentionCall, request: Request) -> None:
        """Nothing."""

    def positions(self, site: PositionSite) -> PositionMap | tuple[PositionMap, ...] | None:
        """What the function returns."""
        return self.function(site)


def built(family: FamilyMixin) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A tiny random transformer without zero gates, and the arguments of one forward call."""
    torch.manual_seed(0)
    model = family.model().eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    torch.manual_seed(1)
    return model, family.inputs()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the tables that were measured, in turn."""
    rows: list[int] = []
    stock = rotary.measure_grid

    def counted(cos: torch.Tensor, *args: Any) -> Any:
        rows.append(len(cos))
        return stock(cos, *args)

    monkeypatch.setattr(rotary, "measure_grid", counted)
    return rows


# -- the model's own way of moving tokens -----------------------------------------------------------------------------


def test_flux_gives_what_it_gives_for_the_moved_ids() -> None:
    model, args = tiny("flux")
    ids = args["img_ids"].clone()
    ids[:, 1:] *= 0.5
    ids[40:60, 2] += 3.25
    expected = forward(model, args, img_ids=ids)
    stock = forward(model, args)
    dit_attn.enable(model, Placed((HALF, PositionMap(offset=(0, 0, 3.25), region=slice(40, 60)))))
    found = forward(model, args)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, stock, atol=1e-3)
    dit_attn.disable(model)
    assert same(stock, forward(model, args))


def test_a_reference_of_flux_is_moved_into_the_place_of_a_region() -> None:
    from tests.families.test_flux import TestFluxKontext as KontextCase

    model, args = built(KontextCase())
    ids = args["img_ids"].clone()
    ids[288:, 1] = (ids[288:, 1] + 0.5) * 2 - 0.5 + 3
    ids[288:, 2] = (ids[288:, 2] + 0.5) * 0.5 - 0.5 + 5
    expected = forward(model, args, img_ids=ids)
    placed = PositionMap(scale=(1, 2, 0.5), origin=(0, -0.5, -0.5), offset=(0, 3, 5), region=slice(288, None))
    dit_attn.enable(model, Placed(placed))
    torch.testing.assert_close(forward(model, args), expected, atol=2e-5, rtol=1e-4)


def ltx_coordinates(first: float) -> torch.Tensor:
    """(1, 3, S) frames, rows and columns, in seconds and pixels."""
    t, h, w = torch.meshgrid(torch.arange(4.0), torch.arange(8.0), torch.arange(10.0), indexing="ij")
    t = torch.where(t > 0, t - 1 + first, t)
    return torch.stack([t * 8 / 25, h * 32, w * 32]).flatten(1)[None]


@pytest.mark.parametrize("first", [1.0, 0.125])
def test_ltx_gives_what_it_gives_for_the_moved_coordinates(first: float) -> None:
    model, args = tiny("ltx")
    args = {**args, "num_frames": None, "height": None, "width": None}
    coords = ltx_coordinates(first).repeat(2, 1, 1)
    scales = torch.tensor([0.75, 0.5, 0.6])
    expected = forward(model, args, video_coords=coords * scales[:, None])
    dit_attn.enable(model, Placed(PositionMap(scale=tuple(scales.tolist()))))
    found = forward(model, args, video_coords=coords)
    dit_attn.disable(model)
    stock = forward(model, args, video_coords=coords)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(stock, expected, atol=2e-3)


def test_ltx_2_moves_time_from_an_uneven_first_step() -> None:
    model: Any
    model, args = built(Ltx2Case())
    coords = model.rope.prepare_video_coords(1, 4, 8, 10, torch.device("cpu"), fps=25.0)
    tables = Tables(model, {**args, "video_coords": coords})
    middle = coords.float().mean(-1, keepdim=True)
    start = middle[:, :, :1]
    scaled = (start + torch.tensor([0.5, 0.75, 0.5])[:, None, None] * (middle - start)).expand_as(coords)
    cos, sin = model.rope(scaled)
    found = tables.given(PositionMap(scale=(0.5, 0.75, 0.5)))
    for a, b in zip(found, (cos, sin)):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_mochi_turns_by_its_learned_frequencies() -> None:
    model: Any
    model, args = built(MochiCase())
    torch.nn.init.normal_(model.pos_frequencies, std=2.0)  # far beyond half a turn per token
    tables = Tables(model, args)
    positions = model.rope._get_positions(4, 8, 10, dtype=torch.float64)
    spacing = torch.tensor([1.0, model.rope.target_area / 80, model.rope.target_area / 80]).double()
    spacing[1:] = spacing[1:].sqrt()
    positions = positions + spacing * torch.tensor([0.25, -1.5, 0.4])
    angle = torch.einsum("nd,dhf->nhf", positions, model.pos_frequencies.double())
    cos, sin = tables.given(PositionMap(offset=(0.25, -1.5, 0.4)))
    torch.testing.assert_close(cos.double(), angle.cos(), atol=2e-4, rtol=0)
    torch.testing.assert_close(sin.double(), angle.sin(), atol=2e-4, rtol=0)


def test_cogview_4_spreads_its_grid_over_many_positions() -> None:
    from diffusers.models.transformers.transformer_cogview4 import CogView4RotaryPosEmbed

    from dit_attn.processors.core.positions import displacement
    from dit_attn.processors.core.rotary import measure_grid, turn_tables

    rope = CogView4RotaryPosEmbed(32, 2, (256, 256))
    cos, sin = rope(torch.zeros(1, 4, 32, 36))
    tokens = TokenLayout((visual_span("image", (1, 16, 18)),)).resolve(288)
    assert tokens is not None
    grid = measure_grid(cos, sin, tokens)
    moved = turn_tables(cos, sin, grid, displacement([HALF], grid.coordinates))
    angles = []
    for axis, size in enumerate((16, 18)):
        positions = 0.5 * (torch.arange(size) * 256 // size).double()
        angle = positions[:, None] * 1e4 ** -(torch.arange(8).double() / 8)
        angles.append((angle[:, None] if axis == 0 else angle[None]).expand(16, 18, 8))
    angle = torch.cat(angles, -1).repeat(1, 1, 2).flatten(0, 1)
    torch.testing.assert_close(moved[0].double(), angle.cos(), atol=5e-5, rtol=0)
    torch.testing.assert_close(moved[1].double(), angle.sin(), atol=5e-5, rtol=0)


# -- when and how often ------------------------------------------------------------------------------------------------


def test_a_table_is_moved_once_for_all_layers_and_freed_after(measured: list[int]) -> None:
    model, args = tiny("wan")
    maps = [HALF]
    dit_attn.enable(model, Placed(maps))
    session = attach.session_of(model)
    assert session is not None
    for count, item in ((1, HALF), (2, PositionMap(offset=(0, 1, 0), region=slice(0)))):
        maps[:] = [item]
        forward(model, args)
        assert measured == [320] * count
        gc.collect()
        assert len(session.moved_tables) == 0


def test_tables_that_the_caller_keeps_are_moved_once_and_again_when_they_or_the_map_change(measured: list[int]) -> None:
    model, args = tiny("cogvideox")
    scale = [0.5]
    dit_attn.enable(model, Asked(lambda site: PositionMap(scale=(1, scale[0], 1))))

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(**args, return_dict=False)[0]

    first = run()
    assert same(first, run()) and len(measured) == 1
    scale[0] = 0.25
    other = run()
    assert not same(first, other) and len(measured) == 2
    scale[0] = 0.5
    assert same(first, run()) and len(measured) == 2
    for value in torch.linspace(0.6, 1.5, 9).tolist():
        scale[0] = value
        run()
    (kept,) = attach.session_of(model).moved_tables.values()  # type: ignore[union-attr]
    assert len(kept) == 4
    scale[0] = 0.25
    assert same(other, run())
    args["image_rotary_emb"][1].neg_()
    assert not same(other, run())


def test_a_table_is_moved_again_for_another_layout_and_other_sines(measured: list[int]) -> None:
    tables = Tables(*tiny("cogvideox"))
    session: Any = tables.session
    tables.maps.append(HALF)
    cos, sin = (table.clone() for table in tables.kwargs["image_rotary_emb"])  # none was changed in place
    first = rotary._move(session, tables.layer, [cos, sin], "real")
    assert rotary._move(session, tables.layer, [cos, sin], "real") is first and len(measured) == 1
    other = rotary._move(session, tables.layer, [cos, -sin], "real")
    assert not torch.equal(first[1], other[1]) and len(measured) == 2
    session.set_layout(TokenLayout((visual_span("video", (3, 10, 12)), Span("text", None))))
    rotary._move(session, tables.layer, [cos, sin], "real")
    assert len(measured) == 3
    session.drop_state()
    assert not session.moved_tables


def test_layers_steps_and_branches_may_differ() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    sites: list[tuple[int, int, tuple[str, ...]]] = []

    def positions(site: PositionSite) -> PositionMap | None:
        assert site.layer_count == 2 and site.num_tokens == sum(span.length or 0 for span in site.visual)
        assert site.grid is not None
        sites.append((site.clock.step, site.layer.index, site.branches))
        return PositionMap(offset=(0, 0, 2), region=slice(0, 9)) if site.layer.index else None

    stock = pipeline_run(pipe, kwargs, 2)
    dit_attn.enable(pipe, Asked(positions))
    assert not same(stock, pipeline_run(pipe, kwargs, 2))
    branches = (("cond",), ("uncond",))
    assert sites == [(step, layer, branch) for step in (0, 1) for branch in branches for layer in (0, 1)]
    assert dit_attn.summary(pipe).positions == PositionsSummary(2, 1, ("w +2 in a region",))
    dit_attn.disable(pipe)
    assert same(stock, pipeline_run(pipe, kwargs, 2))


def test_maps_of_several_methods_are_applied_in_the_order_of_the_methods() -> None:
    model, args = tiny("flux")
    shift, halve = PositionMap(offset=(0, 0, 4)), HALF
    outputs = []
    for methods in (
        (Placed(shift), Placed(halve)),
        (Placed(PositionMap(scale=(1, 0.5, 0.5), offset=(0, 0, 2))),),
        (Placed(halve), Placed(shift)),
        (Placed((halve, shift)), SPARSE),
        (Placed((halve, shift)),),
    ):
        dit_attn.enable(model, *methods)
        outputs.append(forward(model, args))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
    assert same(outputs[2], outputs[4]) and not same(outputs[3], outputs[4])


def test_the_perturbed_pass_has_the_same_positions() -> None:
    model, args = tiny("flux")
    guidance = dit_attn.SoftPAG(heads="1:0", scale=2.0, start=0.0, stop=1.0)
    ids = args["img_ids"].clone()
    ids[:, 1:] *= 0.5
    dit_attn.enable(model, guidance)
    expected = forward(model, args, img_ids=ids)
    dit_attn.enable(model, guidance, Placed(HALF))
    found = forward(model, args)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-3)
    dit_attn.enable(model, Placed(HALF))
    assert not torch.allclose(forward(model, args), found, atol=1e-4)


def test_gradients_are_those_of_the_moved_ids_with_and_without_checkpointing() -> None:
    model: Any
    model, args = tiny("flux")
    ids = args["img_ids"].clone()
    ids[:, 1:] *= 0.5

    def gradient(**changes: Any) -> torch.Tensor:
        latents = args["hidden_states"].clone().requires_grad_()
        model(**{**args, **changes, "hidden_states": latents}, return_dict=False)[0].square().sum().backward()
        assert latents.grad is not None
        return latents.grad

    expected = gradient(img_ids=ids)
    dit_attn.enable(model, Placed(HALF))
    found = gradient()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    model.train()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), found, atol=1e-6, rtol=1e-5)


def test_a_copied_model_moves_its_own_tables() -> None:
    model, args = tiny("flux")
    dit_attn.enable(model, Placed(HALF))
    expected = forward(model, args)
    clone = copy.deepcopy(model)
    dit_attn.disable(model)
    assert same(expected, forward(clone, args))


# -- torch.compile -----------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[], FamilyMixin]] = {
    "pair": QwenImageCase,
    "matrix": HiDreamCase,
    "axes": AllegroCase,
    "angles": ErnieImageCase,
    "shared": AnyFlowCase,
}


@pytest.fixture
def counter() -> Iterator[Any]:
    """A backend that counts graphs and runs them exactly."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def test_a_compiled_model_follows_maps_that_change_without_compiling_again(counter: Any) -> None:
    model, args = tiny("wan")
    scale = [1.0]
    dit_attn.enable(model, Asked(lambda site: PositionMap(scale=(1, scale[0], 1))))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs, outputs = [], []
    for value in (1.0, 0.5, 0.75, 1.0):
        scale[0] = value
        outputs.append(forward(compiled, args))
        graphs.append(counter.frame_count)
        assert same(outputs[-1], forward(model, args))
    assert same(outputs[0], outputs[3]) and not same(outputs[0], outputs[1]) and not same(outputs[1], outputs[2])
    assert len(set(graphs)) == 1


@pytest.mark.parametrize("form", FORMS)
def test_tables_of_every_form_are_moved_in_one_graph(counter: Any, form: str) -> None:
    tables = Tables(*built(FORMS[form]()))
    given = tables.given()
    assert rotary._flatten(given)[0] == form
    ((name, _),) = tables.parameters
    layer, session = tables.layer, tables.session

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(value: Any) -> Any:
        return rotary.moved_arguments(session, layer, ((name, 9),), (), {name: value})[1][name]

    for maps in ((HALF,), (PositionMap(offset=(0, 1, 1)),), ()):
        expected = rotary._per_token(rotary._flatten(tables.given(*maps))[1], form)
        found = rotary._flatten(compiled(given))[1]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), maps
    assert counter.frame_count == 1


# -- what cannot be done is said ---------------------------------------------------------------------------------------


def test_methods_that_move_nothing_ask_nothing_of_the_model() -> None:
    model, args = tiny("pixart")
    stock = forward(model, args)
    dit_attn.enable(model, SPARSE)
    with pytest.raises(dit_attn.DitAttnError, match=r"PixArt.* gives AttnProcessor2_0 no rotary tables: its positions"):
        dit_attn.enable(model, Placed())
    dit_attn.disable(model)
    assert same(stock, forward(model, args))


def test_a_call_without_tables_is_refused_where_positions_are_asked_for() -> None:
    model, args = tiny("cogvideox")
    dit_attn.enable(model, Asked(lambda site: None))
    forward(model, args, image_rotary_emb=None)
    dit_attn.enable(model, Placed(HALF))
    with pytest.raises(dit_attn.DitAttnError, match=r"blocks\.0\.attn1 was given no rotary tables in this call"):
        forward(model, args, image_rotary_emb=None)


def test_an_unknown_form_of_tables_is_refused() -> None:
    model, args = tiny("cogvideox")
    dit_attn.enable(model, Placed(HALF))
    with pytest.raises(dit_attn.DitAttnError, match="the rotary tables of this model have an unknown form"):
        forward(model, args, image_rotary_emb=torch.rand(360, 16))


def test_an_unknown_layout_is_refused_with_its_reason() -> None:
    model, _ = tiny("flux")
    dit_attn.enable(model, Placed(HALF))
    session: Any = attach.session_of(model)
    tables = [torch.rand(298, 16), torch.rand(298, 16)]
    for layout, why in (
        (None, "layout of flux: broken"),
        (TokenLayout((Span("text", 3),)), "its token layout is unknown"),
    ):
        session.set_layout(layout, None if layout else "layout of flux: broken")
        with pytest.raises(dit_attn.DitAttnError, match=f"cannot be moved in .*: {why}; remove the method"):
            rotary._move(session, session.layers[0], tables, "real")


def test_ring_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = tiny("flux")
    dit_attn.enable(model, Placed(HALF))

    def ring(config: Any) -> None:
        raise NotImplementedError("ring attention splits the keys over ranks")

    monkeypatch.setattr(rotary.compat, "ulysses_mesh", ring)
    with pytest.raises(dit_attn.DitAttnError, match=r"cannot be moved in .*: ring attention splits the keys"):
        forward(model, args)


# -- the sequence split over devices -----------------------------------------------------------------------------------


def test_shards_of_a_table_are_moved_as_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = tiny("flux")
    tables = Tables(model, args)
    session, layer = tables.session, tables.layer
    full = tables.given()
    moved = tables.given(HALF)
    text, image = (part.chunk(2) for part in full[0].split([10, 288]))
    order = torch.cat([torch.arange(5), 149 + torch.arange(5), 5 + torch.arange(144), 154 + torch.arange(144)])

    class Rank:
        """Rank 1 of two."""

        def size(self) -> int:
            """Of the mesh."""
            return 2

        def get_local_rank(self) -> int:
            """The second."""
            return 1

    def gathered(self: Exchange, x: torch.Tensor, dim: int) -> torch.Tensor:
        assert self.order is not None and torch.equal(self.order, order)
        return full[0] if torch.equal(x, torch.cat([text[1], image[1]])) else full[1]

    monkeypatch.setattr(rotary.compat, "ulysses_mesh", lambda config: Rank())
    monkeypatch.setattr(Exchange, "gather_tokens", gathered)
    own = [torch.cat([part.chunk(2)[1] for part in table.split([10, 288])]) for table in full]
    found = rotary._move(session, layer, own, "real")
    for a, b in zip(found, moved):
        assert torch.equal(a, torch.cat([part.chunk(2)[1] for part in b.split([10, 288])]))


# -- cross attention ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AskedOfText(Asked):
    """A method of the cross attention."""

    sites: ClassVar[tuple[str, ...]] = ("cross",)


def test_cross_attention_keeps_its_positions_and_its_methods_are_not_asked_for_any() -> None:
    model, args = built(HunyuanDiTCase())  # its queries are rotated in cross attention too
    sites: list[str] = []

    def positions(site: PositionSite) -> PositionMap:
        sites.append(site.layer.name)
        return HALF

    dit_attn.enable(model, Asked(positions))
    alone = forward(model, args)
    assert sites == ["blocks.0.attn1", "blocks.1.attn1"]
    dit_attn.enable(model, Asked(positions), AskedOfText(lambda site: pytest.fail("asked")))
    assert same(alone, forward(model, args))
    assert sites == ["blocks.0.attn1", "blocks.1.attn1"] * 2
