"""The pages say what is true: their code runs, their commands parse, their tables name what there is."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import dit_attn
from dit_attn import cli, kernels, models
from dit_attn.cli import COMMANDS, options
from dit_attn.cli.parser import Parser
from dit_attn.kernels.backends import registry
from dit_attn.processors.attach.families import Family
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.cfg import BATCHED, SEPARATE, CFGRule
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from dit_attn.processors.methods import base, methods
from dit_attn.processors.methods.perturbed_guidance import PerturbedGuidance
from dit_attn.processors.methods.sparse import SparseMethod
from tests._support.code_blocks import CodeBlock, code_blocks
from tests._support.compose import forward, same, tiny
from tests._support.recorded_calls import reference, requests

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PYTHON = [block for page in PAGES for block in code_blocks(page, "python")]
COMMAND_LINES = [block for page in PAGES for block in code_blocks(page, "bash")]
METHOD_PAGES = {slug: DOCS / "methods" / f"{slug.replace('-', '_')}.md" for slug in methods()}


def block(page: str, first: str) -> CodeBlock:
    """The Python block of a page that begins with ``first``."""
    return next(found for found in code_blocks(DOCS / page, "python") if found.text.startswith(first))


# -- every block runs --------------------------------------------------------------------------------------------------


def runs(block: CodeBlock) -> bool:
    """Whether the test below runs a block; the others say why not, or which test or fixture here runs them."""
    return not block.note.startswith(("not run: ", "run by: "))


@pytest.fixture
def small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded models make two steps at half of their size, so that a page takes seconds; methods stay sparse."""
    stock = models.call_defaults

    def small(name: str) -> dict[str, Any]:
        call = stock(name)
        side = max(32, call["height"] // 2)  # videos are as small as their latents can be
        return {**call, "num_inference_steps": 2, "height": side, "width": side}

    monkeypatch.setattr(models, "call_defaults", small)


RUNNABLE = [page for page in PAGES if any(runs(found) for found in code_blocks(page, "python"))]


@pytest.mark.parametrize("page", RUNNABLE, ids=[page.relative_to(ROOT).as_posix() for page in RUNNABLE])
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: Path, small_calls: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for found in code_blocks(page, "python"):
        if runs(found):
            exec(found.compiled(), names)


@pytest.mark.parametrize("found", PYTHON, ids=str)
def test_every_block_is_run_or_says_why_not(found: CodeBlock) -> None:
    found.compiled()
    kind, _, rest = found.note.partition(": ")
    if kind == "run by":
        assert rest in globals()
    elif kind == "not run":
        assert len(rest) > 10


def commands(found: CodeBlock) -> list[list[str]]:
    """The ``dit-attn`` commands of a block, as words."""
    lines = found.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["dit-attn"]]


@pytest.mark.parametrize("found", [b for b in COMMAND_LINES if commands(b)], ids=str)
def test_every_command_line_is_one_that_the_parser_takes(found: CodeBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = cli._module
    taken: list[Any] = []

    def without_run(name: str) -> Any:
        return SimpleNamespace(add_arguments=stock(name).add_arguments, run=lambda args: taken.append(args) or 0)

    monkeypatch.setattr(cli, "_module", without_run)
    monkeypatch.setattr(options, "_check_path", lambda *_: None)  # files and folders are those of the reader
    for words in commands(found):
        assert cli.main(words) == 0, words
    assert len(taken) == len(commands(found))


def known_flags(parser: Any) -> set[str]:
    """Every flag of a parser and of its subcommands."""
    found: set[str] = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action.choices, dict):
            found.update(*(known_flags(choice) for choice in action.choices.values()))
    return found


def test_every_flag_that_a_page_names_exists() -> None:
    known = {"--debug", "--tiny", "--num-processes"}  # of every command, of examples/, of accelerate
    known |= {"--run", "--count"}  # of python -m dit_attn.models.evaluate
    known |= {"--what"}  # of python -m tests._support.subjects_benchmark
    known |= {"--quick", "--densities", "--points"}  # of python -m dit_attn.pipelines.finetune.curves
    for name in COMMANDS:
        parser = Parser(prog=name)
        cli._module(name).add_arguments(parser)
        known |= known_flags(parser)
    pages = [page for page in PAGES if page.name != "CONTRIBUTING.md"]
    named = {(page.name, flag) for page in pages for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text())}
    assert not [pair for pair in sorted(named) if pair[1] not in known]


# -- settings ----------------------------------------------------------------------------------------------------------


def shown_settings(page: Path) -> dict[str, str]:
    """Settings in the tables of a page, with their defaults."""
    return dict(re.findall(r"^\| `(\w+)` \| `([^|]*)` \|", page.read_text(), re.MULTILINE))


