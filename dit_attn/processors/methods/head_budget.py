"""Budgets of a sparse method: one number for all heads of a layer, or one for each query head."""

from __future__ import annotations

from dit_attn.processors.core.call import AttentionCall

HeadBudget = float | tuple[float, ...]
"""A density or a softmax mass in (0, 1]: for all query heads of a layer, or one for each."""


def is_full(budget: HeadBudget | None) -> bool:
    """Return whether every head attends to everything; ``False`` for ``None``."""
    return budget is not None and min(budget if isinstance(budget, tuple) else (budget,)) >= 1.0


def mean_budget(budget: HeadBudget) -> float:
    """Return the mean over heads."""
    return sum(budget) / len(budget) if isinstance(budget, tuple) else budget


def budget_of_call(budget: HeadBudget, call: AttentionCall) -> HeadBudget:
    """Return the budget of the query heads that a call holds: all heads of the layer, or this device's."""
    return budget[call.heads] if isinstance(budget, tuple) else budget
