"""The package's shape: imports run downhill without circles, importing is light, root links lead into the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dit_attn"

# What each part may import of the package, besides itself; the parts stand in order, downhill. The longest name counts.
_BASE = {
    "dit_attn.errors", "dit_attn.files", "dit_attn.hub", "dit_attn.machine", "dit_attn.settings",
    "dit_attn.contact_sheet", "dit_attn.remote", "dit_attn",
}  # fmt: skip
_KERNELS = _BASE | {"dit_attn.kernels"}
_CORE = _KERNELS | {"dit_attn.processors", "dit_attn.processors.core"}
_GUIDANCE = _CORE | {"dit_attn.processors.guidance"}
_METHODS = _GUIDANCE | {"dit_attn.processors.methods"}
_ATTACH = _METHODS | {"dit_attn.processors.attach"}
_API = _ATTACH | {"dit_attn.api"}
_PIPELINES = _API | {"dit_attn.pipelines", "dit_attn.eval", "dit_attn.models"}
ALLOWED = {
    "dit_attn.cli": _PIPELINES | {"dit_attn.cli"},
    "dit_attn.pipelines": _PIPELINES,
    "dit_attn.integrations": _API | {"dit_attn.integrations"},
    "dit_attn.api": _API,
    "dit_attn.processors.attach": _ATTACH,
    "dit_attn.processors.methods": _METHODS,
    "dit_attn.processors.guidance": _GUIDANCE,
    "dit_attn.processors.core": _CORE,
    "dit_attn.processors": _METHODS,
    "dit_attn.kernels": _KERNELS,
    "dit_attn.eval": _BASE | {"dit_attn.eval"},
    "dit_attn.models": _BASE | {"dit_attn.eval", "dit_attn.models"},
    "dit_attn.contact_sheet": {"dit_attn.errors", "dit_attn.files"},
    "dit_attn.files": {"dit_attn.errors", "dit_attn.remote"},
    "dit_attn.hub": {"dit_attn.errors"},
    "dit_attn.machine": set(),
    "dit_attn.remote": {"dit_attn.errors"},
    "dit_attn.settings": {"dit_attn.errors"},
    "dit_attn.errors": set(),
}
NO_DIFFUSERS = ("kernels", "processors/core", "processors/methods", "processors/guidance")


@cache
def modules() -> dict[str, Path]:
    """Every file of the package by its module name."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, wherever the statement stands: lazily and for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """The file of the package that a full name lies in."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


def part_of(module: str) -> str:
    return max((part for part in (*ALLOWED, "dit_attn") if f"{module}.".startswith(f"{part}.")), key=len)


@cache
def edges() -> dict[str, set[str]]:
    """The files of the package that each file imports."""
    found = {name: {module_of(target) for target in imports(path)} for name, path in modules().items()}
    return {name: {target for target in targets if target and target != name} for name, targets in found.items()}


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_run_downhill(part: str) -> None:
    files = [name for name in modules() if part_of(name) == part]
    assert files
    uphill = [(a, b) for a in files for b in edges()[a] if part_of(b) not in {*ALLOWED[part], part}]
    assert not uphill


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(edges()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("folder", NO_DIFFUSERS)
def test_the_mathematics_knows_no_diffusers(folder: str) -> None:
    users = {path.name for path in (PACKAGE / folder).rglob("*.py") for name in imports(path) if "diffusers" in name}
    assert not users


def test_private_diffusers_names_are_touched_in_one_file_only() -> None:
    private = ("_AttentionBackendRegistry", "AttentionProcessorRegistry", "AttentionBackendName")
    users = {p.name for p in PACKAGE.rglob("*.py") if any(name in p.read_text() for name in private)}
    assert users == {"compat.py"}


def test_a_method_is_named_in_its_own_file_only() -> None:
    """``isinstance`` of a method class is a question for the method: phases, role, cache."""
    from dit_attn.processors.methods import methods

    files = {cls.__name__: cls.__module__ for kind in methods().values() for cls in kind.__mro__[:-1]}
    asked = []
    for module, path in modules().items():
        names = {name for name, home in files.items() if home != module} - {"Method"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                kinds = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
                asked += [f"{path}:{node.lineno}"] if kinds & names else []
    assert not asked


def test_every_method_is_on_the_front_pages() -> None:
    import dit_attn
    from dit_attn import processors
    from dit_attn.processors.methods import methods

    shipped = {cls.__name__ for cls in methods().values() if cls.__module__.startswith("dit_attn.")}
    assert shipped <= set(processors.__all__) and shipped <= set(dit_attn.__all__)
    assert all(getattr(processors, name) is getattr(dit_attn, name) for name in shipped)


def test_every_test_folder_mirrors_a_folder_of_the_package() -> None:
    """``families`` stands at the top, since its files are of all parts."""
    own = {"_support", "families", "packaging", "readers", "upstream"}
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [str(f) for f in folders if f.parts and f.parts[0] not in own and not (PACKAGE / f).is_dir()]


def test_core_and_attach_have_a_test_file_beside_each_file() -> None:
    for part in ("core", "attach"):
        files = {path.stem for path in (PACKAGE / "processors" / part).glob("*.py")} - {"__init__"}
        tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests/processors" / part).glob("test_*.py")}
        assert files <= tested, files - tested


def test_importing_the_package_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import time, sys; t = time.process_time(); import dit_attn; s = time.process_time() - t;"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; assert s < 0.3, s; dir(dit_attn); print(dit_attn.__version__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_name_can_be_loaded() -> None:
    import dit_attn

    for name in dit_attn.__all__:
        assert getattr(dit_attn, name) is not None


def test_root_links_lead_into_the_package() -> None:
    for name in ("processors", "kernels", "pipelines", "eval"):
        link = ROOT / name
        assert link.is_symlink() and link.resolve() == PACKAGE / name
