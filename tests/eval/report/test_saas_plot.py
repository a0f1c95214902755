"""The plot of a SaaS report: a file of three panels, and one line where there is nothing to draw."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from dit_attn.errors import DitAttnError
from dit_attn.eval.report import saas_plot
from dit_attn.processors.methods.saas_report import PieceTrace

TRACE = PieceTrace("a red cube", 0, [0, 1], [0.1, 0.2], [0.4, 0.3], [4.0, 1.5], [4.0, 1.0], [0.9, 0.3], [0.1, 0.1])


def test_a_report_is_drawn_to_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    saas_plot.draw([TRACE, TRACE], tmp_path / "saas.png")
    with Image.open(tmp_path / "saas.png") as drawn:
        assert drawn.width > 2 * drawn.height
    with pytest.raises(DitAttnError, match=r"cannot draw to .*; give a writable \.png or \.svg file"):
        saas_plot.draw([TRACE], tmp_path / "none" / "saas.png")


def test_nothing_to_draw_and_no_matplotlib_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DitAttnError, match="nothing was measured in this run"):
        saas_plot.draw([], tmp_path / "saas.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DitAttnError, match="needs matplotlib; install it with"):
        saas_plot.draw([TRACE], tmp_path / "saas.png")
