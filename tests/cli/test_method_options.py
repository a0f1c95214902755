"""One grammar: the same words for methods mean the same in every command, and in the configuration file."""

from __future__ import annotations

import argparse
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_attn.cli.commands.bench import command as bench
from dit_attn.cli.method_options import MethodSpec, label, method_specs, method_variants, parse_method
from dit_attn.cli.options import Options, merge
from dit_attn.cli.parser import Parser
from dit_attn.errors import DitAttnError
from dit_attn.processors.methods.block_sparse import BlockSparse

MODEL = ("--model", "tiny-image")
PROMPT = ("--prompt", "a large red circle at the left on white")
PLAN = ("--dry-run", "--json")
SETTINGS = {"keep": ["text", "diagonal"], "dense_steps": 2, "dense_layers": [0, 3]}
# The same settings in every way they can be written.
FORMS = {
    "in one text": ("--method", "block-sparse:keep=text,diagonal,dense_steps=2,dense_layers=[0, 3]"),
    "with quotes": ("--method", "block-sparse:keep='text,diagonal',dense_steps=2,dense_layers=\"0,3\""),
    "with set": (
        *("--method", "block-sparse", "--set", "keep=text,diagonal", "--set", "dense_steps=2"),
        *("--set", "dense_layers=0,3"),
    ),
    "set before the method": (
        *("--set", "keep=text,diagonal", "--set", "dense_steps=2", "--set", "dense_layers=0,3"),
        *("--method", "block-sparse"),
    ),
    "set with the name": (
        *("--method", "block-sparse:dense_steps=2,dense_layers=0,3"),
        *("--set", "block-sparse.keep=text,diagonal"),
    ),
    "set over the text": (
        *("--method", "block-sparse:keep=,dense_steps=2,dense_layers=0,3"),
        *("--set", "keep=text,diagonal"),
    ),
    "in a file of settings": ("--method", "saved/dit_attn_method.json"),
    "in a folder of settings": ("--method", "saved", "--set", "dense_steps=2"),
}
CONFIGS = {
    "text": "method: 'block-sparse:keep=text,diagonal,dense_steps=2,dense_layers=0,3'\n",
    "list of texts": "method: ['block-sparse:keep=text,diagonal,dense_steps=2,dense_layers=0,3']\n",
    "mapping": "method: {block-sparse: {keep: [text, diagonal], dense_steps: 2, dense_layers: [0, 3]}}\n",
    "to_dict": "method: {method: block-sparse, keep: [text, diagonal], dense_steps: 2, dense_layers: [0, 3]}\n",
    "set": "method: block-sparse\nset: {keep: 'text,diagonal', dense_steps: 2, dense_layers: [0, 3]}\n",
}


def bench_options(*words):
    parser = Parser(prog="dit-attn bench")
    bench.add_arguments(parser)
    return merge(parser.parse_args(list(words)), bench.GROUPS)


def of_plan(cli, words, key):
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)[key]


def of_compare(cli, words):
    return of_plan(cli, ("compare", *MODEL, *PROMPT, *PLAN, *words), "variants")


def bench_model(cli, words):
    from dit_attn.cli.commands.bench.model import ModelBenchConfig

    small = ("model", "--config", "flux", "--layers", "4", "--heads", "1", "--tokens", "512", "--device", "cpu")
    config = ModelBenchConfig.from_options(bench_options(*small, *words))
    (competitor,) = config.competitors
    return competitor.method.to_dict()


def bench_operators(cli, words):
    from dit_attn.cli.commands.bench.operators import OperatorBenchConfig

    (family,) = OperatorBenchConfig.from_options(bench_options("operators", *words)).families
    return family.make(0.25, 32).to_dict()


# Command -> the settings of its only method.
READ = {
    "generate": lambda cli, words: of_plan(cli, ("generate", *MODEL, *PROMPT, *PLAN, *words), "methods")[0],
    "explain": lambda cli, words: of_plan(cli, ("explain", *MODEL, "--json", *words), "methods")[0],
    "inspect": lambda cli, words: of_plan(cli, ("inspect", *MODEL, *PROMPT, *PLAN, *words), "methods")[0],
    "compare": lambda cli, words: of_compare(cli, words)[1]["methods"][0],
    "calibrate": lambda cli, words: of_plan(cli, ("calibrate", *MODEL, *PLAN, *words), "method"),
    "bench model": bench_model,
    "bench operators": bench_operators,
}
TAKE_CONFIG = [name for name in READ if not name.startswith("bench")]


@pytest.fixture
def saved(cli, tmp_path):
    """A folder of settings in the working directory."""
    BlockSparse(density=0.25, keep=("text", "diagonal"), dense_steps=2, dense_layers=(0, 3)).save_pretrained("saved")


