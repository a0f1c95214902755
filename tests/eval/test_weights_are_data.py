"""Weights from outside are read as data: a prepared file runs no code, whichever library asks for it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dit_attn.errors import DitAttnError
from dit_attn.eval.extractors import BACKBONE_FILES, Networks, _as_data, _hub_with, lpips_metric
from dit_attn.files import read_weights

PACKAGE = Path(__file__).resolve().parents[2] / "dit_attn"
RAN: list[str] = []


def note(text: str) -> None:
    RAN.append(text)


class Prepared:
    """An object whose unpickling calls a function of its choice."""

    def __reduce__(self) -> tuple[Any, ...]:
        return note, ("code ran",)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    file = tmp_path / "weights.pth"
    torch.save({"x": Prepared()}, file)
    return file


def test_a_prepared_file_is_refused_and_runs_nothing(prepared: Path) -> None:
    with pytest.raises(DitAttnError, match="no file of weights alone") as caught:
        read_weights(prepared)
    assert "\n" not in str(caught.value) and not RAN
    with pytest.raises(DitAttnError), _hub_with(prepared, BACKBONE_FILES["alex"]):
        pass
    with pytest.raises(DitAttnError), _as_data(str(prepared)):
        pass
    assert not RAN


def test_lpips_with_a_prepared_file_is_refused_and_runs_nothing(prepared: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(DitAttnError, match="LPIPS weights"):
        lpips_metric(Networks(lpips_weights=prepared))
    assert not RAN


def test_torchvisions_loader_gets_the_tensors_of_the_file(tmp_path: Path) -> None:
    weights, name = {"a": torch.randn(3)}, BACKBONE_FILES["alex"]
    torch.save(weights, tmp_path / "w.pth")
    save_file(weights, tmp_path / "w.safetensors")
    for file in (tmp_path / "w.pth", tmp_path / "w.safetensors"):
        before = torch.hub.get_dir()
        with _hub_with(file, name):
            url = f"https://download.pytorch.org/models/{name}"
            found = torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True)
        assert torch.equal(found["a"], weights["a"]) and torch.hub.get_dir() == before
        with _as_data(str(file)) as copy:
            assert copy is not None and torch.equal(torch.load(copy, weights_only=True)["a"], weights["a"])
    with _as_data(None) as nothing:
        assert nothing is None


def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "w.pth")
    with pytest.raises(DitAttnError, match="holds a list and no state dict"):
        read_weights(tmp_path / "w.pth")


def test_nothing_in_the_package_unpickles_what_it_reads() -> None:
    needed = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    never = ("pickle.load", "pickle.loads", "torch.hub.load_state_dict_from_url", "torch.hub.load", "joblib.load")
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, where = ast.unparse(node.func), f"{path.name}:{node.lineno}"
            assert name not in never, where
            if name in needed:
                flag, value = needed[name]
                given = [word.value for word in node.keywords if word.arg == flag]
                assert len(given) == 1 and isinstance(given[0], ast.Constant) and given[0].value is value, where
