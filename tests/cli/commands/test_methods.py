"""`dit-attn methods`."""

from __future__ import annotations

import dataclasses
import json
import shlex

import pytest

from dit_attn.cli.commands.methods import describe
from dit_attn.processors.methods import methods
from dit_attn.processors.methods.base import Method, setting

SLUGS = sorted(slug for slug, cls in methods().items() if cls.__module__.startswith("dit_attn."))


def test_every_method_has_one_line(cli):
    outcome = cli("methods")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    for slug in SLUGS:
        (line,) = [line for line in lines if line.startswith(f"{slug} ")]
        assert methods()[slug].role in line
    assert {row["method"] for row in json.loads(cli("methods", "--json").out)} >= set(SLUGS)


@pytest.mark.parametrize("slug", SLUGS)
def test_every_setting_of_a_method_is_listed_with_its_default_and_help(cli, slug):
    data = json.loads(cli("methods", slug, "--json").out)
    assert {row["name"] for row in data["settings"]} == {field.name for field in dataclasses.fields(methods()[slug])}
    assert {row["name"]: row["default"] for row in data["settings"]} == {
        name: value for name, value in methods()[slug]().to_dict().items() if name != "method"
    }
    assert all(row["help"] for row in data["settings"])
    text = cli("methods", slug).out
    assert all(f"\n{row['name']} " in text for row in data["settings"])
    assert "typing." not in text


def test_ranges_choices_and_the_paper_are_shown(cli):
    text = cli("methods", "softpag").out
    assert "arXiv 2506.10978, https://arxiv.org/abs/2506.10978" in text
    assert "a number, 0 to 1" in text
    assert "identity, uniform, mean-query" in text
    text = cli("methods", "block-sparse").out
    assert "any of text, first-frame, diagonal" in text and "above 0, at most 1" in text


def test_settings_of_the_method_itself_come_before_inherited_ones(cli):
    assert json.loads(cli("methods", "block-sparse", "--json").out)["settings"][0]["name"] == "density"


@pytest.mark.parametrize("slug", SLUGS)
def test_the_example_of_a_method_runs(cli, slug):
    words = shlex.split(json.loads(cli("methods", slug, "--json").out)["example"])
    assert words[0] == "dit-attn"
    outcome = cli(*words[1:], "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["methods"][0]["method"] == slug


@pytest.mark.parametrize(
    ("slug", "setting"), [("inward-window", "window="), ("re-ttention", "density="), ("slg", "layers=")]
)
def test_the_example_sets_what_the_method_is_about(cli, slug, setting):
    assert f"{slug}:{setting}" in json.loads(cli("methods", slug, "--json").out)["example"]


def test_an_unknown_method_is_named_with_the_nearest(cli):
    cli("methods", "blok-sparse").refused("'blok-sparse'", "Did you mean 'block-sparse'")


def test_a_method_defined_elsewhere_is_described_from_its_fields():
    @dataclasses.dataclass(frozen=True)
    class Plain(Method):
        """Do nothing."""

        amount: int = setting(2, "how much of it", low=1)

    Plain.slug = "plain-of-a-test"
    assert describe(Plain)["settings"] == [
        {
            "name": "amount",
            "default": 2,
            "type": "a whole number",
            "low": 1,
            "high": None,
            "choices": None,
            "help": "how much of it",
        }
    ]