@pytest.mark.parametrize(("command", "form"), [(command, form) for command in READ for form in FORMS])
def test_every_form_is_the_same_in_every_command(cli, saved, command, form):
    found = READ[command](cli, FORMS[form])
    assert {name: found[name] for name in SETTINGS} == SETTINGS and found["method"] == "block-sparse"


@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("command", TAKE_CONFIG)
def test_the_configuration_file_says_the_same_in_every_command(cli, tmp_path, command, form):
    (tmp_path / "c.yaml").write_text(CONFIGS[form])
    found = READ[command](cli, ("--config", "c.yaml"))
    assert {name: found[name] for name in SETTINGS} == SETTINGS


@pytest.mark.parametrize("words", [("--scale", "2", "--u", "0.5"), ("--method", "softpag:scale=2,u=0.5"),
                                   ("--method", "softpag", "--set", "scale=2", "--set", "u=0.5"),
                                   ("--set", "scale=2", "--u", "0.5")])  # fmt: skip
def test_a_search_takes_the_settings_of_its_method_in_the_same_grammar(words):
    from dit_attn.cli.commands.search import command
    from dit_attn.cli.commands.search.config import HeadSearchConfig

    parser = Parser(prog="dit-attn search")
    command.add_arguments(parser)
    config = HeadSearchConfig.from_options(merge(parser.parse_args([*MODEL, *words]), command.GROUPS))
    assert (config.search.scale, config.search.u, config.search.target) == (2.0, 0.5, "identity")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--method", "block-sparse"), ("finds heads for softpag, not for block-sparse",)),
        (("--method", "softpag", "--method", "softpag"), ("not for softpag + softpag",)),
        (
            (
                "--method",
                "softpag:heads=3",
            ),
            ("setting of softpag in a search 'heads'", "scale"),
        ),
        (("--scale", "2", "--set", "scale=3"), ("--scale and the setting scale", "give one of them")),
        (("--set", "scale=high"), ("softpag.scale must be a number", "'high'")),
    ],
)
def test_a_search_refuses_other_methods_and_settings(cli, words, parts):
    cli("search", *MODEL, *words).refused(*parts)


def test_joined_methods_run_together_and_every_method_of_a_comparison_is_a_variant(cli):
    joined = ("--method", "block-sparse:density=0.5 + softpag:heads=3", "--set", "softpag.scale=2")
    apart = ("--method", "block-sparse", "--set", "density=0.5", "--method", "softpag", "--set", "heads=3",
             "--set", "scale=2")  # fmt: skip
    together = [of_plan(cli, ("generate", *MODEL, *PROMPT, *PLAN, *words), "methods") for words in (joined, apart)]
    assert together[0] == together[1] and [one["method"] for one in together[0]] == ["block-sparse", "softpag"]
    variants = [of_compare(cli, words) for words in (joined, apart)]
    assert [[len(one["methods"]) for one in found] for found in variants] == [[0, 2], [0, 1, 1]]
    assert variants[0][1]["methods"] == together[0]
    assert [one["label"] for one in variants[1]] == ["dense", "block-sparse:density=0.5", "softpag:heads=3,scale=2"]


@pytest.mark.parametrize("command", ["generate", "explain", "inspect", "compare", "calibrate"])
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--set", "density=0.5"), ("has no method to apply to",)),
        (("--method", "block-sparse", "--set", "density"), ("KEY=VALUE", "density")),
        (("--method", "block-sparse:density"), ("KEY=VALUE", "block-sparse:density=0.25")),
        (("--method", ":density=1"), ("names no method",)),
        (("--method", "block-sparse:keep='text"), ("the quote ' has no end",)),
        (("--method", "block-spars:density=1"), ("'block-spars'", "Did you mean 'block-sparse'")),
        (("--method", "block-sparse:densty=1"), ("'densty'", "Did you mean 'density'")),
        (("--method", "block-sparse", "--set", "blok-sparse.density=1"), ("'blok-sparse'", "Did you mean")),
        (("--method", "block-sparse + softpag", "--set", "scale=1"),
         ("could belong to block-sparse or softpag", "NAME.scale")),
        (("--set", "scale=1", "--method", "block-sparse", "--method", "softpag"),
         ("could belong to block-sparse or softpag", "put it behind its --method")),
        (("--set", "block-sparse.density=0.5", "--method", "block-sparse", "--method", "block-sparse:keep="),
         ("could belong to 2 methods block-sparse",)),
    ],
)  # fmt: skip
def test_bad_grammar_is_the_same_line_in_every_command(cli, command, words, parts):
    needed = () if command == "explain" else PROMPT
    outcome = cli(command, *MODEL, *needed, *words)
    outcome.refused(*parts)


