"""Ways to choose the next heads of a search: all of them fully (the paper), in rungs, or screened by one gradient.

A strategy gets the heads that are selected and those that are left, and gives a score to each head it has measured on
all pairs; the best join the selection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search.evaluation import Arm, Head, Trials

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # strengths that the tuning after a search tries


@dataclass(frozen=True)
class Plan:
    """How to search.

    Attributes:
        rounds: R.
        per_round: k, heads that join in a round.
        strategy: key of ``STRATEGIES``.
        u: strength of a candidate.
        pairs: M, pairs that candidates are scored on.
        steps: of a candidate's run; ``None``: as the call says.
        full_steps: what the call says, for the rungs; ``None`` where unknown: the rungs do not save steps then.
        keep: a rung keeps one head of so many.
        screen: share of the heads that the gradient lets through.
    """

    rounds: int = 3
    per_round: int = 3
    strategy: str = "greedy"
    u: float = 1.0
    pairs: int = 1
    steps: int | None = None
    full_steps: int | None = None
    keep: float = 4.0
    screen: float = 0.15

    def check(self, trials: Trials) -> None:
        """Raises: DitAttnError: more heads wanted than there are, or a number out of range."""
        if self.strategy not in STRATEGIES:
            raise DitAttnError(f"unknown strategy {self.strategy!r}; use one of {', '.join(STRATEGIES)}")
        if min(self.rounds, self.per_round, self.pairs) < 1:
            raise DitAttnError("rounds, heads a round and pairs must be at least 1")
        if self.steps is not None and not 1 <= self.steps <= (self.full_steps or self.steps):
            most = f" to {self.full_steps}, those of the run" if self.full_steps else " on"
            raise DitAttnError(f"the steps of a candidate lie in 1{most}, got {self.steps}")
        wanted, there = self.rounds * self.per_round, len(trials.heads)
        if wanted > there:
            raise DitAttnError(
                f"{self.rounds} rounds of {self.per_round} heads are {wanted}, and the model has {there} heads; "
                "give fewer rounds or fewer heads a round"
            )
        if not 0.0 < self.u <= 1.0:
            raise DitAttnError(f"the strength u of candidates lies in (0, 1], got {self.u:g}")
        if self.keep <= 1.0 or not 0.0 < self.screen <= 1.0:
            raise DitAttnError("a rung keeps one head of more than 1, and the screen lets a share in (0, 1] through")


@dataclass
class Round:
    """One round.

    Attributes:
        chosen: heads that joined, best first.
        scores: mean score of every head measured on all pairs, beside the selection.
        screened: what cheaper measurements said of the heads, by the name of the measurement.
    """

    chosen: list[Head]
    scores: dict[Head, float]
    screened: dict[str, dict[Head, float]] = field(default_factory=dict)


@dataclass
class Scene:
    """What a strategy works with.

    Attributes:
        trials: scores arms.
        plan: how to search.
        selected: heads so far with their strengths.
        pool: heads left, in the order of the layers.
        slopes: ``slopes(arm) -> {head: d score / d u}`` by one backward pass; ``None`` where there is none.
        screened: filled by the strategy.
    """

    trials: Trials
    plan: Plan
    selected: Arm
    pool: list[Head]
    slopes: Callable[[Arm], dict[Head, float]] | None = None
    screened: dict[str, dict[Head, float]] = field(default_factory=dict)

    def measured(self, pool: Sequence[Head], pairs: int, steps: int | None) -> dict[Head, float]:
        """Mean score of every head beside the selection, on the first ``pairs`` pairs."""
        arms = [(*self.selected, (layer, head, self.plan.u)) for layer, head in pool]
        means = self.trials.mean(self.trials.scores(arms, range(pairs), steps))
        return dict(zip(pool, (float(value) for value in means)))


def undifferentiable(goal: str) -> DitAttnError:
    """What to say of an objective that the gradient strategy cannot take."""
    return DitAttnError(
        "the gradient strategy needs an objective that can be differentiated (clip-world, drawn-world, clip, style, "
        f"pickscore, hpsv2, aesthetic) and {goal} cannot; use greedy or halving"
    )


def hunt(
    trials: Trials, plan: Plan, slopes: Callable[[Arm], dict[Head, float]] | None = None,
    say: Callable[[int, Round], None] = lambda number, found: None,
) -> list[Round]:  # fmt: skip
    """All rounds. What the store of the trials has is not made again, so that a stopped search goes on where it was.

    Args:
        trials: scores arms.
        plan: how.
        slopes: see :class:`Scene`.
        say: is told of every round.

    Raises:
        DitAttnError: a plan that does not fit, a strategy that cannot work here, or a round without a finite score.
    """
    plan.check(trials)
    if plan.strategy == "gradient" and slopes is None:
        raise undifferentiable(trials.goal.name)
    pool = trials.heads
    chosen: Arm = ()
    rounds: list[Round] = []
    for number in range(plan.rounds):
        scene = Scene(trials, plan, chosen, pool, slopes)
        scores = STRATEGIES[plan.strategy](scene)
        best = [head for head in top(scores, plan.per_round) if scores[head] > -math.inf]
        if not best:
            raise DitAttnError(
                f"{trials.goal.name} gave no finite score to any head of round {number + 1}, so none can be chosen; "
                "check the objective, or perturb less with a smaller u or scale"
            )
        rounds.append(Round(best, scores, scene.screened))
        chosen = trials.ordered((*chosen, *((layer, head, plan.u) for layer, head in best)))
        pool = [head for head in pool if head not in best]
        say(number, rounds[-1])
    return rounds


def top(scores: dict[Head, float], count: int) -> list[Head]:
    """The best heads, best first; of equals the one that comes first."""
    return sorted(scores, key=lambda head: -scores[head])[:count]


def _greedy(scene: Scene) -> dict[Head, float]:
    """Every head on every pair (HeadHunter, Ahn et al. 2025, algorithm 1)."""
    return scene.measured(scene.pool, scene.plan.pairs, scene.plan.steps)


def _halving(scene: Scene) -> dict[Head, float]:
    """Successive halving (Jamieson and Talwalkar 2016): few pairs and steps for all, more for those that remain."""
    plan, pool = scene.plan, scene.pool
    scores: dict[Head, float] = {}
    for count, pairs, steps in rungs(len(pool), plan):
        pool = _first(scores, count, pool) if scores else pool
        scores = scene.measured(pool, pairs, steps)
        scene.screened[f"{pairs} pair{'' if pairs == 1 else 's'}, {steps or 'all'} steps"] = scores
    scene.screened.popitem()
    return scores


def rungs(heads: int, plan: Plan) -> list[tuple[int, int, int | None]]:
    """(heads, pairs, steps) of every rung; the last has all pairs and steps, and at least twice the heads wanted."""
    found: list[tuple[int, int, int | None]] = []
    whole = plan.steps or plan.full_steps
    last = min(heads, max(2 * plan.per_round, math.ceil(heads / plan.keep**2)))
    counts = [heads]
    while counts[-1] > last:
        counts.append(max(last, math.ceil(counts[-1] / plan.keep)))
    for above, count in enumerate(counts):
        share = plan.keep ** (above - len(counts) + 1)
        steps = None if whole is None else max(min(4, whole), round(whole * max(share, 0.25)))
        full = above == len(counts) - 1
        found.append((count, max(1, round(plan.pairs * share)), plan.steps if full or steps == whole else steps))
    return found


def _gradient(scene: Scene) -> dict[Head, float]:
    """The heads whose first order promises most, each measured fully."""
    assert scene.slopes is not None
    slopes = scene.slopes(scene.selected)
    slopes = {head: slopes[head] for head in scene.pool}
    scene.screened["slope"] = slopes
    count = min(len(scene.pool), max(2 * scene.plan.per_round, math.ceil(scene.plan.screen * len(scene.pool))))
    return scene.measured(_first(slopes, count, scene.pool), scene.plan.pairs, scene.plan.steps)


def _first(scores: dict[Head, float], count: int, pool: Sequence[Head]) -> list[Head]:
    """The ``count`` best, in the order of the pool."""
    kept = set(top(scores, count))
    return [head for head in pool if head in kept]


STRATEGIES: dict[str, Callable[[Scene], dict[Head, float]]] = {
    "greedy": _greedy,
    "halving": _halving,
    "gradient": _gradient,
}


def tuned(trials: Trials, arm: Arm, pairs: int, steps: int | None, sweeps: int = 1) -> tuple[Arm, list[dict[str, Any]]]:
    """Strengths head by head: each is moved over ``GRID`` while the others stay, and keeps the best (0 drops it).

    Returns:
        The arm and what was tried: ``head``, ``u``, ``score``.
    """
    best = float(trials.mean(trials.scores([arm], range(pairs), steps, "strengths"))[0])
    tried: list[dict[str, Any]] = []
    for _ in range(sweeps):
        before = arm
        for layer, head, u in before:
            options = [x for x in GRID if x != u]
            arms = [trials.ordered((*arm, (layer, head, x))) for x in options]
            kept = [(x, option) for x, option in zip(options, arms) if option]
            means = trials.mean(trials.scores([option for _, option in kept], range(pairs), steps, "strengths"))
            tried += [{"head": [layer, head], "u": x, "score": float(m)} for (x, _), m in zip(kept, means)]
            place = int(np.argmax(means)) if len(means) else 0
            if len(means) and means[place] > best:
                best, arm = float(means[place]), kept[place][1]
        if arm == before:
            break
    return arm, tried


def expected(heads: int, plan: Plan) -> float:
    """Share of the paper's image-steps that the candidates of a plan take: 1 for ``greedy`` at all steps."""
    whole = plan.full_steps or 1
    full = part = 0.0
    for number in range(plan.rounds):
        pool = heads - number * plan.per_round
        full += pool * plan.pairs * whole
        part += _cost(pool, plan, whole)
    return part / full


def images(heads: int, plan: Plan) -> int:
    """Images that the candidates of a plan take."""
    return sum(
        sum(count * pairs for count, pairs, _ in _ladder(heads - number * plan.per_round, plan))
        for number in range(plan.rounds)
    )


def _cost(pool: int, plan: Plan, whole: int) -> float:
    return sum(count * pairs * (steps or plan.steps or whole) for count, pairs, steps in _ladder(pool, plan))


def _ladder(pool: int, plan: Plan) -> list[tuple[int, int, int | None]]:
    """(heads, pairs, steps) of everything a round makes."""
    if plan.strategy == "halving":
        return rungs(pool, plan)
    if plan.strategy == "gradient":
        return [(min(pool, max(2 * plan.per_round, math.ceil(plan.screen * pool))), plan.pairs, plan.steps)]
    return [(pool, plan.pairs, plan.steps)]