@pytest.mark.parametrize("slug", METHOD_PAGES)
def test_every_setting_and_its_default_is_on_the_page_of_the_method(slug: str) -> None:
    cls = methods()[slug]
    shared = next(kind for kind in (SparseMethod, PerturbedGuidance, base.Method) if issubclass(cls, kind))
    inherited = {spec.name: repr(spec.default) for spec in dataclasses.fields(shared)}
    own = {spec.name: repr(spec.default) for spec in dataclasses.fields(cls)}
    expected = {name: default for name, default in own.items() if inherited.get(name) != default}
    assert shown_settings(METHOD_PAGES[slug]) == expected


def test_the_settings_that_methods_share_are_on_their_page() -> None:
    shown = shown_settings(DOCS / "methods" / "index.md")
    expected = {
        spec.name: repr(spec.default) for kind in (SparseMethod, PerturbedGuidance) for spec in dataclasses.fields(kind)
    }
    assert shown == expected


@pytest.mark.parametrize("slug", METHOD_PAGES)
def test_every_method_has_a_page_with_the_same_sections(slug: str) -> None:
    text = METHOD_PAGES[slug].read_text()
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert sections == ["What it computes", "When to use it", "Settings", "Measured", "What failed", "Cite"]
    assert f"`dit_attn.{methods()[slug].__name__}`, slug `{slug}`" in text and "../images/" in text


# -- the pages about extending -----------------------------------------------------------------------------------------