def test_arguments_of_the_call_are_for_comparisons(cli):
    outcome = cli("generate", *MODEL, *PROMPT, "--method", "call:guidance_scale=2 + softpag:heads=3")
    outcome.refused("`call:` sets arguments", "dit-attn compare", "--pipeline-kwargs")
    words = ("--method", "call:guidance_scale=2 + softpag:heads=3", "--set", "scale=2")
    variants = of_compare(cli, words)
    assert variants[1]["call"] == {"guidance_scale": 2} and variants[1]["methods"][0]["scale"] == 2.0


def test_operators_measure_one_method_a_row_at_all_densities(cli):
    cli("bench", "operators", "--method", "block-sparse + softpag").refused("one method per row")
    cli("bench", "operators", "--method", "block-sparse:density=0.5").refused("give them with --density")
    cli("bench", "operators", "--method", "softpag").refused("setting of softpag", "'density'")
    cli("bench", "kernels", "--method", "block-sparse").refused("--method is not for bench kernels")


# -- the parser itself ------------------------------------------------------------------------------------------------


def test_a_comma_separates_settings_only_where_a_key_follows():
    (one,) = parse_method("block-sparse:density=0.25,keep=text,diagonal,dense_steps=2")
    assert one.settings == {"density": "0.25", "keep": "text,diagonal", "dense_steps": "2"}
    two = parse_method("block-sparse:density=1e-1 + other:a=1")
    assert [item.name for item in two] == ["block-sparse", "other"] and two[0].settings == {"density": "1e-1"}


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("a", [("a", {})]),
        ("a+b:x=1", [("a", {}), ("b", {"x": "1"})]),
        ("a:x=1e+3,y=2 + b", [("a", {"x": "1e+3", "y": "2"}), ("b", {})]),
        ("org/name:x=1", [("org/name", {"x": "1"})]),
        ("./out/m.json:x=1", [("./out/m.json", {"x": "1"})]),
        ("C:\\out\\m.json:x=1", [("C:\\out\\m.json", {"x": "1"})]),
        ("'a + b.json':x=1", [("a + b.json", {"x": "1"})]),
        ("a:heads=3:0,3:1,u=0.5", [("a", {"heads": "3:0,3:1", "u": "0.5"})]),
        ("a:x=[1, y=2],z=3", [("a", {"x": "[1, y=2]", "z": "3"})]),
        ("a:x='p, q=3 + r'", [("a", {"x": "p, q=3 + r"})]),
        ("a:x=it's", [("a", {"x": "it's"})]),
        (" a : x = 1 ", [("a", {"x": "1"})]),
    ],
)
def test_what_is_written_is_what_is_read(text, specs):
    found = parse_method(text)
    assert found == [MethodSpec(name, settings) for name, settings in specs]
    assert parse_method(label(found)) == found  # the label of a variant is in the grammar


VALUES = st.text(st.characters(codec="ascii", exclude_characters="\"'()[]{}\n\r\t\x0b\x0c\x1c\x1d\x1e\x1f"), min_size=1)


KEYS = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)


@given(st.dictionaries(KEYS, VALUES.filter(lambda text: text == text.strip()), max_size=3))
def test_any_setting_survives_the_label(settings):
    specs = [MethodSpec("a", settings), MethodSpec("b", {})]
    assert parse_method(label(specs)) == specs


def test_values_of_a_configuration_file_are_labels_too():
    options = Options({}, [], {"method": [{"a": {"x": None, "y": True, "z": [1, 2], "w": 0.5}}, "b:u=1"]})
    variants = method_variants(options)
    assert list(map(label, variants)) == ["a:x=none,y=true,z=1,2,w=0.5", "b:u=1"]
    assert [spec.name for spec in method_specs(options)] == ["a", "b"]


@pytest.mark.parametrize("config", [{"method": 3}, {"method": [["a"]]}, {"method": {"a": 3}}, {"set": 1}])
def test_a_malformed_configuration_is_one_line(config):
    with pytest.raises(DitAttnError, match="in the configuration file"):
        method_variants(Options({}, [], config))


def test_words_keep_their_order_on_the_command_line():
    parser = Parser(prog="dit-attn bench")
    bench.add_arguments(parser)
    args = parser.parse_args(["model", "--method", "a", "--set", "x=1", "--method", "b"])
    assert isinstance(args, argparse.Namespace) and args.words == [("method", "a"), ("set", "x=1"), ("method", "b")]
