"""The files about the project agree with each other, and the package check catches what it is for."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dit_attn
from dit_attn.processors.methods import methods
from tests.packaging import check

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="tomllib is part of Python from 3.11 on")

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def pinned() -> dict[str, str]:
    """Versions of constraints.txt by name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}


def test_one_version_everywhere() -> None:
    assert PROJECT["version"] == dit_attn.__version__ == CITATION["version"]
    assert dit_attn.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_pinned_within_its_declared_range() -> None:
    declared = [Requirement(text) for text in PROJECT["dependencies"]]
    for name in ("triton", "eval", "dev", "docs"):
        declared += [Requirement(text) for text in PROJECT["optional-dependencies"][name]]
    pins = pinned()
    loose = {"types-pyyaml"}  # stubs, published by the day
    for wanted in declared:
        name = canonicalize_name(wanted.name)
        if name not in loose:
            assert name in pins, f"{name} is not in constraints.txt"
            assert wanted.specifier.contains(pins[name].removeprefix("==")), wanted


def test_every_data_file_of_the_package_is_named_in_package_data() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "dit_attn"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    data = [name.removeprefix("dit_attn/") for name in listed if name and not name.endswith(".py")]
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dit_attn"]
    assert len(data) > 50
    # fnmatch's * crosses folders, as ** does in setuptools
    assert not [name for name in data if not any(fnmatch(name, text.replace("**/", "*")) for text in patterns)]


def test_every_method_with_a_paper_is_among_the_references() -> None:
    cited = {word for reference in CITATION["references"] for word in re.findall(r"\w+", reference["notes"])}
    without_paper = {"Auto", "BlockSparse", "HeadDrop"}
    classes = {cls.__name__ for cls in methods().values() if cls.__module__.startswith("dit_attn.")}
    assert classes - without_paper <= cited


def test_the_hooks_run_the_targets_of_the_makefile() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    entries = [hook["entry"].split() for repo in config["repos"] for hook in repo["hooks"]]
    assert len(entries) == 2 and all(program == "make" and target in targets for program, target in entries)


def wheel_of(folder: Path, *names: str) -> Path:
    """A wheel with these files, all alike."""
    path = folder / "dit_attn-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*names, "dit_attn-0.1.0.dist-info/METADATA"):
            archive.writestr(name, "x")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source tree of two files."""
    folder = tmp_path / "source" / "dit_attn" / "presets"
    folder.mkdir(parents=True)
    for path in (folder / "wan.yaml", folder.parent / "__init__.py"):
        path.write_text("x")
    return tmp_path / "source"


def test_the_check_names_a_file_that_the_wheel_lacks(source: Path, tmp_path: Path) -> None:
    with pytest.raises(check.CheckFailed, match=r"lacks dit_attn/presets/wan\.yaml; add them to package-data"):
        check.check_wheel(wheel_of(tmp_path, "dit_attn/__init__.py"), source)


def test_the_check_names_a_file_that_does_not_belong_into_the_wheel(source: Path, tmp_path: Path) -> None:
    names = ("dit_attn/__init__.py", "dit_attn/presets/wan.yaml")
    check.check_wheel(wheel_of(tmp_path, *names), source)
    with pytest.raises(check.CheckFailed, match=r"not of the package: tests/test_heads\.py"):
        check.check_wheel(wheel_of(tmp_path, *names, "tests/test_heads.py"), source)


def test_the_check_refuses_a_wheel_that_is_too_large(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MAX_WHEEL_MB", 1e-6)
    with pytest.raises(check.CheckFailed, match="more than"):
        check.check_wheel(wheel_of(tmp_path, "dit_attn/__init__.py", "dit_attn/presets/wan.yaml"), source)


def test_the_check_tells_wheels_of_other_contents_apart() -> None:
    check.check_same({"a.py": "1", "x.dist-info/RECORD": "1"}, {"a.py": "1", "x.dist-info/RECORD": "2"})
    with pytest.raises(check.CheckFailed, match=r"a\.py, b\.py differ"):
        check.check_same({"a.py": "1"}, {"a.py": "2", "b.py": "1"})


def test_the_check_shows_what_a_failing_command_printed() -> None:
    with pytest.raises(check.CheckFailed, match=r"ended with 3\nno such thing"):
        check.run([sys.executable, "-c", "import sys; print('no such thing'); sys.exit(3)"])
