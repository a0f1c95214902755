"""Write the kernels as a kernel repository of the Hugging Face Hub: ``make hub-kernel``.

``kernels.get_local_kernel(folder)`` loads it, and ``kernels.get_kernel("org/name")`` once it is uploaded. It is one
folder for every device: the kernels are Triton and torch, nothing is compiled beforehand. The names of its operators
are its own, so that it can be loaded in a process that has dit_attn too.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
from pathlib import Path

from dit_attn import __version__
from dit_attn.errors import DitAttnError
from dit_attn.files import atomic_folder, report_os_error, write_text

VARIANT = "torch-universal"
_ROOT = Path(__file__).resolve().parents[1]  # of the package
_IMPORT = re.compile(r"^(\s*)from dit_attn(\.[\w.]+)? import", re.MULTILINE)
_OPERATORS = re.compile(r"dit_attn::|torch\.ops\.dit_attn\.")
_CARD = """---
license: apache-2.0
tags: [kernel]
---

# dit_attn kernels

Block-sparse attention with compensation for skipped blocks, block selection and linear attention, in Triton, with CPU
paths in torch.

    from kernels import get_kernel

    kernel = get_kernel("org/dit-attn")
    plan = kernel.plan_blocks(q, k, density=0.25, q_block=128, kv_block=128)  # (B, S, H, D)
    out = kernel.sparse_attention(q, k, v, plan.layout)

Written from dit_attn {version}.
"""


def write_kernel(folder: str | Path) -> Path:
    """Write the kernel repository; what is at the place is replaced.

    Args:
        folder: the repository: ``README.md`` and ``build/torch-universal``.

    Returns:
        The folder of the variant, ``build/torch-universal``.

    Raises:
        DitAttnError: it cannot be written, or is a folder of something else.
    """
    folder = Path(folder)
    taken = any(folder.iterdir()) if folder.is_dir() else folder.exists()
    if taken and not _is_ours(folder):
        raise DitAttnError(f"{folder} exists and holds no kernel of dit_attn; give an empty or a new folder")
    sources = {name: (_ROOT / name).read_text(encoding="utf-8") for name in reachable("kernels/__init__.py")}
    digest = hashlib.sha256("".join(f"{name}\n{text}" for name, text in sorted(sources.items())).encode()).hexdigest()
    name = f"_dit_attn_{digest[:8]}"
    meta = {
        "name": "dit-attn", "id": f"{name}_universal", "version": 1, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": "cpu"},
    }  # fmt: skip
    named = {file: _OPERATORS.sub(lambda found: found[0].replace("dit_attn", name), t) for file, t in sources.items()}
    texts = {file: relative_imports(file, text) for file, text in named.items()}
    texts["__init__.py"] = _front(sources["kernels/__init__.py"])
    texts["metadata.json"] = json.dumps(meta, indent=2) + "\n"
    with report_os_error(f"write {folder}", "give another folder"), atomic_folder(folder) as part:
        write_text(part / "README.md", _CARD.format(version=__version__))
        for file, text in texts.items():
            target = part / "build" / VARIANT / file
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, text)
    return folder / "build" / VARIANT


def reachable(start: str) -> list[str]:
    """Return the files of the package that a file imports, and itself; the packages they lie in too.

    Args:
        start: path in the package.
    """
    found, waiting = set[str](), [start]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse((_ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dit_attn":
                assert node.module is not None
                waiting += _files(node.module, [alias.name for alias in node.names])
        waiting += [f"{parent}/__init__.py" for parent in map(str, Path(name).parents) if parent != "."]
    return sorted(found)


def relative_imports(name: str, text: str) -> str:
    """Return a file with its imports of the package written relative to itself.

    Args:
        name: path in the package.
        text: its contents.
    """
    dots = "." * len(Path(name).parts)
    return _IMPORT.sub(lambda found: f"{found[1]}from {dots}{(found[2] or '')[1:]} import", text)


def _files(module: str, names: list[str]) -> list[str]:
    """Files behind ``from module import names``, of those in the package."""
    folder = "/".join(module.split(".")[1:])
    files = [f"{folder}/{name}.py".lstrip("/") for name in names]
    own = [f"{folder}.py", f"{folder}/__init__.py"] if folder else []
    return [file for file in (*files, *own) if (_ROOT / file).is_file()]


def _front(text: str) -> str:
    """The first file of the repository: what ``dit_attn.kernels`` exports."""
    names = next(
        ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    listed = "".join(f"    {name},\n" for name in names)
    quoted = "".join(f'    "{name}",\n' for name in names)
    return f'"""Kernels of dit_attn."""\n\nfrom .kernels import (\n{listed})\n\n__all__ = [\n{quoted}]\n'


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a repository that :func:`write_kernel` wrote."""
    try:
        return json.loads((folder / "build" / VARIANT / "metadata.json").read_text()).get("name") == "dit-attn"
    except (OSError, ValueError):
        return False


def main() -> int:
    """Write the repository to the folder that is given."""
    parser = argparse.ArgumentParser(description="Write the kernels as a kernel repository of the Hugging Face Hub.")
    parser.add_argument("folder", type=Path)
    try:
        print(write_kernel(parser.parse_args().folder))
    except DitAttnError as error:
        print(f"hub-kernel: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
