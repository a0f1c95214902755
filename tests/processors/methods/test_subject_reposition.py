"""Reposition of subjects: coordinates by their formula, references and who attends to them, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

import dit_attn
from dit_attn import DitAttnError, SubjectIsolation, SubjectReposition
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import Layer
from dit_attn.processors.core.positions import PositionSite, displacement
from dit_attn.processors.core.tokens import EmbeddedImage, Span, TokenLayout, visual_span
from tests._support.core_calls import Dispatched, host_run, random_args
from tests._support.edit_pipelines import editing
from tests._support.family_cases import image_ids
from tests._support.outputs import same
from tests._support.pipeline_runs import run as run_pipeline
from tests._support.recorded_calls import reference, requests

LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
SWAP = ({"piece": "a cube", "box": LEFT, "from": RIGHT}, {"piece": "a ball", "box": RIGHT, "from": LEFT})
GRID = (1, 8, 12)
PICTURE = (visual_span("image", GRID), visual_span("reference", GRID), visual_span("reference", GRID))


def coordinates(grid: tuple[int, int, int] = GRID) -> torch.Tensor:
    """(N, 3), every token at its own place."""
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).reshape(-1, 3)


def placed(method: SubjectReposition, *spans: Span) -> torch.Tensor:
    """(Sv, 3), where the tokens of some spans are after the method."""
    start, visual = 0, []
    for span in spans:
        visual.append(replace(span, start=start))
        start += span.length or 0
    layer = Layer("attn", 0)
    site = PositionSite(layer, tuple(visual), Clock())
    maps = method.positions(site)
    assert maps is not None and method.positions(site) is maps
    points = torch.cat([coordinates(span.grid or GRID) for span in spans])
    return points + displacement(maps, points)


def test_boxes_that_change_places_exchange_their_coordinates() -> None:
    found = placed(SubjectReposition(subjects=SWAP), PICTURE[0]).unflatten(0, GRID)
    assert torch.equal(found, coordinates().unflatten(0, GRID).roll(6, 2))


def test_a_box_of_another_size_has_the_coordinates_of_its_source_in_proportion() -> None:
    box, source = [0.25, 0.25, 0.75, 0.75], [0.0, 0.5, 0.25, 1.0]
    found = placed(SubjectReposition(subjects=[{"piece": "a", "box": box, "from": source}]), PICTURE[0])
    for p, q in zip(coordinates(), found):
        x, y = (float(p[2]) + 0.5) / 12, (float(p[1]) + 0.5) / 8
        if box[0] < x < box[2] and box[1] < y < box[3]:
            x, y = 0.0 + (x - 0.25) / 2, 0.5 + (y - 0.25)
        assert q.tolist() == pytest.approx([0.0, 8 * y - 0.5, 12 * x - 0.5], abs=1e-9)


def test_a_box_that_moves_along_a_video_reads_one_place() -> None:
    grid = (3, 4, 8)
    boxes = [[0.0, 0.0, 0.25, 1.0], [0.5, 0.0, 0.75, 1.0]]
    method = SubjectReposition(subjects=[{"piece": "a", "boxes": boxes, "from": [0.75, 0.0, 1.0, 1.0]}])
    found = placed(method, visual_span("video", grid)).unflatten(0, grid)
    for frame, first in enumerate((0, 2, 4)):
        assert found[frame, 0, first : first + 2, 2].tolist() == [6.0, 7.0]
        assert int((found[frame] != coordinates(grid).unflatten(0, grid)[frame]).any(-1).sum()) == 8


REFERRED = (
    {"piece": "a cube", "box": LEFT, "reference": 1},
    {"piece": "a ball", "box": [0.5, 0.0, 1.0, 0.5], "from": RIGHT, "reference": 2},
)


def test_a_reference_goes_into_the_box_of_its_subject() -> None:
    found = placed(SubjectReposition(subjects=REFERRED), *PICTURE).unflatten(0, (3, 8, 12))
    own = coordinates().unflatten(0, (8, 12))
    assert torch.equal(found[0], own)
    assert torch.allclose(found[1, ..., 2], (own[..., 2] + 0.5) / 2 - 0.5)
    assert torch.equal(found[2, :, :6], own[:, :6])
    assert torch.allclose(found[2, :, 6:, 1], (own[:, 6:, 1] + 0.5) / 2 - 0.5)


@pytest.mark.parametrize("settings", [{}, {"mutual": False, "density_correct": True}], ids=["mutual", "density"])
def test_who_attends_to_references_is_the_definition_in_float64(settings: dict[str, Any]) -> None:
    run, layer = host_run([SubjectReposition(subjects=REFERRED, **settings)], TokenLayout((Span("text", 4), *PICTURE)))
    args = random_args(4 + 3 * 96)
    done = Dispatched(run, layer, replace(args, q=args.q.double(), k=args.k.double(), v=args.v.double()))
    points = coordinates()
    left, right = points[:, 2] < 6, (points[:, 2] >= 6) & (points[:, 1] < 4)
    bias = torch.zeros(1, 1, 292, 292, dtype=torch.float64)
    value = (-math.inf, -math.inf) if not settings else (-math.log(2.0), -math.log(2.0))
    rows = (right, left) if not settings else (points[:, 0] == 0,) * 2
    keys = (points[:, 0] == 0, points[:, 2] >= 6)
    for number, (row, key, amount) in enumerate(zip(rows, keys, value), 1):
        at = 4 + row.nonzero().flatten()
        bias[0, 0, at[:, None], 4 + 96 * number + key.nonzero().flatten()] = amount
    torch.testing.assert_close(done.out, reference(done.call, done.request, bias), atol=1e-12, rtol=1e-12)


def test_the_references_of_a_row_are_the_images_among_its_own_words() -> None:
    """Images of the prompt stand at another place in every batch row; a row without any is stock."""
    grid = (1, 2, 3)
    images = (EmbeddedImage(1, 1, 7, grid), EmbeddedImage(1, 8, 14, grid))
    layout = TokenLayout((Span("text", 15), PICTURE[0]), images)
    method = SubjectReposition(subjects=REFERRED, density_correct=True)
    run, layer = host_run([method], layout)
    args = random_args(15 + 96)
    q, k, v = (x.double().repeat(2, 1, 1, 1)[:2] for x in (args.q, args.k, args.v))
    done = Dispatched(run, layer, replace(args, q=q, k=k, v=v))
    points, own = coordinates(), coordinates(grid)
    left, right = points[:, 2] < 6, (points[:, 2] >= 6) & (points[:, 1] < 4)
    second = own[:, 2] >= 1.5
    bias = torch.zeros(2, 1, 111, 111, dtype=torch.float64)
    bias[1, 0, 15:, 1:7] -= math.log(6 / 48)
    bias[1, 0, 15:, 8:14] -= math.log(3 / 24) * second.double()
    bias[1, 0, 15 + right.nonzero(), 1 + torch.arange(6)] = -math.inf
    bias[1, 0, 15 + left.nonzero(), 8 + second.nonzero().flatten()] = -math.inf
    torch.testing.assert_close(done.out, reference(done.call, done.request, bias), atol=1e-12, rtol=1e-12)
    none = TokenLayout(layout.spans, (EmbeddedImage(1, 1, 7, grid),))
    run, layer = host_run([method], none)
    with pytest.raises(DitAttnError, match="is in reference 2, and this run has 1 reference image"):
        Dispatched(run, layer, replace(args, q=q, k=k, v=v))


@pytest.fixture(scope="module")
def flux() -> tuple[Any, dict[str, Any]]:
    """A tiny Flux with a reference of the size of the picture."""
    torch.manual_seed(0)
    net: Any = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    net.eval()
    ids = torch.cat([image_ids(height=16, width=18), image_ids(kind=1, height=16, width=18)])
    args = {
        "hidden_states": torch.randn(2, 576, 4),
        "encoder_hidden_states": torch.randn(2, 10, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(10, 3),
    }
    return net, args


def output(flux: tuple[Any, dict[str, Any]], *methods: Any) -> Any:
    net, args = flux
    dit_attn.enable(net, *methods)
    with torch.no_grad():
        out = net(**args, return_dict=False)[0]
    dit_attn.disable(net)
    return out


def test_no_move_is_bit_equal_and_a_move_composes_with_sparse_attention_and_isolation(flux: Any) -> None:
    stock = output(flux)
    still = [{"piece": "a", "box": LEFT, "from": LEFT}, {"piece": "b", "box": RIGHT}]
    for method in (SubjectReposition(), SubjectReposition(subjects=still), SubjectReposition(subjects=SWAP, stop=0)):
        assert same(stock, output(flux, method))
    moved = SubjectReposition(subjects=REFERRED[:1])
    alone = output(flux, moved)
    apart = SubjectIsolation(subjects=SWAP, isolate_text=False, isolate_image=True)
    sparse = dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0)
    with requests() as seen:
        joined = output(flux, moved, apart, sparse)
    assert len(seen) == 2 and all(request.biases and request.layout is not None for _, request, _ in seen)
    assert not same(stock, alone) and not same(alone, joined)
    moves = SubjectReposition(subjects=SWAP)
    assert not same(output(flux, moves), stock)


def test_a_reference_that_a_run_lacks_is_one_line(flux: Any) -> None:
    method = SubjectReposition(subjects=[{**REFERRED[0], "reference": 2}])
    with pytest.raises(DitAttnError, match="'a cube' is in reference 2, and this run has 1 reference images") as raised:
        output(flux, method)
    dit_attn.disable(flux[0])
    assert "\n" not in str(raised.value)
    unknown = replace(PICTURE[1], grid=None)
    with pytest.raises(DitAttnError, match="how many tokens wide the reference of 'a cube' is"):
        placed(SubjectReposition(subjects=REFERRED[:1]), PICTURE[0], unknown)


@pytest.mark.parametrize("at", [(0.0, 0.0), (2.5, -3.0)], ids=["at the corner", "where the model puts it"])
def test_a_reference_of_another_size_goes_into_the_box_wherever_its_model_places_it(at: tuple[float, float]) -> None:
    """The right half of 6 x 10 tokens goes to the box of the second subject, 4 x 6 tokens at the top right."""
    small = visual_span("reference", (1, 6, 10))
    subject = {"piece": "a ball", "box": [0.5, 0.0, 1.0, 0.5], "from": RIGHT, "reference": 1}
    start = coordinates(small.grid or GRID) + torch.tensor([1.0, *at])
    layer, visual = Layer("attn", 0), (PICTURE[0], replace(small, start=96))
    maps = SubjectReposition(subjects=[subject]).positions(PositionSite(layer, visual, Clock()))
    assert maps is not None
    points = torch.cat([coordinates(), start])
    found = (points + displacement(maps, points))[96:].unflatten(0, (6, 10))
    own = coordinates(small.grid or GRID).unflatten(0, (6, 10))
    assert torch.equal(found[:, :5], start.unflatten(0, (6, 10))[:, :5]) and bool((found[..., 0] == 1.0).all())
    expected_h, expected_w = (own[..., 1] + 0.5) * 4 / 6 - 0.5, (own[..., 2] - 5 + 0.5) * 6 / 5 + 6 - 0.5
    torch.testing.assert_close(found[:, 5:, 1], expected_h[:, 5:])
    torch.testing.assert_close(found[:, 5:, 2], expected_w[:, 5:])


def test_the_density_of_a_reference_of_another_size_counts_its_own_tokens() -> None:
    """30 tokens of 6 x 10 come to lie on 24 of the picture: their weight is divided by 30 / 24."""
    small = visual_span("reference", (1, 6, 10))
    subject = {"piece": "a ball", "box": [0.5, 0.0, 1.0, 0.5], "from": RIGHT, "reference": 1}
    method = SubjectReposition(subjects=[subject], mutual=False, density_correct=True)
    run, layer = host_run([method], TokenLayout((Span("text", 4), PICTURE[0], small)))
    args = random_args(4 + 96 + 60)
    done = Dispatched(run, layer, replace(args, q=args.q.double(), k=args.k.double(), v=args.v.double()))
    bias = torch.zeros(1, 1, 160, 160, dtype=torch.float64)
    keys = 100 + (coordinates(small.grid or GRID)[:, 2] >= 5).nonzero().flatten()
    bias[0, 0, 4:100, keys] = -math.log(30 / 24)
    torch.testing.assert_close(done.out, reference(done.call, done.request, bias), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["kontext", "qwen-image-edit"])
def test_references_of_another_size_are_moved_in_editing_pipelines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, kwargs = editing(name, monkeypatch)
    picture = {"kontext": kwargs.get("height"), "qwen-image-edit": 64}[name]
    subject = {"piece": "a cube", "box": LEFT, "from": [0.25, 0.0, 1.0, 1.0], "reference": 1}
    stock = run_pipeline(pipe, kwargs, 1, prompt="a cube")
    dit_attn.enable(pipe, SubjectReposition(subjects=[subject]))
    sizes: list[Any] = []
    with dit_attn.observing(pipe, lambda call, request, out: sizes.append([span.grid for span in call.tokens.visual])):
        assert picture and not same(stock, run_pipeline(pipe, kwargs, 1, prompt="a cube"))
    assert sizes[0][0] != sizes[0][1] and "moved" in str(dit_attn.summary(pipe)).lower()
    dit_attn.disable(pipe)
    assert same(stock, run_pipeline(pipe, kwargs, 1, prompt="a cube"))


@pytest.mark.parametrize(
    ("subject", "problem"),
    [
        ({"from": LEFT}, "has from and no box; add the box where the subject belongs"),
        ({"reference": 1, "mask": torch.ones(2, 2)}, "has reference and no box"),
        ({"box": LEFT, "reference": 0}, "reference must be the number of a reference image, from 1, got 0"),
        ({"boxes": [LEFT, RIGHT], "reference": 1}, "a reference goes to one box"),
        ({"box": LEFT, "from": [0, 0, 1.5, 1]}, "from: the box .* is in pixels"),
        ({"box": LEFT, "from": [0.5, 0, 0.5, 1]}, "is empty"),
    ],
)
def test_bad_subjects_are_one_line(subject: dict[str, Any], problem: str) -> None:
    with pytest.raises(DitAttnError, match=problem) as raised:
        SubjectReposition(subjects=[{"piece": "a", **subject}])
    assert "\n" not in str(raised.value)


def test_boxes_that_overlap_are_refused_and_settings_round_trip() -> None:
    with pytest.raises(DitAttnError, match="the boxes of 'a cube' and 'b' overlap"):
        SubjectReposition(subjects=[SWAP[0], {"piece": "b", "box": LEFT, "from": RIGHT}])
    method = SubjectReposition(subjects=REFERRED, density_correct=True)
    assert dit_attn.Method.from_dict(method.to_dict()) == method
    assert eval(repr(method), {"SubjectReposition": SubjectReposition}) == method
