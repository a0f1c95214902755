"""What the tests of `dit-attn anomaly` share."""

from __future__ import annotations

import pytest

from dit_attn.models import nets
from tests._support.inspection_pipelines import data, tiny_pipeline


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    """A folder with a tiny model and data."""
    folder = tmp_path_factory.mktemp("anomaly")
    nets.save_folder(tiny_pipeline(), folder / "model")
    data(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Times are noted in a cache of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
