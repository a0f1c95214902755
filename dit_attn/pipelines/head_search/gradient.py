"""Differentiate the score with respect to the strength of every head, with one forward and one backward pass.

A perturbed attention matrix is linear in its strength u, so that ``d score / d u`` exists for all heads at u = 0, where
the perturbed pass equals the conditional one. The score is that of the clean image ``x0(F + w (c - p(u)))`` that a step
predicts, decoded by the pipeline itself (:mod:`~dit_attn.pipelines.head_search.clean_prediction`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from dit_attn.api import enabled
from dit_attn.pipelines.head_search.clean_prediction import frozen_weights, stop_at_prediction
from dit_attn.pipelines.head_search.evaluation import Arm, Evaluator, Head, Pair, format_arm, parse_arm
from dit_attn.pipelines.head_search.pipeline_runner import PipelineRunner
from dit_attn.pipelines.output import batch_of
from dit_attn.pipelines.run import Answers, answered_here
from dit_attn.pipelines.transformers import count_passes
from dit_attn.processors.core.call import AttentionCall
from dit_attn.processors.guidance.perturbation import Perturbation
from dit_attn.processors.methods.perturbed_guidance import Layers
from dit_attn.processors.methods.softpag import SoftPAG

TIMES = (0.25, 0.5)  # fractions of the run at which gradients are taken
_BACKWARD_PASSES = 3  # the perturbed pass, and a backward pass counts as two


@dataclass(frozen=True)
class DifferentiablePerturbation(Perturbation):
    """A perturbation whose strengths are tensors that gradients flow to.

    Attributes:
        leaves: (B, heads) strengths by layer. The strengths of the base class are 1 for every head, so that its result
            is the fully perturbed one.
    """

    leaves: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Never: strengths of 0 have a gradient too."""
        return False

    def apply(self, call: AttentionCall, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Return the blend of ``out`` and the fully perturbed result; see the base class."""
        u = self.leaves.get(call.layer.name)
        target = super().apply(call, out, first)
        if u is None or target is out:
            return out
        dtype = torch.promote_types(out.dtype, torch.float32)
        plain, perturbed = out[first:].to(dtype), target[first:].to(dtype)
        blended = plain + u.to(dtype)[:, None, :, None] * (perturbed - plain)
        return torch.cat([out[:first], blended.to(out.dtype)])


@dataclass
class GradientStep:
    """State of the step at which gradients are taken.

    Attributes:
        at: fraction of the run.
        samples: batch size.
        base: strengths of the selected heads, by layer and head.
        leaves: (samples, heads) strengths by layer; filled when the perturbation is made.
        done: whether the step is over.
    """

    at: float
    samples: int
    base: dict[str, dict[int, float]]
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)
    done: bool = False


@dataclass(frozen=True)
class GradientProbe(SoftPAG):
    """Guidance at one step of the run, with differentiable strengths of all heads."""

    slug: ClassVar[str] = ""

    def with_step(self, step: GradientStep) -> GradientProbe:
        """Set the step and return the probe."""
        object.__setattr__(self, "_step", step)
        return self

    def weight(self, progress: float) -> float:
        """Return the scale at the step, 0 elsewhere."""
        step: GradientStep = getattr(self, "_step")  # noqa: B009
        return self.scale if not step.done and progress >= step.at - 1e-9 else 0.0

    def perturbation(self, layers: Layers, blocks: list[str]) -> Perturbation:
        """Return a perturbation of every head of every layer."""
        step: GradientStep = getattr(self, "_step")  # noqa: B009
        for name, count in layers.items():
            values = [step.base.get(name, {}).get(head, 0.0) for head in range(count or 0)]
            step.leaves[name] = torch.tensor([values] * step.samples, dtype=torch.float64).requires_grad_()
        every = {name: dict.fromkeys(range(count or 0), 1.0) for name, count in layers.items()}
        return DifferentiablePerturbation(every, target=self.target, joint=self.joint, leaves=step.leaves)


class HeadGradients:
    """Mean gradient of the score with respect to the strength of every head.

    Args:
        runner: runs the pipeline.
        evaluator: the objective, the pairs, the log and the count of evaluations.
        where: positions of the pairs.
        times: fractions of the run.
        answers: measures elsewhere, see :meth:`answer`; ``None``: in this process.
    """

    def __init__(
        self,
        runner: PipelineRunner,
        evaluator: Evaluator,
        where: Sequence[int],
        times: Sequence[float] = TIMES,
        answers: Answers | None = None,
    ) -> None:
        self.answers = answered_here(self.answer) if answers is None else answers
        self.runner, self.evaluator, self.where, self.times = runner, evaluator, list(where), tuple(times)

    def __call__(self, arm: Arm) -> dict[Head, float]:
        """Return ``d score / d u`` of every head at the strengths of ``arm``, mean over pairs and times."""
        evaluator, log, worker = self.evaluator, self.evaluator.log, self.evaluator.worker
        wanted = {f"slope/{time:g}/{i}/{format_arm(arm)}": (time, i) for time in self.times for i in self.where}
        missing = [(key, where) for key, where in wanted.items() if key not in log.rows]
        new = []
        mine = missing[worker.rank :: worker.size]
        heads = [list(head) for head in arm]
        for position, row in self.answers([{"arm": heads, "pair": i, "time": time} for _, (time, i) in mine]):
            new.append((mine[position][0], row))
            log.add(*new[-1])
        if worker.size > 1:
            log.rows.update(worker.gather(new))
        rows = [log.rows[key] for key in wanted]
        evaluator.passes["slopes"] += sum(passes for _, passes in rows)
        evaluator.images["slopes"] += len(rows)
        means = np.mean([values for values, _ in rows], 0)
        return {head: float(value) for head, value in zip(evaluator.heads, means)}

    def answer(self, request: dict[str, Any]) -> list[Any]:
        """Return the gradients of all heads, in their order, and the number of passes.

        Args:
            request: JSON values: ``arm``, heads with strengths, ``pair``, its position, and ``time``.
        """
        arm, pair, time = parse_arm(request["arm"]), self.evaluator.pairs[request["pair"]], request["time"]
        with count_passes(self.runner.pipe) as count:
            found = strength_gradients(self.runner, self.evaluator.objective.pixels, arm, [pair], time)
        values = [float(found[layer][0, head]) for layer, head in self.evaluator.heads]
        return [values, count.samples + _BACKWARD_PASSES]


def strength_gradients(
    runner: PipelineRunner, score: Any, arm: Arm, pairs: Sequence[Pair], time: float, steps: int | None = None
) -> dict[str, torch.Tensor]:
    """Return ``d score / d u`` by layer, (B, heads), at the strengths of ``arm``.

    Args:
        runner: runs the pipeline.
        score: differentiable function of (B, F, 3, H, W) images in [0, 1] and prompts; returns (B,).
        arm: strengths of the selected heads.
        pairs: B pairs.
        time: fraction of the run at which the clean image is predicted.
        steps: denoising steps of the run; ``None`` for those of the call.

    Raises:
        DitAttnError: the clean prediction of the scheduler is not known.
    """
    scores, leaves = predicted_scores(runner, score, arm, pairs, time, steps)
    gradients = torch.autograd.grad(scores.sum(), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients)
    }


def predicted_scores(
    runner: PipelineRunner, score: Any, arm: Arm, pairs: Sequence[Pair], time: float, steps: int | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return (B,) scores of the predicted clean images with their autograd graph, and the strengths by layer.

    Args and errors: see :func:`strength_gradients`.
    """
    base: dict[str, dict[int, float]] = {}
    for layer, head, u in arm:
        base.setdefault(layer, {})[head] = u
    step = GradientStep(time, len(pairs), base)
    method, pipe = runner.method, runner.pipe
    probe = GradientProbe(scale=method.scale, target=method.target, joint=method.joint).with_step(step)
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))  # what the hooks turn on ends here
        stack.enter_context(frozen_weights(pipe))
        stack.enter_context(enabled(pipe, probe))
        stack.enter_context(stop_at_prediction(pipe, step))
        result = runner.run(pairs, steps, output_type="pt")
    made = batch_of(result)
    assert made is not None
    images = made.items if made.video else made.items[:, None]
    with torch.enable_grad():
        return score(images, [pair.prompt for pair in pairs]), step.leaves
