"""Instructions of a compiled kernel's inner loop, read from its machine code."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA(?:\.\S+)?\s.*`\((\.L_x_\d+)\)")
_TENSOR = re.compile(r"HGMMA|HMMA|UTC\w*MMA")


@dataclass(frozen=True)
class Loop:
    """A loop over keys.

    Attributes:
        instructions: of a warp for one pass by the shortest way, as every pass but the first goes.
        barriers: waits of the whole program on that way.
        rescaled: multiplications on that way, most of which rescale the accumulator.
        spills: moves on that way of registers to the stack or back.
    """

    instructions: int
    barriers: int
    rescaled: int
    spills: int


def inner_loop(code: str) -> Loop:
    """Find the loop with tensor-core products and exponentials in disassembled ``code``; the shortest of them.

    Raises:
        AssertionError: there is none.
    """
    return min(key_loops(code), key=lambda loop: loop.instructions)


def key_loops(code: str) -> list[Loop]:
    """Find the loops with tensor-core products and exponentials in disassembled ``code``, in the order of the code.

    Raises:
        AssertionError: there is none.
    """
    labels, lines = _read(code)
    spans = [span for span in _loops(labels, lines) if any(map(_TENSOR.search, lines[span[0] : span[1] + 1]))]
    ways = [_shortest(lines, labels, *span) for span in spans]  # on Blackwell one warp starts the products of all
    found = []
    for way in ways:
        if any("MUFU.EX2" in line for line in way):
            kinds = Counter(_name(line) for line in way)
            multiplied, moved = kinds["FMUL"] + 2 * kinds["FMUL2"], kinds["STL"] + kinds["LDL"]
            found.append(Loop(len(way), kinds["BAR"], multiplied, moved))
    assert found, "no loop over key blocks"
    return found


def _read(code: str) -> tuple[dict[str, int], list[str]]:
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in code.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(lines)
        elif found := _INSTRUCTION.match(line):
            lines.append(found[1])
    return labels, lines


def _loops(labels: dict[str, int], lines: list[str]) -> Iterator[tuple[int, int]]:
    """Yield first and last instruction of every stretch that ends in a branch to its beginning."""
    for last, line in enumerate(lines):
        found = _BRANCH.search(line)
        if found and labels.get(found[1], last + 1) <= last:
            yield labels[found[1]], last


def _shortest(lines: list[str], labels: dict[str, int], first: int, last: int) -> list[str]:
    """Return the instructions of the shortest way from ``first`` to ``last``."""
    came: dict[int, int] = {}
    queue = [(1, first, -1)]
    while queue:
        length, at, before = heapq.heappop(queue)
        if at in came or not first <= at <= last:
            continue
        came[at] = before
        if at == last:
            break
        found = _BRANCH.search(lines[at])
        if found is None or lines[at].startswith("@"):
            heapq.heappush(queue, (length + 1, at + 1, at))
        if found:
            heapq.heappush(queue, (length + 1, labels[found[1]], at))
    way, at = [], last
    while at in came:
        way.append(lines[at])
        at = came[at]
    return way[::-1]


def _name(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]
