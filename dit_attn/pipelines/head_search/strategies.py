"""Choose the next heads of a search: score all of them (the paper), by successive halving, or screened by a gradient.

A strategy gets the heads that are selected and those that are left, and returns the score of each head it has measured
on all pairs; the best join the selection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search.config import SearchPlan
from dit_attn.pipelines.head_search.evaluation import Arm, Evaluator, Head

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # tried when strengths are tuned after a search

Gradients = Callable[[Arm], dict[Head, float]]
"""``gradients(arm)`` returns ``d score / d u`` of every head at the strengths of an arm."""


@dataclass
class Round:
    """Result of one round.

    Attributes:
        chosen: heads that joined, best first.
        scores: mean score, together with the selection, of every head measured on all pairs.
        screened: what cheaper measurements said of the heads, by the name of the measurement.
    """

    chosen: list[Head]
    scores: dict[Head, float]
    screened: dict[str, dict[Head, float]] = field(default_factory=dict)


@dataclass
class RoundContext:
    """What a strategy works with in one round.

    Attributes:
        evaluator: scores arms.
        plan: how candidates are scored.
        selected: selected heads with their strengths.
        pool: heads left, in the order of the layers.
        gradients: ``None`` where the objective has none.
        screened: filled by the strategy, see :class:`Round`.
    """

    evaluator: Evaluator
    plan: SearchPlan
    selected: Arm
    pool: list[Head]
    gradients: Gradients | None = None
    screened: dict[str, dict[Head, float]] = field(default_factory=dict)

    def measure(self, pool: Sequence[Head], pairs: int, steps: int | None) -> dict[Head, float]:
        """Return the mean score of every head together with the selection, on the first ``pairs`` pairs."""
        arms = [(*self.selected, (layer, head, self.plan.config.u)) for layer, head in pool]
        means = self.evaluator.means(self.evaluator.scores(arms, range(pairs), steps))
        return dict(zip(pool, (float(value) for value in means)))


def not_differentiable(objective: str) -> DitAttnError:
    """Return the error for an objective that the gradient strategy does not support."""
    return DitAttnError(
        "the gradient strategy needs an objective that can be differentiated (clip-world, drawn-world, clip, style, "
        f"pickscore, hpsv2, aesthetic) and {objective} cannot; use greedy or halving"
    )


def run_rounds(
    evaluator: Evaluator,
    plan: SearchPlan,
    gradients: Gradients | None = None,
    on_round: Callable[[int, Round], None] = lambda number, result: None,
) -> list[Round]:
    """Run all rounds of a search. Scores that the evaluator's log has are not computed again.

    Args:
        evaluator: scores arms.
        plan: how candidates are scored.
        gradients: for the strategy ``gradient``.
        on_round: called with the number, from 0, and the result of every round.

    Raises:
        DitAttnError: too few heads, a strategy that the objective does not support, or a round without a finite score.
    """
    config = plan.config
    plan.check_heads(len(evaluator.heads))
    if config.strategy == "gradient" and gradients is None:
        raise not_differentiable(evaluator.objective.name)
    pool = evaluator.heads
    selected: Arm = ()
    rounds: list[Round] = []
    for number in range(config.rounds):
        context = RoundContext(evaluator, plan, selected, pool, gradients)
        scores = STRATEGIES[config.strategy](context)
        best = [head for head in best_heads(scores, config.per_round) if scores[head] > -math.inf]
        if not best:
            raise DitAttnError(
                f"{evaluator.objective.name} gave no finite score to any head of round {number + 1}, so none can be "
                "chosen; check the objective, or perturb less with a smaller u or scale"
            )
        rounds.append(Round(best, scores, context.screened))
        selected = evaluator.ordered((*selected, *((layer, head, config.u) for layer, head in best)))
        pool = [head for head in pool if head not in best]
        on_round(number, rounds[-1])
    return rounds


def best_heads(scores: dict[Head, float], count: int) -> list[Head]:
    """Return the ``count`` best heads, best first; of equal ones the one that comes first."""
    return sorted(scores, key=lambda head: -scores[head])[:count]


def _greedy(context: RoundContext) -> dict[Head, float]:
    """Every head on every pair (HeadHunter, Ahn et al. 2025, 2506.10978, algorithm 1)."""
    return context.measure(context.pool, context.plan.pairs, context.plan.config.steps)


def _halving(context: RoundContext) -> dict[Head, float]:
    """Successive halving (Jamieson and Talwalkar 2016, 1502.07943): few pairs and steps for all heads, more for those
    that remain."""
    plan, pool = context.plan, context.pool
    scores: dict[Head, float] = {}
    for count, pairs, steps in halving_rungs(len(pool), plan):
        pool = _first(scores, count, pool) if scores else pool
        scores = context.measure(pool, pairs, steps)
        context.screened[f"{pairs} pair{'' if pairs == 1 else 's'}, {steps or 'all'} steps"] = scores
    context.screened.popitem()
    return scores


def halving_rungs(heads: int, plan: SearchPlan) -> list[tuple[int, int, int | None]]:
    """Return (heads, pairs, steps) of every rung of successive halving.

    The last rung has all pairs and steps, and at least twice the heads of a round.
    """
    found: list[tuple[int, int, int | None]] = []
    keep, own_steps = plan.config.keep, plan.config.steps
    most = own_steps or plan.full_steps
    last = min(heads, max(plan.finalists, math.ceil(heads / keep**2)))
    counts = [heads]
    while counts[-1] > last:
        counts.append(max(last, math.ceil(counts[-1] / keep)))
    for above, count in enumerate(counts):
        fraction = keep ** (above - len(counts) + 1)
        steps = None if most is None else max(min(4, most), round(most * max(fraction, 0.25)))
        full = above == len(counts) - 1
        found.append((count, max(1, round(plan.pairs * fraction)), own_steps if full or steps == most else steps))
    return found


def _gradient(context: RoundContext) -> dict[Head, float]:
    """The heads of largest gradient, each scored on all pairs."""
    assert context.gradients is not None
    gradients = context.gradients(context.selected)
    gradients = {head: gradients[head] for head in context.pool}
    context.screened["slope"] = gradients
    count = _screened_count(len(context.pool), context.plan)
    return context.measure(
        _first(gradients, count, context.pool), context.plan.pairs, context.plan.config.steps
    )  # fmt: skip


def _screened_count(pool: int, plan: SearchPlan) -> int:
    """Heads that are scored after the screening by gradient."""
    return min(pool, max(plan.finalists, math.ceil(plan.config.screen * pool)))


def _first(scores: dict[Head, float], count: int, pool: Sequence[Head]) -> list[Head]:
    """The ``count`` best, in the order of the pool."""
    best = set(best_heads(scores, count))
    return [head for head in pool if head in best]


STRATEGIES: dict[str, Callable[[RoundContext], dict[Head, float]]] = {
    "greedy": _greedy,
    "halving": _halving,
    "gradient": _gradient,
}


def tune_strengths(
    evaluator: Evaluator, arm: Arm, pairs: int, steps: int | None, sweeps: int = 1
) -> tuple[Arm, list[dict[str, Any]]]:
    """Tune the strengths head by head: try :data:`STRENGTHS` while the others stay, and take the best (0 drops a head).

    Args:
        evaluator: scores arms.
        arm: heads with their strengths.
        pairs: score on the first so many pairs.
        steps: denoising steps; ``None`` for those of the call.
        sweeps: passes over all heads.

    Returns:
        The tuned arm, and what was tried: ``head``, ``u`` and ``score`` each.
    """
    best = float(evaluator.means(evaluator.scores([arm], range(pairs), steps, "strengths"))[0])
    tried: list[dict[str, Any]] = []
    for _ in range(sweeps):
        before = arm
        for layer, head, u in before:
            values = [x for x in STRENGTHS if x != u]
            arms = [evaluator.ordered((*arm, (layer, head, x))) for x in values]
            options = [(x, option) for x, option in zip(values, arms) if option]
            scores = evaluator.scores([option for _, option in options], range(pairs), steps, "strengths")
            means = evaluator.means(scores)
            tried += [{"head": [layer, head], "u": x, "score": float(m)} for (x, _), m in zip(options, means)]
            place = int(np.argmax(means)) if len(means) else 0
            if len(means) and means[place] > best:
                best, arm = float(means[place]), options[place][1]
        if arm == before:
            break
    return arm, tried


# -- cost of a search --------------------------------------------------------------------------------------------------


def relative_cost(heads: int, plan: SearchPlan) -> float:
    """Return the image-steps of the candidates as a fraction of those of ``greedy`` at all steps.

    Args:
        heads: number of heads of the model.
        plan: how candidates are scored.
    """
    most = plan.full_steps or 1
    greedy = ours = 0.0
    for number in range(plan.config.rounds):
        pool = heads - number * plan.config.per_round
        greedy += pool * plan.pairs * most
        rungs = _rungs(pool, plan)
        ours += sum(count * pairs * (steps or plan.config.steps or most) for count, pairs, steps in rungs)
    return ours / greedy


def count_images(heads: int, plan: SearchPlan) -> int:
    """Return the number of images that the candidates take; arguments as in :func:`relative_cost`."""
    pools = [heads - number * plan.config.per_round for number in range(plan.config.rounds)]
    return sum(count * pairs for pool in pools for count, pairs, _ in _rungs(pool, plan))


def _rungs(pool: int, plan: SearchPlan) -> list[tuple[int, int, int | None]]:
    """(heads, pairs, steps) of everything that a round scores."""
    if plan.config.strategy == "halving":
        return halving_rungs(pool, plan)
    if plan.config.strategy == "gradient":
        return [(_screened_count(pool, plan), plan.pairs, plan.config.steps)]
    return [(pool, plan.pairs, plan.config.steps)]
