"""A small random Wan transformer, and sparse methods of small blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dit_attn.models.architectures import architecture
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.sparse import SparseMethod

CPU = torch.device("cpu")


def sparse_method(slug: str, **settings: Any) -> SparseMethod:
    """Make a sparse method with blocks of 32 tokens."""
    found = Method.from_dict({"method": slug, "q_block": 32, "kv_block": 32, **settings})
    assert isinstance(found, SparseMethod)
    return found


@pytest.fixture(scope="package")
def wan() -> tuple[torch.nn.Module, dict[str, Any], int]:
    """A transformer of three layers, the arguments of its forward call, and its number of visual tokens."""
    row = architecture("wan2.1-1.3b").sized(3, 1).with_tokens(512)
    return row.build(CPU, torch.float32), row.call(CPU, torch.float32), math.prod(row.grid)
