"""A numeric guard: while it is on, one query block of every attention call is computed again in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.gather import gather_attention
from dit_attn.kernels.terms import Terms, rows_of, with_terms
from dit_attn.kernels.tiling import Problem


@dataclass
class GuardReport:
    """What a guard has seen.

    Attributes:
        tolerance: largest relative error that is let pass.
        calls: attention calls that were checked.
        worst: largest relative error of a checked block, as ``|o - exact| / |exact|`` (Frobenius).
    """

    tolerance: float
    calls: int = 0
    worst: float = 0.0


_ACTIVE: ContextVar[GuardReport | None] = ContextVar("numeric_guard", default=None)


@contextmanager
def numeric_guard(tolerance: float = 0.02) -> Iterator[GuardReport]:
    """Check a query block of every :func:`dit_attn.kernels.sparse_attention` call against fp32.

    The block walks through the sequence from call to call. Synchronises with an accelerator at every call: for finding
    errors, not for production. Calls inside ``torch.compile`` are not checked.

    Args:
        tolerance: largest relative error; bf16 gives about 0.005.

    Raises:
        DitAttnError: a call is further off than that, or what it is given leads to no finite result.
    """
    if not tolerance > 0.0:
        raise DitAttnError(f"tolerance must be above 0, got {tolerance}: it is the largest relative error let pass")
    report = GuardReport(tolerance)
    token = _ACTIVE.set(report)
    try:
        yield report
    finally:
        _ACTIVE.reset(token)


def guarded(name: str, problem: Problem, terms: Terms, out: torch.Tensor) -> None:
    """Check the result of a call, when a guard is on."""
    if torch.compiler.is_compiling():
        return
    report = _ACTIVE.get()
    if report is not None:
        _check(report, name, problem, terms, out)


@torch.no_grad()
def _check(report: GuardReport, name: str, problem: Problem, terms: Terms, out: torch.Tensor) -> None:
    block = report.calls * 7919 % problem.layout.nq
    first = block * problem.layout.q_block
    exact, _ = with_terms(*_one_block(problem, terms, block), gather_attention)
    if not bool(exact.isfinite().all()):
        raise DitAttnError(
            f"the exact result is not finite in query block {block} of {problem.layout!r}, so no backend's can be; "
            "look for NaN and infinity in q, k, v and the terms"
        )
    found = out[:, first : first + exact.shape[1]].to(exact.dtype)
    error = float((found - exact).norm() / exact.norm().clamp(min=1e-12))
    report.calls += 1
    report.worst = max(report.worst, error)
    if not error <= report.tolerance:
        raise DitAttnError(
            f"backend {name!r} is off by {error:.3g} (relative; tolerance {report.tolerance}) in query block {block} "
            f"of {problem.layout!r}; try backend='gather', and report the call's shapes"
        )


def _one_block(problem: Problem, terms: Terms, block: int) -> tuple[Problem, Terms]:
    """The same call for the queries of one block, in fp32 (fp64 stays)."""
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    some, terms = rows_of(problem, terms, block, block + 1)
    return replace(some, q=some.q.to(wide), k=some.k.to(wide), v=some.v.to(wide)), terms
