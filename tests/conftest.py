"""What every test starts from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests._support import torchvision

# Drawing examples slowly is a fault of a loaded machine, not of the code under test.
settings.register_profile("any-machine", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

torchvision.install()
os.environ["DIT_ATTN_COSTS"] = os.devnull + ".none"  # no test depends on what its machine was measured to cost
os.environ["DIT_ATTN_CPP"] = os.devnull + "/none"  # nor on what was compiled there


@pytest.fixture(autouse=True)
def process_wide_backend() -> Iterator[None]:
    """diffusers' ``set_attention_backend`` also changes the process-wide backend: put it back for the next test."""
    yield
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        registry = dispatch._AttentionBackendRegistry
        registry._active_backend = dispatch.AttentionBackendName(dispatch.DIFFUSERS_ATTN_BACKEND)
