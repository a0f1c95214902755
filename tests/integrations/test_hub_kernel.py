"""The kernel repository for the Hub: it stands alone, computes what the package computes, and ``kernels`` loads it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dit_attn import kernels
from dit_attn.errors import DitAttnError
from dit_attn.integrations.hub_kernel import VARIANT, main, write_kernel

LOAD = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
kernel = get_local_kernel(Path(sys.argv[1]))
q = torch.randn(1, 512, 2, 32)
layout = kernel.plan_blocks(q, q, density=0.25, q_block=64, kv_block=64).layout
out, _ = kernel.reference_attention(q, q, q, layout)
assert torch.allclose(kernel.sparse_attention(q, q, q, layout), out, atol=1e-5)
assert not [name for name in sys.modules if name.split(".")[0] == "dit_attn"]
print(kernel.__name__)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel repository."""
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    assert write_kernel(folder) == folder / "build" / VARIANT
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> ModuleType:
    """It, imported by its path under the name in its metadata."""
    variant = folder / "build" / VARIANT
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_imports_nothing_of_the_package_by_name(folder: Path) -> None:
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 40
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] in ("dit_attn", "diffusers")], file


def test_it_has_every_public_name_and_gives_the_same_bits_beside_the_package(loaded: ModuleType) -> None:
    assert loaded.__all__ == kernels.__all__
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 300, 2, 32, generator=generator)
    found = []
    for module in (kernels, loaded):
        layout = module.plan_blocks(q, k, density=0.25, q_block=64, kv_block=64).layout
        pooled = module.pooled_compensation(k, v, 16)
        found.append(module.sparse_attention(q, k, v, layout, compensation=pooled))
    assert torch.equal(*found)


def test_its_card_says_how_to_call_it(folder: Path, loaded: ModuleType) -> None:
    q = k = v = torch.randn(1, 300, 2, 32)
    lines = [line.strip() for line in (folder / "README.md").read_text().splitlines() if line.startswith("    ")]
    scope = {"kernel": loaded, "q": q, "k": k, "v": v}
    exec("\n".join(line for line in lines if "get_kernel" not in line), scope)
    assert scope["out"].shape == q.shape  # type: ignore[attr-defined]


def test_kernels_loads_it(folder: Path, tmp_path: Path) -> None:
    try:
        version("kernels")
    except PackageNotFoundError:
        pytest.skip("the package kernels is not installed")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}  # without the folder kernels of this repository
    command = [sys.executable, "-P", "-c", LOAD, str(folder)]
    told = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert told.returncode == 0 and told.stdout.startswith("_dit_attn_"), told.stderr


def test_it_replaces_itself_and_nothing_else(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write_kernel(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    monkeypatch.setattr(sys, "argv", ["hub-kernel", str(other)])
    assert main() == 2 and "holds no kernel of dit_attn" in capsys.readouterr().err
    with pytest.raises(DitAttnError, match="holds no kernel"):
        write_kernel(other / "thesis.txt")
