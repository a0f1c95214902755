"""The package's shape: imports run downhill, importing is light, the four root links lead into the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dit_attn"

# What each part may import of the package; the parts stand in order, downhill.
TOOLS = {"errors", "files", "hub", "contact_sheet"}  # single files that every part may use
ALLOWED = {
    "cli": {"cli", "pipelines", "api", "processors", "kernels", "eval", "models", "dit_attn", *TOOLS},
    "pipelines": {"pipelines", "api", "processors", "kernels", "eval", "models", "dit_attn", *TOOLS},
    "api": {"processors", "kernels", *TOOLS},
    "processors": {"processors", "kernels", *TOOLS},
    "kernels": {"kernels", *TOOLS},
    "eval": {"eval", *TOOLS},
    "models": {"models", "eval", *TOOLS},
    "files": {"errors"},
    "hub": set(),
    "contact_sheet": set(),
    "errors": set(),
}


def imported_parts(path: Path) -> set[str]:
    """Second components of every ``dit_attn.X`` a file imports; ``"dit_attn"`` for the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            whole = node.module == "dit_attn"
            names = [f"{node.module}.{alias.name}" if whole else node.module for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "dit_attn":
                known = len(parts) > 1 and parts[1] in ALLOWED
                found.add(parts[1] if known else "dit_attn")
    return found


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_run_downhill(part: str) -> None:
    folder = PACKAGE / part
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]
    assert files
    uphill = {str(path.relative_to(ROOT)): imported_parts(path) - ALLOWED[part] for path in files}
    assert not {path: parts for path, parts in uphill.items() if parts}


def test_kernels_know_no_diffusers() -> None:
    for path in (PACKAGE / "kernels").rglob("*.py"):
        assert "diffusers" not in {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }


def test_private_diffusers_names_are_touched_in_one_file_only() -> None:
    private = ("_AttentionBackendRegistry", "AttentionProcessorRegistry", "AttentionBackendName")
    users = {p.name for p in PACKAGE.rglob("*.py") if any(name in p.read_text() for name in private)}
    assert users == {"compat.py"}


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
