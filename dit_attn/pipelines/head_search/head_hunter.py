"""HeadHunter: which attention heads to perturb, found by trying (Ahn et al. 2025, algorithm 1) and by cheaper ways.

    found = HeadHunter(pipe, ["a cat", "a dog"], "clip", per_round=3, rounds=5).search()
    dit_attn.enable(pipe, found.method)
    found.save("heads.json")
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.compare import statistics
from dit_attn.pipelines.compare.match_strength import guidance_argument, guidance_rule
from dit_attn.pipelines.head_search import objectives
from dit_attn.pipelines.head_search.evaluation import Arm, Pair, PipelineMaker, Share, Trials, layers_of
from dit_attn.pipelines.head_search.gradient import Slopes
from dit_attn.pipelines.head_search.head_set import HeadSet
from dit_attn.pipelines.head_search.objectives import Weights
from dit_attn.pipelines.head_search.strategies import Plan, Round, hunt, tuned
from dit_attn.pipelines.measurement_log import Store
from dit_attn.processors.methods.softpag import SoftPAG

PURPOSES = {
    "candidates": "to choose heads",
    "slopes": "for gradients",
    "strengths": "to tune strengths",
    "checks": "to check what was chosen",
}


class HeadHunter:
    """A search for heads on a stock pipeline.

    Args:
        pipe: the pipeline; what is enabled on it is taken off.
        pairs: prompts, or (prompt, seed) pairs; a prompt alone gets ``seed`` plus its position.
        objective: a name of ``objectives.OBJECTIVES``, or a callable ``(images, prompts) -> scores``; images are uint8
            (F, H, W, 3), one frame for a picture.
        rounds, per_round: R and k.
        strategy: ``greedy``, ``halving`` or ``gradient``.
        u, scale: strength of a candidate, and w.
        target, joint: of the perturbation, see :class:`SoftPAG`.
        steps: of a candidate's run; fewer than the call's are the early-step proxy.
        guidance_scale: s of ``u + s (c - u)`` during the search; 1 is no guidance (the paper).
        call: further arguments of the pipeline's call (size, steps).
        held_out: of the pairs, the last so many are not searched on: what was chosen is checked on them.
        controls: random sets of as many heads to check beside.
        layers: also check every layer with all its heads (layer-level PAG) beside.
        tune: sweeps over the strengths after the search.
        batch: pairs in one call of the pipeline.
        seed: of pairs without one, and of the random sets.
        weights: what the objective needs.
        model: name of the model, for the result.
        store, share: see :class:`Trials`.
        keep, screen: see :class:`Plan`.
        tell: ``tell(done, total)``, images of the call in progress.
        say: is told of every round.

    Raises:
        DitAttnError: something is missing or does not fit.
    """

    def __init__(
        self,
        pipe: Any,
        pairs: Sequence[str | tuple[str, int] | Pair],
        objective: Any,
        *,
        rounds: int = 3,
        per_round: int = 3,
        strategy: str = "greedy",
        u: float = 1.0,
        scale: float = 3.0,
        target: str = "identity",
        joint: str = "joint",
        steps: int | None = None,
        guidance_scale: float = 1.0,
        call: dict[str, Any] | None = None,
        held_out: int = 0,
        controls: int = 0,
        layers: bool = False,
        tune: int = 0,
        batch: int = 4,
        seed: int = 42,
        weights: Weights | None = None,
        model: str = "",
        store: Store | None = None,
        share: Share | None = None,
        keep: float = 4.0,
        screen: float = 0.15,
        tell: Callable[[int, int], None] = lambda done, total: None,
        say: Callable[[int, Round], None] = lambda number, found: None,
    ) -> None:
        if batch < 1 or min(held_out, controls, tune) < 0:
            raise DitAttnError(
                f"batch must be at least 1, and held_out, controls and tune at least 0; got {batch}, {held_out}, "
                f"{controls} and {tune}"
            )
        if scale <= 0.0:
            raise DitAttnError(f"scale must be above 0: without a push all heads score the same, got {scale:g}")
        known = [as_pair(pair, seed + i) for i, pair in enumerate(pairs)]
        if len(known) - held_out < 1:
            raise DitAttnError(f"{len(known)} pairs less {held_out} held out leave none to search on; give more")
        self.goal = objectives.objective(objective, weights)
        self.pipe, self.model, self.say, self.seed = pipe, model, say, seed
        self.method = SoftPAG(heads="0:0", u=u, scale=scale, target=target, joint=joint)
        self.call = {**(call or {}), **guidance_off(pipe, guidance_scale)}
        maker = self._maker = PipelineMaker(pipe, self.method, self.call)
        self.trials = Trials(
            maker, self.goal, known, layers_of(pipe), batch=batch, store=store, share=share, tell=tell
        )  # fmt: skip
        self.held_out, self.controls, self.sweeps, self.guidance_scale = held_out, controls, tune, guidance_scale
        self.whole_layers = layers
        full = maker.call.get("num_inference_steps", getattr(maker.takes.get("num_inference_steps"), "default", None))
        count = len(known) - held_out
        self.plan = Plan(
            rounds, per_round, strategy, u, count, steps, full if isinstance(full, int) else None, keep, screen
        )  # fmt: skip
        self.plan.check(self.trials)
        self.slopes = Slopes(maker, self.trials, range(count)) if self.goal.pixels is not None else None

    def search(self) -> HeadSet:
        """Find the heads, tune their strengths where asked, and check them.

        Returns:
            The heads; ``checks`` has ``searched`` and, with pairs held out, ``held_out``: the mean score with its 95 %
            interval of no guidance, of the set after every round, of the tuned set, of whole layers and of random
            sets, and the paired ``gain`` of each over no guidance. With ``layers``, ``search`` has ``best_layer``: the
            ``name`` of the layer that is best on the searched pairs, and the paired ``lead`` of the heads over it.
        """
        rounds = hunt(self.trials, self.plan, self.slopes, self.say)
        sets = [self._set(rounds[: number + 1]) for number in range(len(rounds))]
        final = sets[-1]
        tried: list[dict[str, Any]] = []
        if self.sweeps:
            final, tried = tuned(self.trials, final, self.plan.pairs, self.plan.steps, self.sweeps)
        arms: dict[str, Arm] = {"none": ()}
        arms |= {f"round {number + 1}": arm for number, arm in enumerate(sets)}
        arms |= {"tuned": final} if self.sweeps else {}
        arms |= self._layers() if self.whole_layers else {}
        arms |= {f"random {n + 1}": self._random(len(sets[-1]), n) for n in range(self.controls)}
        where = {"searched": range(self.plan.pairs)}
        if self.held_out:
            where["held_out"] = range(self.plan.pairs, len(self.trials.pairs))
        checks = {name: self._check(arms, pairs) for name, pairs in where.items()}
        best = self._best_layer(final, checks["searched"], arms, where) if self.whole_layers else {}
        return HeadSet(
            self.model, type(self.pipe.transformer).__name__, self.method.target, self.method.joint, final,
            self.method.scale, {**self._about(tried), **best}, [_told(found) for found in rounds], checks,
            dict(self.trials.layers),
        )  # fmt: skip

    def make(self, arm: Arm, pairs: Sequence[Pair]) -> list[np.ndarray | None]:
        """Pictures of an arm, uint8 (F, H, W, 3) a pair, unscored; ``None`` where one is not finite."""
        size = self.trials.batch
        parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        return [picture for part in parts for picture in self._maker(self.trials.ordered(arm), part, None)[0]]

    def _set(self, rounds: Sequence[Round]) -> Arm:
        return self.trials.ordered([(*head, self.plan.u) for found in rounds for head in found.chosen])

    def _random(self, count: int, number: int) -> Arm:
        chosen = random.Random(f"{self.seed}/{number}").sample(self.trials.heads, count)
        return self.trials.ordered([(*head, self.plan.u) for head in chosen])

    def _layers(self) -> dict[str, Arm]:
        """Every layer with all its heads, by its number, which SoftPAG takes for ``heads`` too."""
        return {
            f"layer {n}": tuple((layer, head, self.plan.u) for head in range(count))
            for n, (layer, count) in enumerate(self.trials.layers.items())
        }

    def _check(self, arms: dict[str, Arm], where: range) -> dict[str, Any]:
        table = self.trials.scores(list(arms.values()), where, None, "checks")
        return {
            name: {
                "score": self._mean(row, where),
                "gain": None if name == "none" else self._mean(row - table[0], where),
                "heads": [list(head) for head in arms[name]],
            }
            for name, row in zip(arms, table)
        }

    def _mean(self, row: np.ndarray, where: range) -> dict[str, Any] | None:
        """Mean of the values that are finite, with its interval over prompts."""
        prompts = None if self.goal.whole else [self.trials.pairs[i].prompt for i in where]
        return statistics.mean_figure([None if np.isnan(x) else float(x) for x in row], prompts)

    def _best_layer(
        self, final: Arm, searched: dict[str, Any], arms: dict[str, Arm], where: dict[str, range]
    ) -> dict[str, Any]:
        """The layer that is best on the searched pairs, and how far the heads are ahead of it on all."""
        known = {name: searched[name]["score"] for name in self._layers() if searched[name]["score"]}
        if not known:
            return {}
        name = max(known, key=lambda one: float(known[one]["value"]))
        lead = {}
        for part, pairs in where.items():
            ours, theirs = self.trials.scores([final, arms[name]], pairs, None, "checks")
            lead[part] = self._mean(ours - theirs, pairs)
        return {"best_layer": {"name": name, "lead": lead}}

    def _about(self, tried: list[dict[str, Any]]) -> dict[str, Any]:
        plan, trials = self.plan, self.trials
        images, passes = dict(trials.images), dict(trials.passes)
        full = sum((len(trials.heads) - n * plan.per_round) * plan.pairs for n in range(plan.rounds))
        return {
            "objective": self.goal.name,
            "network": self.goal.network,
            "unit": self.goal.unit,
            "strategy": plan.strategy,
            "rounds": plan.rounds,
            "per_round": plan.per_round,
            "u": plan.u,
            "guidance_scale": self.guidance_scale,
            "steps": plan.steps or plan.full_steps,
            "full_steps": plan.full_steps,
            "pairs": [[pair.prompt, pair.seed] for pair in trials.pairs[: plan.pairs]],
            "held_out": [[pair.prompt, pair.seed] for pair in trials.pairs[plan.pairs :]],
            "images": {name: images[name] for name in PURPOSES if name in images},
            "passes": {name: round(passes[name]) for name in PURPOSES if name in passes},
            "images_of_greedy": full,
            "tuning": tried,
        }


def as_pair(pair: str | tuple[str, int] | Pair, seed: int) -> Pair:
    """A pair, whatever way it was given."""
    if isinstance(pair, Pair):
        return pair
    return Pair(pair, seed) if isinstance(pair, str) else Pair(str(pair[0]), int(pair[1]))


def guidance_off(pipe: Any, scale: float) -> dict[str, float]:
    """The argument that sets classifier-free guidance to the scale s; nothing for pipelines without it."""
    try:
        return {guidance_argument(pipe): guidance_rule(pipe).told_for(scale)}
    except DitAttnError:
        return {}


def _told(found: Round) -> dict[str, Any]:
    """A round as JSON values."""

    def listed(values: dict[Any, float]) -> list[list[Any]]:
        return [[layer, head, value if np.isfinite(value) else None] for (layer, head), value in values.items()]

    return {
        "chosen": [list(head) for head in found.chosen],
        "scores": listed(found.scores),
        "screened": {name: listed(values) for name, values in found.screened.items()},
    }
