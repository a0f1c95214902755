"""A numeric guard: while it is active, one query block of every attention call is recomputed in fp32 and compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.backends.compose_terms import rows_of, with_terms
from dit_attn.kernels.backends.gather.forward import gather_attention
from dit_attn.kernels.problem import Problem
from dit_attn.kernels.terms import Terms


@dataclass
class GuardReport:
    """The result of a numeric guard.

    Attributes:
        tolerance: largest accepted relative error.
        calls: number of attention calls checked.
        worst: largest relative error of a checked block, ``|o - exact| / |exact|`` (Frobenius norm).
    """

    tolerance: float
    calls: int = 0
    worst: float = 0.0


_ACTIVE: ContextVar[GuardReport | None] = ContextVar("numeric_guard", default=None)


@contextmanager
def numeric_guard(tolerance: float = 0.02) -> Iterator[GuardReport]:
    """Check a query block of every :func:`dit_attn.kernels.sparse_attention` call against fp32.

    Another block is checked at each call. Synchronises with an accelerator at every call: for debugging, not for
    production. Calls inside ``torch.compile`` are not checked.

    Args:
        tolerance: largest accepted relative error; bf16 gives about 0.005.

    Raises:
        DitAttnError: the error of a call is larger, or its inputs lead to no finite result.
    """
    if not tolerance > 0.0:
        raise DitAttnError(f"tolerance must be above 0, got {tolerance}: it is the largest accepted relative error")
    report = GuardReport(tolerance)
    token = _ACTIVE.set(report)
    try:
        yield report
    finally:
        _ACTIVE.reset(token)


def check_result(name: str, problem: Problem, terms: Terms, out: torch.Tensor) -> None:
    """Check the output of a call if a guard is active.

    Args:
        name: the backend that computed it.
        problem, terms: the call.
        out: (B, Sq, H, Dv) its output.

    Raises:
        DitAttnError: see :func:`numeric_guard`.
    """
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
            f"the exact result is not finite in query block {block} of {problem.layout!r}, so no backend's is; "
            "check q, k, v and the terms for NaN and infinity"
        )
    found = out[:, first : first + exact.shape[1]].to(exact.dtype)
    error = float((found - exact).norm() / exact.norm().clamp(min=1e-12))
    report.calls += 1
    report.worst = max(report.worst, error)
    if not error <= report.tolerance:
        raise DitAttnError(
            f"backend {name!r} has relative error {error:.3g} (tolerance {report.tolerance}) in query block {block} "
            f"of {problem.layout!r}; try backend='gather', and report the call's shapes"
        )


def _one_block(problem: Problem, terms: Terms, block: int) -> tuple[Problem, Terms]:
    """The call restricted to the queries of one block, in fp32 (fp64 stays fp64)."""
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    some, terms = rows_of(problem, terms, block, block + 1)
    return replace(some, q=some.q.to(wide), k=some.k.to(wide), v=some.v.to(wide)), terms
