"""Build the wheel and the sdist, install the wheel into a fresh environment, and run it there.

``make package`` runs this. It needs a package index (or a local mirror) for the dependencies, and no GPU. Every step
prints one line; the first that fails ends the run with exit code 1 and says what is wrong.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

from tests._support.code_blocks import code_blocks

ROOT = Path(__file__).resolve().parents[2]
MAX_WHEEL_MB = 44.0  # most of it weights of the embedded models; `tiny-multi` alone is 15, `tiny-edit` 6
OUTSIDE = ("tests/", "docs/", "benchmarks/", "examples/")  # folders that belong to the repository, not to the wheel


def main() -> int:
    """Run every check in a temporary folder; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="dit_attn_package_") as name:
        folder = Path(name)
        try:
            check(folder)
        except CheckFailed as problem:
            print(f"package: FAILED: {problem}", file=sys.stderr)
            return 1
    print("package: ok")
    return 0


class CheckFailed(Exception):
    """A check of the package failed."""


def check(folder: Path) -> None:
    """Build, compare, install and run; ``folder`` takes everything that is written.

    Raises:
        CheckFailed: with the first thing that is wrong.
    """
    started = time.perf_counter()
    source = copy_sources(ROOT, folder / "source")
    wheel, sdist = build(source, "wheel", folder / "dist"), build(source, "sdist", folder / "dist")
    check_wheel(wheel, source)
    size = wheel.stat().st_size / 1e6
    step(started, f"{wheel.name}: {size:.1f} MB, {len(contents(wheel))} files, every data file is in it")
    again = build(unpack(sdist, folder / "unpacked"), "wheel", folder / "from_sdist")
    check_same(contents(wheel), contents(again))
    step(started, f"{sdist.name}: builds the same wheel")
    python = install(wheel, folder / "venv")
    step(started, "installed into a fresh environment, with the declared dependencies alone")
    run_outside(python, folder / "elsewhere")
    step(started, "the README's snippet and `dit-attn demo` ran there")


def copy_sources(root: Path, target: Path) -> Path:
    """Copy the files that git tracks or would track, so that no left-over of an earlier build takes part."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root)
    for name in filter(None, listed.split("\0")):
        path = root / name
        if path.is_file() and not path.is_symlink() and not name.startswith(OUTSIDE):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / name)
    return target


def build(source: Path, kind: str, target: Path) -> Path:
    """Build a distribution from a source tree, in an isolated environment as pip does; return its file.

    Args:
        source: folder with pyproject.toml.
        kind: ``wheel`` or ``sdist``.
        target: folder for the file.
    """
    run([sys.executable, "-m", "build", f"--{kind}", "--outdir", str(target), str(source)])
    return next(target.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


def check_wheel(wheel: Path, source: Path) -> None:
    """Compare a wheel with the source tree: every file of the package, nothing else, and not too large.

    Raises:
        CheckFailed: a file is missing, a file does not belong there, or the wheel is too large.
    """
    packed = {name for name in contents(wheel) if ".dist-info/" not in name}
    tracked = {path.relative_to(source).as_posix() for path in (source / "dit_attn").rglob("*") if path.is_file()}
    if missing := sorted(tracked - packed):
        raise CheckFailed(f"{wheel.name} lacks {', '.join(missing[:5])}; add them to package-data in pyproject.toml")
    if extra := sorted(packed - tracked):
        raise CheckFailed(f"{wheel.name} has files that are not of the package: {', '.join(extra[:5])}")
    size = wheel.stat().st_size / 1e6
    if size > MAX_WHEEL_MB:
        raise CheckFailed(f"{wheel.name} has {size:.1f} MB, more than {MAX_WHEEL_MB:.0f}")


def check_same(left: Mapping[str, str], right: Mapping[str, str]) -> None:
    """Compare the files of two wheels, all but the list of hashes.

    Raises:
        CheckFailed: they differ.
    """
    differ = sorted(
        name for name in {*left, *right} if not name.endswith("/RECORD") and left.get(name) != right.get(name)
    )
    if differ:
        raise CheckFailed(f"the sdist builds another wheel; {', '.join(differ[:5])} differ (see MANIFEST.in)")


def contents(wheel: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a wheel by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if not name.endswith("/")
        }


def unpack(sdist: Path, target: Path) -> Path:
    """Unpack an sdist; return its top folder."""
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    return next(target.iterdir())


def install(wheel: Path, target: Path) -> Path:
    """Install a wheel and its declared dependencies (versions of constraints.txt) into a new environment.

    Returns:
        The environment's interpreter.
    """
    run([sys.executable, "-m", "venv", str(target)])
    python = target / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    run([*pip, "-c", str(ROOT / "constraints.txt"), str(wheel)])
    run([str(python), "-m", "pip", "check"])
    return python


def run_outside(python: Path, folder: Path) -> None:
    """Run the README's snippet of the embedded models and ``dit-attn demo`` outside of the repository.

    Raises:
        CheckFailed: one of them fails, or the package that is imported is not the installed one.
    """
    folder.mkdir()
    where = run([str(python), "-c", "import dit_attn; print(dit_attn.__file__)"], cwd=folder).strip()
    if not Path(where).is_relative_to(python.parents[1]):
        raise CheckFailed(f"the imported package is {where}, not the installed wheel")
    snippet = next(block.text for block in code_blocks(ROOT / "README.md", "python") if "models.load(" in block.text)
    run([str(python), "-c", snippet], cwd=folder)
    command = [str(python.parent / "dit-attn"), "demo", "--steps", "6", "--output", "demo"]
    run(command, cwd=folder)
    if not (folder / "demo" / "demo.png").is_file():
        raise CheckFailed("dit-attn demo wrote no demo.png")


def run(command: list[str], cwd: Path | None = None) -> str:
    """Run a command without this process's paths and without a network for models; return its standard output.

    Raises:
        CheckFailed: it fails; the message has the end of what it printed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise CheckFailed(f"{' '.join(command)[:200]} ended with {done.returncode}\n{tail}")
    return done.stdout


def step(started: float, text: str) -> None:
    """Print one line about a step that is done, with the seconds since the start."""
    print(f"package: {text} ({time.perf_counter() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
