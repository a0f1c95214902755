"""``--shard i/n``: disjoint parts that make all, and texts that are none."""

from __future__ import annotations

import pytest

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.run import Shard


def test_parts_are_disjoint_and_complete() -> None:
    parts = [Shard(number, 3).part(range(7)) for number in (1, 2, 3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]] and Shard.parse(" 2/3 ") == Shard(2, 3)
    assert str(Shard(2, 3)) == "2/3" and Shard(2, 3).file("run.json") == "run-2-of-3.json"


@pytest.mark.parametrize("text", ["", "1", "1/", "a/b", "-1/2", "1.0/2", "0/2", "3/2", "1/2/3", "1/0", "9999999/9"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(DitAttnError, match="--shard"):
        Shard.parse(text)
