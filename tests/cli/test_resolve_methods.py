"""--method, --set, --preset and the configuration file become Method instances."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dit_attn.cli.method_options import MethodSpec, method_specs
from dit_attn.cli.options import Options
from dit_attn.cli.resolve_methods import resolve, typed
from dit_attn.errors import DitAttnError
from dit_attn.processors.methods.block_sparse import BlockSparse

UNKNOWN = SimpleNamespace(config={})
TINY_IMAGE = type("PixArtTransformer2DModel", (SimpleNamespace,), {})(
    config={"num_attention_heads": 2, "num_layers": 6}
)


def build(*words, config=None, model=UNKNOWN, preset=None):
    return resolve(method_specs(Options({}, list(words), config or {})), model, preset)


def specs(*words, config=None):
    return method_specs(Options({}, list(words), config or {}))


def test_a_slug_alone_has_the_defaults_of_the_method():
    assert build(("method", "block-sparse")) == (BlockSparse(),)


def test_set_is_typed_by_the_field():
    (method,) = build(
        ("method", "block-sparse"),
        ("set", "density=0.5"),
        ("set", "q_block=64"),
        ("set", "keep=diagonal,first-frame"),
        ("set", "dense_layers=[0, -1]"),
        ("set", "dense_steps=2"),
    )
    assert method == BlockSparse(
        density=0.5, q_block=64, keep=("diagonal", "first-frame"), dense_layers=(0, -1), dense_steps=2
    )
    assert isinstance(method.dense_steps, int)


HEADS = BlockSparse(density=(0.5, 1.0), keep=())
ROWS = BlockSparse(densities=((0.5, 1.0), 0.25, (0.125, 0.25)), keep=())


@pytest.mark.parametrize(
    "text, method",
    [
        ("keep=,density=0.5,1", HEADS),
        ("keep=,density=[0.5, 1.0]", HEADS),
        ("keep=,density=(0.5,1.0)", HEADS),
        ("keep=,densities=[0.5,1.0],0.25,[0.125,0.25]", ROWS),
        ("keep=,densities=[[0.5,1.0], 0.25, (0.125, 0.25)]", ROWS),
        ("keep=,densities=[[0.5,1.0]]", BlockSparse(densities=((0.5, 1.0),), keep=())),
        ("keep=,densities=0.25,[0.5,1.0]", BlockSparse(densities=(0.25, (0.5, 1.0)), keep=())),
    ],
)
def test_budgets_of_heads_are_lists_and_rows_of_a_table_are_in_brackets(text, method):
    (found,) = build(("method", f"block-sparse:{text}"))
    assert found == method
    settings = {key: value for key, value in method.to_dict().items() if value is not None and key != "method"}
    again = MethodSpec("block-sparse", settings)
    assert build(("method", str(again))) == (method,)
    assert build(config={"method": [method.to_dict()]}) == (method,)


def test_a_budget_that_is_no_number_is_refused_with_both_forms():
    with pytest.raises(DitAttnError, match=r"density must be a number or none or a list \(a,b,...\), each item"):
        build(("method", "block-sparse:density=0.5;0.25"))


def test_a_point_makes_a_fraction_and_its_absence_a_count():
    (method,) = build(("method", "block-sparse"), ("set", "dense_steps=1.0"))
    assert isinstance(method.dense_steps, float)


def test_set_may_stand_before_the_only_method_or_name_it():
    assert build(("set", "density=0.5"), ("method", "block-sparse")) == (BlockSparse(density=0.5),)
    assert build(("set", "block-sparse.density=0.5"), ("method", "block-sparse")) == (BlockSparse(density=0.5),)


def test_set_belongs_to_the_method_before_it():
    first, second = specs(("method", "a"), ("set", "x=1"), ("method", "b"), ("set", "x=2"))
    assert (first, second) == (MethodSpec("a", {"x": "1"}), MethodSpec("b", {"x": "2"}))


@pytest.mark.parametrize(
    "config",
    [
        {"method": "block-sparse", "set": {"density": 0.5}},
        {"method": ["block-sparse"], "set": {"density": 0.5}},
        {"method": {"block-sparse": {"density": 0.5}}},
        {"method": [{"method": "block-sparse", "density": 0.5}]},
        {"method": [{"block-sparse": {"density": 0.5}}]},
    ],
)
def test_the_configuration_file_may_write_it_in_any_form(config):
    assert build(config=config) == (BlockSparse(density=0.5),)


def test_flags_win_over_the_configuration_file():
    config = {"method": {"block-sparse": {"density": 0.5, "q_block": 64}}}
    assert build(("set", "density=0.3"), config=config) == (BlockSparse(density=0.3, q_block=64),)
    assert build(("method", "block-sparse"), config=config) == (BlockSparse(),)


def test_the_preset_of_the_model_is_taken_unless_told_otherwise():
    (found,) = build(("method", "block-sparse"), model=TINY_IMAGE)
    assert found.q_block == 32
    assert build(("method", "block-sparse"), model=TINY_IMAGE, preset="none") == (BlockSparse(),)
    (named,) = build(("method", "block-sparse"), preset="tiny-image")
    assert named == found


def test_top_p_replaces_the_density_of_a_preset():
    (method,) = build(("method", "block-sparse"), ("set", "top_p=0.9"), model=TINY_IMAGE)
    assert (method.density, method.top_p, method.q_block) == (None, 0.9, 32)


def test_a_saved_method_can_be_named_by_its_folder(tmp_path):
    method = BlockSparse(density=0.4, keep=())
    method.save_pretrained(tmp_path / "mine")
    assert build(("method", str(tmp_path / "mine"))) == (method,)
    assert build(("method", str(tmp_path / "mine")), ("set", "density=0.2")) == (BlockSparse(density=0.2, keep=()),)


@pytest.mark.parametrize(
    ("words", "preset", "message"),
    [
        ([("method", "block-spars")], None, "unknown method 'block-spars'. Did you mean 'block-sparse'"),
        ([("method", "block-sparse"), ("set", "densty=1")], None, "'densty'. Did you mean 'density'"),
        ([("method", "block-sparse"), ("set", "density=3")], None, "density must be between"),
        ([("method", "block-sparse"), ("set", "density=nan")], None, "density must be between"),
        ([("method", "block-sparse"), ("set", "density=a")], None, "density must be a number or none or a list"),
        ([("method", "block-sparse"), ("set", "q_block=1.5")], None, "q_block must be a whole number"),
        ([("method", "block-sparse"), ("set", "keep=words")], None, "'words'"),
        ([("method", "block-sparse"), ("set", "dense_layers=a")], None, "dense_layers must be a list"),
        ([("method", "block-sparse"), ("set", "density")], None, "KEY=VALUE"),
        ([("method", "block-sparse"), ("set", "other.density=1")], None, "'other'"),
        ([("set", "density=1")], None, "no method"),
        ([("method", "block-sparse")], "nothing", "unknown preset 'nothing'"),
        ([], "tiny-image", "add --method"),
        ([("method", "no/such/place")], None, "no method settings at"),
    ],
)
def test_bad_words_are_refused_in_one_line(words, preset, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DitAttnError, match=message.replace("(", r"\(")) as error:
        build(*words, preset=preset)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [{"method": 3}, {"method": {"block-sparse": 3}}, {"set": [1]}, {"method": [None]}])
def test_a_malformed_configuration_is_refused(config):
    with pytest.raises(DitAttnError, match="in the configuration file"):
        build(config=config)


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        ("none", float | None, None),
        ("3", float, 3.0),
        (3, float | int, 3),
        ("true", bool, True),
        ("1", bool | int, 1),
        ("", tuple[str, ...], ()),
        ("a", tuple[str, ...], ("a",)),
        ([1, 2], tuple[int, ...], (1, 2)),
        ("none", str | None, None),
    ],
)
def test_typed_reads_text_and_values(value, hint, result):
    found = typed(value, hint, "x")
    assert found == result
    assert type(found) is type(result)