@pytest.fixture
def first_frame(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of the page, registered for one test only."""
    monkeypatch.setattr(base, "REGISTRY", dict(base.REGISTRY))
    module = types.ModuleType("dit_attn.processors.methods.first_frame")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block("extend/add_a_method.md", '"""Every block').compiled(), module.__dict__)
    return module.FirstFrame  # type: ignore[attr-defined]


@pytest.fixture
def lift_text(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The other class of the page, likewise."""
    monkeypatch.setattr(base, "REGISTRY", dict(base.REGISTRY))
    module = types.ModuleType("dit_attn.processors.methods.lift_text")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block("extend/add_a_method.md", '"""Image rows attend more to').compiled(), module.__dict__)
    return module.LiftText  # type: ignore[attr-defined]


def test_the_bias_of_the_page_is_its_formula(lift_text: Any) -> None:
    model, args = tiny("cogvideox")
    dit_attn.enable(model, lift_text(factor=4.0, apart=True))
    with requests() as seen:
        forward(model, args)
    assert len(seen) == len(dit_attn.summary(model).layers)
    for call, request, result in seen:
        text = next(span for span in call.tokens.spans if span.kind == "text")
        first, width = call.visual.start, call.tokens.grid[2]
        bias = torch.zeros(1, 1, call.q.shape[1], call.q.shape[1])
        bias[:, :, call.visual, text.start : text.stop] = torch.tensor(4.0).log()
        bias[:, :, text.start : text.stop, first : first + width] = -torch.inf
        torch.testing.assert_close(result.double(), reference(call, request, bias), atol=2e-5, rtol=1e-4)
    stock = dit_attn.enable(model, lift_text(factor=1.0))
    assert same(forward(model, args), forward(model, args)) and stock.layers[0].stats.fallbacks


@pytest.fixture
def lift_prompt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class for cross attention, likewise."""
    monkeypatch.setattr(base, "REGISTRY", dict(base.REGISTRY))
    module = types.ModuleType("dit_attn.processors.methods.lift_prompt")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block("extend/add_a_method.md", '"""The left half').compiled(), module.__dict__)
    return module.LiftPrompt  # type: ignore[attr-defined]


def test_the_cross_attention_bias_of_the_page_is_its_formula(lift_prompt: Any) -> None:
    model, args = tiny("pixart")
    dit_attn.enable(model, lift_prompt(factor=4.0))
    with requests() as seen:
        forward(model, args)
    assert len(seen) == len(dit_attn.summary(model).cross_layers) == 2
    for call, request, result in seen:
        t, h, w = call.tokens.grid
        bias = torch.zeros(t, h, w, call.k.shape[1])
        bias[:, :, : w // 2, :3] = torch.tensor(4.0).log()
        expected = reference(call, request, bias.flatten(0, 2)[None, None])
        torch.testing.assert_close(result.double(), expected, atol=2e-5, rtol=1e-4)


@pytest.fixture
def lift_words(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of the page about prompts, likewise."""
    monkeypatch.setattr(base, "REGISTRY", dict(base.REGISTRY))
    module = types.ModuleType("dit_attn.processors.methods.lift_words")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block("prompt_spans.md", '"""Some words').compiled(), module.__dict__)
    return module.LiftWords  # type: ignore[attr-defined]


def test_the_lifted_words_of_the_page_are_those_of_its_spans(lift_words: Any) -> None:
    pipe, prompt = models.load("tiny-joint"), "a red cube and a blue ball"
    spans = dit_attn.spans(pipe, prompt, "blue ball")
    with requests() as seen:
        names = {"dit_attn": dit_attn, "pipe": pipe, "LiftWords": lift_words}
        exec(block("prompt_spans.md", "with dit_attn.enabled").compiled(), names)
    assert seen
    for call, request, result in seen[:2]:
        text = next(span.start for span in call.tokens.spans if span.kind == "text")
        keys = [text + position for span in spans for position in span.positions]
        bias = torch.zeros(call.q.shape[0], 1, call.q.shape[1], call.q.shape[1])
        for row, branch in enumerate(call.branches):
            if branch == "cond":
                bias[row, 0, call.visual, keys] = torch.tensor(3.0).log()
        torch.testing.assert_close(result.double(), reference(call, request, bias), atol=2e-5, rtol=1e-4)


@pytest.fixture
def native_range(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class that moves positions, likewise."""
    monkeypatch.setattr(base, "REGISTRY", dict(base.REGISTRY))
    module = types.ModuleType("dit_attn.processors.methods.native_range")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block("extend/add_a_method.md", '"""Place a larger').compiled(), module.__dict__)
    return module.NativeRange  # type: ignore[attr-defined]


def test_the_positions_of_the_page_are_those_of_the_model_at_a_smaller_size(native_range: Any) -> None:
    model, args = tiny("flux")
    stock = forward(model, args)
    ids = args["img_ids"].clone()
    ids[:, 1] *= 8 / 16
    expected = forward(model, args, img_ids=ids)
    dit_attn.enable(model, native_range(height=8, width=18))
    torch.testing.assert_close(forward(model, args), expected, atol=2e-5, rtol=1e-4)
    dit_attn.enable(model, native_range())
    assert same(stock, forward(model, args))


@pytest.fixture
def learn_text(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class that learns, likewise."""
    monkeypatch.setattr(base, "REGISTRY", dict(base.REGISTRY))
    module = types.ModuleType("dit_attn.processors.methods.learn_text")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block("extend/add_a_method.md", '"""Image rows attend more or less').compiled(), module.__dict__)
    return module.LearnText  # type: ignore[attr-defined]


def test_the_training_of_the_page_moves_the_tensors_and_brings_them_back(
    learn_text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, args = tiny("cogvideox")
    batches = [(args, forward(model, args) + 1)] * 2
    names = {"dit_attn": dit_attn, "torch": torch, "transformer": model, "batches": batches}
    exec(block("compose.md", 'session = dit_attn.enable(transformer, "learn-text")').compiled(), names)
    tensors = [x for name, x in model.named_parameters() if name.startswith("dit_attn.learn_text.")]
    assert len(tensors) == len(dit_attn.summary(model).layers) and all(x.any() for x in tensors)
    assert learn_text(weights="runs/text") == dit_attn.Method.from_pretrained("runs/text")


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_the_method_of_the_page_runs_and_equals_its_mask(first_frame: Any, name: str) -> None:
    model, args = tiny(name)
    stock = forward(model, args)
    dit_attn.enable(model, first_frame(q_block=32, kv_block=32, dense_steps=0))
    with requests() as seen:
        out = forward(model, args)
    assert len(seen) == len(dit_attn.summary(model).layers) and not same(out, stock)
    for call, request, result in seen:
        torch.testing.assert_close(result.double(), reference(call, request), atol=2e-5, rtol=1e-4)
        assert request.layout is not None and 0.0 < request.layout.density < 1.0
    dit_attn.disable(model)
    assert same(stock, forward(model, args))


def test_the_method_of_the_page_is_known_by_its_slug_and_checks_its_settings(first_frame: Any) -> None:
    assert dit_attn.Method.from_dict({"method": "first-frame", "text": False}) == first_frame(text=False)
    with pytest.raises(dit_attn.DitAttnError, match=r"first-frame\.text must be true or false, got 3"):
        first_frame(text=3)


def test_the_family_of_the_page_is_a_row(monkeypatch: Any) -> None:
    names = {"Family": Family, "TokenLayout": TokenLayout, "Span": Span, "visual_span": visual_span}
    names |= {"SEPARATE": SEPARATE, "BATCHED": BATCHED, "CFGRule": CFGRule}
    code = block("extend/add_a_family.md", "def _my_model").text.replace("\nFamily(", "\nrow = Family(")
    exec(compile(code, "family.md", "exec"), names)
    row: Any = names["row"]
    layout = row.layout(SimpleNamespace(patch_size=2), {"hidden_states": torch.empty(1, 4, 3, 8, 10)})
    tokens = layout.resolve(7 + 3 * 4 * 5)
    assert [(span.kind, span.length) for span in tokens.spans] == [("text", 7), ("video", 60)]


def test_every_field_of_a_family_and_part_of_a_request_is_on_its_page() -> None:
    family, method = ((DOCS / "extend" / name).read_text() for name in ("add_a_family.md", "add_a_method.md"))
    assert not [field.name for field in dataclasses.fields(Family) if f"{field.name}=" not in family]
    internal = {"causal", "declined", "max_error"}
    for kind, name in ((AttentionCall, "call"), (Request, "request")):
        told = set(re.findall(rf"`{name}\.(\w+)", method))
        assert {field.name for field in dataclasses.fields(kind)} - internal <= told
        assert not [part for part in told if not hasattr(kind, part) and part not in kind.__annotations__]


@pytest.fixture
def masked_sdpa(monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of the page, registered for one test only; its name."""
    monkeypatch.setattr(registry, "BACKENDS", before := dict(registry.BACKENDS))
    monkeypatch.setattr(kernels.functional, "BACKENDS", before)
    exec(block("extend/add_a_backend.md", '"""Run a layout').compiled(), {"__name__": "masked_sdpa"})
    return "masked-sdpa"


@pytest.mark.parametrize("heads", [2, 4])
def test_the_backend_of_the_page_equals_the_reference(masked_sdpa: str, heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 100, 4, 16), torch.randn(2, 90, heads, 16), torch.randn(2, 90, heads, 16)
    mask = torch.rand(2, 4, 4, 3) < 0.5
    mask[:, :, 1] = False
    layout = kernels.BlockLayout.from_mask(mask, q_len=100, kv_len=90, q_block=32, kv_block=32)
    expected, lse = kernels.sparse_attention(q, k, v, layout, backend="reference", return_lse=True)
    out = kernels.sparse_attention(q, k, v, layout, backend=masked_sdpa)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    assert (lse[:, :, 32:64] == float("-inf")).all() and not out[:, 32:64].any()


def test_the_backend_of_the_page_says_what_it_cannot_do(masked_sdpa: str) -> None:
    q = torch.randn(1, 64, 2, 16)
    layout = kernels.BlockLayout.from_mask(torch.ones(1, 1, 2, 2).tril().bool(), 64, 64, 32, 32)
    assert "masked-sdpa: builds an S x S mask; only on request" in str(kernels.choose_backend(q, layout))
    with pytest.raises(dit_attn.DitAttnError, match="backend 'masked-sdpa' cannot run this call: it has no LSE output"):
        kernels.sparse_attention(q, q, q, layout, backend=masked_sdpa, return_lse=True)


def test_the_package_names_pages_that_exist() -> None:
    sources = sorted((ROOT / "dit_attn").rglob("*.py"))
    named = {name for path in sources for name in re.findall(r"\bdocs/[\w/]+\.(?:md|png)", path.read_text())}
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_every_command_is_in_the_table_of_commands() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|", (DOCS / "cli.md").read_text(), re.MULTILINE)
    assert not [name for name in COMMANDS if name not in rows]


# -- the site ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("../benchmarks/record.json", ""),
        ("other.md#part", ""),
        ("../benchmarks/absent.json", "the target is not found"),
        ("absent.md", "the target is not found"),
        ("other.md#absent", "does not contain an anchor"),
    ],
)
def test_a_link_to_a_record_works_and_a_broken_one_fails_the_build(tmp_path: Path, link: str, problem: str) -> None:
    pytest.importorskip("mkdocs", reason="the docs group is not installed")
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    config = {"site_name": "x", "theme": "mkdocs", "plugins": [], "validation": config["validation"]}
    config["hooks"] = [str(DOCS / "hooks" / "repository.py")]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    for name, text in {
        "docs/index.md": f"[a]({link}) [b](other.md)",
        "docs/other.md": "# Other\n\n## Part",
        "benchmarks/record.json": "{}",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    build = re.search(r"mkdocs (build .*--strict)", (ROOT / "Makefile").read_text())
    assert build is not None and "--quiet" not in build.group(1)  # which would silence what strict counts
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *build.group(1).split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode != 0) == bool(problem) and problem in done.stderr
    if link.endswith("record.json"):
        assert (tmp_path / "site" / "benchmarks" / "record.json").read_text() == "{}"
        assert 'href="benchmarks/record.json"' in (tmp_path / "site" / "index.html").read_text()
