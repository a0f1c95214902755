"""Run a notebook of the examples in a kernel of its own.

``python -m tests._support.example_notebook`` also stores the outputs, after a change of what the library prints.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "embedded_models.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path = NOTEBOOK) -> Any:
    """Read a notebook; cells have ``cell_type``, ``source`` and, where they hold code, ``outputs``."""
    return nbformat.read(path, as_version=4)


def execute(notebook: Any, runtime: Path) -> Any:
    """Run every cell in order, in place, and return the notebook.

    Args:
        notebook: as :func:`read` gives it.
        runtime: folder for the kernel's connection files, of a short path: the kernel talks over sockets in it.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JUPYTER_RUNTIME_DIR": str(runtime)}
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        config=Config({"KernelManager": {"transport": "ipc", "connection_file": str(runtime / "kernel.json")}}),
    )
    client.execute(env=environment)
    return notebook


def store(notebook: Any, path: Path = NOTEBOOK) -> None:
    """Write a notebook with what it printed and its images, without warnings, times and machine."""
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # the same image as image/png
    notebook.metadata = METADATA
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store(execute(read(), Path(folder)))
