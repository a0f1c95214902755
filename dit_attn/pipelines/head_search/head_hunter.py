"""HeadHunter: search the attention heads to perturb (Ahn et al. 2025, 2506.10978), also by cheaper strategies.

    from dit_attn.pipelines.head_search import HeadHunter, SearchConfig

    found = HeadHunter(pipe, ["a cat", "a dog"], "clip", SearchConfig(per_round=3, rounds=5)).search()
    dit_attn.enable(pipe, found.method)
    found.save("heads.json")

The result is a :class:`~dit_attn.pipelines.head_search.head_set.HeadSet`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.compare import statistics
from dit_attn.pipelines.compare.match_strength import guidance_argument, guidance_rule
from dit_attn.pipelines.head_search.config import SearchConfig, SearchPlan
from dit_attn.pipelines.head_search.evaluation import Arm, Evaluator, Pair
from dit_attn.pipelines.head_search.gradient import HeadGradients
from dit_attn.pipelines.head_search.head_set import HeadSet
from dit_attn.pipelines.head_search.objective import ScorerOptions
from dit_attn.pipelines.head_search.objectives import make_objective
from dit_attn.pipelines.head_search.pipeline_runner import PipelineRunner, searchable_layers
from dit_attn.pipelines.head_search.strategies import Round, run_rounds, tune_strengths
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.pipelines.run import Answers
from dit_attn.pipelines.worker_share import WorkerShare
from dit_attn.processors.methods.softpag import SoftPAG

PURPOSES = {
    "candidates": "to choose heads",
    "slopes": "for gradients",
    "strengths": "to tune strengths",
    "checks": "to check what was chosen",
}


class HeadHunter:
    """A search for attention heads on a stock pipeline.

    Args:
        pipe: the pipeline; enabled methods are disabled.
        pairs: prompts, or (prompt, seed) pairs; a prompt alone gets ``config.seed`` plus its position.
        objective: a name of :data:`~dit_attn.pipelines.head_search.objectives.OBJECTIVES`, or a callable
            ``(images, prompts) -> scores``; images are uint8 (F, H, W, 3), F is 1 for an image.
        config: settings of the search.
        call: further arguments of the pipeline's call (size, steps).
        scorer: networks and files that the objective needs.
        model: name of the model, for the result.
        log: earlier scores, and where new ones go; ``None`` keeps them in memory.
        worker: which part of the work this process does.
        on_progress: called with (done, total) images of the current evaluation.
        on_round: called with the number, from 0, and the result of every round.
        answers: does elsewhere what :meth:`answer` does, and ``pipe`` needs no weights then; ``None``: in this process.

    Attributes:
        plan: how candidates are scored.
        evaluator: scores arms, and counts images and transformer passes.

    Raises:
        DitAttnError: no pair to search on, an unknown argument or objective, or more heads wanted than there are.
    """

    def __init__(
        self,
        pipe: Any,
        pairs: Sequence[str | tuple[str, int] | Pair],
        objective: Any,
        config: SearchConfig | None = None,
        *,
        call: dict[str, Any] | None = None,
        scorer: ScorerOptions | None = None,
        model: str = "",
        log: MeasurementLog | None = None,
        worker: WorkerShare | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_round: Callable[[int, Round], None] = lambda number, result: None,
        answers: Answers | None = None,
    ) -> None:
        config = SearchConfig() if config is None else config
        known = [as_pair(pair, config.seed + i) for i, pair in enumerate(pairs)]
        count = len(known) - config.held_out
        if count < 1:
            raise DitAttnError(f"{len(known)} pairs less {config.held_out} held out leave none to search on; give more")
        self.pipe, self.config, self.model, self.on_round = pipe, config, model, on_round
        self.objective = make_objective(objective, scorer)
        self.method = SoftPAG(
            heads="0:0", u=config.u, scale=config.scale, target=config.target, joint=config.joint
        )  # fmt: skip
        self.runner = PipelineRunner(pipe, self.method, {**(call or {}), **guidance_call(pipe, config.guidance_scale)})
        self.evaluator = Evaluator(
            self.runner, self.objective, known, searchable_layers(pipe), batch=config.batch, log=log, worker=worker,
            on_progress=on_progress, answers=answers,
        )  # fmt: skip
        default = getattr(self.runner.parameters.get("num_inference_steps"), "default", None)
        steps = self.runner.call.get("num_inference_steps", default)
        self.plan = SearchPlan(config, count, steps if isinstance(steps, int) else None)
        self.plan.check_heads(len(self.evaluator.heads))
        differentiable = self.objective.pixels is not None
        self.gradients = (
            HeadGradients(self.runner, self.evaluator, range(count), answers=answers) if differentiable else None
        )

    def search(self) -> HeadSet:
        """Find the heads, tune their strengths where configured, and check them.

        Returns:
            The heads. ``checks`` has ``searched`` and, with pairs held out, ``held_out``: the mean score with its 95 %
            interval of no guidance (``none``), of the set after every round, of the tuned set, of full layers and of
            random sets, and the paired ``gain`` of each over no guidance. With ``config.layers``, ``search`` has
            ``best_layer``: the ``name`` of the layer that is best on the searched pairs, and the paired ``lead`` of the
            heads over it.

        Raises:
            DitAttnError: a strategy that the objective does not support, or a round without a finite score.
        """
        config, plan, evaluator = self.config, self.plan, self.evaluator
        rounds = run_rounds(evaluator, plan, self.gradients, self.on_round)
        sets = [self._arm_of(rounds[: number + 1]) for number in range(len(rounds))]
        final = sets[-1]
        tried: list[dict[str, Any]] = []
        if config.tune:
            final, tried = tune_strengths(evaluator, final, plan.pairs, config.steps, config.tune)
        arms: dict[str, Arm] = {"none": ()}
        arms |= {f"round {number + 1}": arm for number, arm in enumerate(sets)}
        arms |= {"tuned": final} if config.tune else {}
        arms |= self._full_layers() if config.layers else {}
        arms |= {f"random {n + 1}": self._random_arm(len(sets[-1]), n) for n in range(config.controls)}
        where = {"searched": range(plan.pairs)}
        if config.held_out:
            where["held_out"] = range(plan.pairs, len(evaluator.pairs))
        checks = {name: self._check(arms, pairs) for name, pairs in where.items()}
        best = self._best_layer(final, checks["searched"], arms, where) if config.layers else {}
        return HeadSet(
            self.model, type(self.pipe.transformer).__name__, config.target, config.joint, final, config.scale,
            {**self._facts(tried), **best}, [_round_to_json(result) for result in rounds], checks,
            dict(evaluator.layers),
        )  # fmt: skip

    def answer(self, request: dict[str, Any]) -> Any:
        """Return what a request of the search asks for: scores of an arm, or gradients where it has a ``time``.

        Args:
            request: JSON values, see :meth:`Evaluator.answer` and :meth:`HeadGradients.answer`.
        """
        if "time" not in request:
            return self.evaluator.answer(request)
        assert self.gradients is not None  # checked before the first round
        return self.gradients.answer(request)

    def make(self, arm: Arm, pairs: Sequence[Pair]) -> list[np.ndarray | None]:
        """Return the images of an arm without scoring them, uint8 (F, H, W, 3) per pair; ``None`` if not finite."""
        size = self.evaluator.batch
        parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        return [image for part in parts for image in self.runner(self.evaluator.ordered(arm), part, None)[0]]

    def _arm_of(self, rounds: Sequence[Round]) -> Arm:
        return self.evaluator.ordered([(*head, self.config.u) for result in rounds for head in result.chosen])

    def _random_arm(self, count: int, number: int) -> Arm:
        chosen = random.Random(f"{self.config.seed}/{number}").sample(self.evaluator.heads, count)
        return self.evaluator.ordered([(*head, self.config.u) for head in chosen])

    def _full_layers(self) -> dict[str, Arm]:
        """Every layer with all its heads, by its number, which SoftPAG accepts as ``heads`` too."""
        return {
            f"layer {n}": tuple((layer, head, self.config.u) for head in range(count))
            for n, (layer, count) in enumerate(self.evaluator.layers.items())
        }

    def _check(self, arms: dict[str, Arm], where: range) -> dict[str, Any]:
        table = self.evaluator.scores(list(arms.values()), where, None, "checks")
        return {
            name: {
                "score": self._mean(row, where),
                "gain": None if name == "none" else self._mean(row - table[0], where),
                "heads": [list(head) for head in arms[name]],
            }
            for name, row in zip(arms, table)
        }

    def _mean(self, row: np.ndarray, where: range) -> dict[str, Any] | None:
        """Mean of the finite values, with its interval over prompts."""
        prompts = None if self.objective.of_set else [self.evaluator.pairs[i].prompt for i in where]
        return statistics.mean_figure([None if np.isnan(x) else float(x) for x in row], prompts)

    def _best_layer(
        self, final: Arm, searched: dict[str, Any], arms: dict[str, Arm], where: dict[str, range]
    ) -> dict[str, Any]:
        """The layer that is best on the searched pairs, and the lead of the heads over it on all pairs."""
        known = {name: searched[name]["score"] for name in self._full_layers() if searched[name]["score"]}
        if not known:
            return {}
        name = max(known, key=lambda one: float(known[one]["value"]))
        lead = {}
        for part, pairs in where.items():
            ours, theirs = self.evaluator.scores([final, arms[name]], pairs, None, "checks")
            lead[part] = self._mean(ours - theirs, pairs)
        return {"best_layer": {"name": name, "lead": lead}}

    def _facts(self, tried: list[dict[str, Any]]) -> dict[str, Any]:
        config, plan, evaluator = self.config, self.plan, self.evaluator
        images, passes = dict(evaluator.images), dict(evaluator.passes)
        greedy = sum((len(evaluator.heads) - n * config.per_round) * plan.pairs for n in range(config.rounds))
        return {
            "objective": self.objective.name,
            "network": self.objective.network,
            "unit": self.objective.unit,
            "strategy": config.strategy,
            "rounds": config.rounds,
            "per_round": config.per_round,
            "u": config.u,
            "guidance_scale": config.guidance_scale,
            "steps": config.steps or plan.full_steps,
            "full_steps": plan.full_steps,
            "pairs": [[pair.prompt, pair.seed] for pair in evaluator.pairs[: plan.pairs]],
            "held_out": [[pair.prompt, pair.seed] for pair in evaluator.pairs[plan.pairs :]],
            "images": {name: images[name] for name in PURPOSES if name in images},
            "passes": {name: round(passes[name]) for name in PURPOSES if name in passes},
            "images_of_greedy": greedy,
            "tuning": tried,
        }


def as_pair(pair: str | tuple[str, int] | Pair, seed: int) -> Pair:
    """Return a prompt, or a (prompt, seed) pair, as a :class:`Pair`; a prompt alone gets ``seed``."""
    if isinstance(pair, Pair):
        return pair
    return Pair(pair, seed) if isinstance(pair, str) else Pair(str(pair[0]), int(pair[1]))


def guidance_call(pipe: Any, scale: float) -> dict[str, float]:
    """Return the argument that sets classifier-free guidance to the scale s; none for pipelines without it."""
    try:
        return {guidance_argument(pipe): guidance_rule(pipe).argument_for(scale)}
    except DitAttnError:
        return {}


def _round_to_json(result: Round) -> dict[str, Any]:
    """A round as JSON values."""

    def listed(values: dict[Any, float]) -> list[list[Any]]:
        return [[layer, head, value if np.isfinite(value) else None] for (layer, head), value in values.items()]

    return {
        "chosen": [list(head) for head in result.chosen],
        "scores": listed(result.scores),
        "screened": {name: listed(values) for name, values in result.screened.items()},
    }
