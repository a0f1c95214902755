"""How the score changes with the strength of every head at once: one forward and one backward pass.

A perturbed map is linear in its strength u, so that ``d score / d u`` exists for all heads at u = 0, where the
perturbed pass equals the conditional one. The score is that of the clean picture ``x0(F + w (c - p(u)))`` that a step
predicts, decoded by the pipeline itself: after the looked-at step the scheduler hands the prediction on to the end of
the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from dit_attn.api import enabled
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search.evaluation import (
    Arm,
    Head,
    Pair,
    PipelineMaker,
    Trials,
    address,
    counted,
    models_of,
)
from dit_attn.processors.attach.perturbed_pass import forwards
from dit_attn.processors.core.call import AttentionCall
from dit_attn.processors.guidance import perturbation
from dit_attn.processors.guidance.perturbation import Perturbation
from dit_attn.processors.methods.perturbed_guidance import Layers
from dit_attn.processors.methods.softpag import SoftPAG

TIMES = (0.25, 0.5)  # of the run, where it is looked at


@dataclass(frozen=True)
class Free(Perturbation):
    """A perturbation whose strengths are tensors: ``leaves[layer]``, (B, heads), that a gradient flows to."""

    leaves: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Never: strengths of 0 have a gradient too."""
        return False

    def apply(self, call: AttentionCall, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        """See the base class."""
        u = self.leaves.get(call.layer.name)
        if u is None or call.q.shape[1] != call.k.shape[1]:
            return out
        rows = perturbation._rows(call, self.joint)
        part = perturbation._Part(call, torch.arange(out.shape[2], device=out.device), first)
        target = perturbation._TARGETS[self.target](self, part, rows)
        here = (slice(first, None), slice(*rows))
        wide = perturbation.wide(out[here])
        changed = out.clone()
        changed[here] = (wide + u.to(wide)[:, None, :, None] * (perturbation.wide(target) - wide)).to(out.dtype)
        return changed


@dataclass
class Look:
    """State of one look at a run.

    Attributes:
        at: fraction of the run.
        rows: samples.
        base: strengths that the run has anyway, by layer and head.
        leaves: filled when the plan is made.
        done: whether the looked-at step is over.
        last: what the transformer returned there.
    """

    at: float
    rows: int
    base: dict[str, dict[int, float]]
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)
    done: bool = False
    last: Any = None


@dataclass(frozen=True)
class Probe(SoftPAG):
    """Guidance at the looked-at step alone, with free strengths."""

    slug: ClassVar[str] = ""

    def with_look(self, look: Look) -> Probe:
        """This probe for one look."""
        object.__setattr__(self, "_look", look)
        return self

    def weight(self, progress: float) -> float:
        """The scale at the looked-at step, 0 elsewhere."""
        look: Look = getattr(self, "_look")  # noqa: B009
        return self.scale if not look.done and progress >= look.at - 1e-9 else 0.0

    def perturbation(self, layers: Layers, blocks: list[str]) -> Perturbation:
        """Every head of every layer."""
        look: Look = getattr(self, "_look")  # noqa: B009
        for name, count in layers.items():
            values = [look.base.get(name, {}).get(head, 0.0) for head in range(count or 0)]
            look.leaves[name] = torch.tensor([values] * look.rows, dtype=torch.float64).requires_grad_()
        every = {name: dict.fromkeys(range(count or 0), 1.0) for name, count in layers.items()}
        return Free(every, target=self.target, joint=self.joint, leaves=look.leaves)


class Slopes:
    """``slopes(arm)``: mean over pairs and times of ``d score / d u`` of every head beside an arm.

    Args:
        maker: makes items.
        trials: the objective, the pairs, the store and the count of evaluations.
        where: positions of the pairs.
        times: fractions of the run.
    """

    def __init__(
        self, maker: PipelineMaker, trials: Trials, where: Sequence[int], times: Sequence[float] = TIMES
    ) -> None:
        self.maker, self.trials, self.where, self.times = maker, trials, list(where), tuple(times)

    def __call__(self, arm: Arm) -> dict[Head, float]:
        trials, store, share = self.trials, self.trials.store, self.trials.share
        looks = {f"slope/{time:g}/{i}/{address(arm)}": (time, i) for time in self.times for i in self.where}
        missing = [(key, look) for key, look in looks.items() if key not in store.rows]
        new = []
        for key, (time, i) in missing[share.rank :: share.size]:
            new.append((key, self._one(arm, trials.pairs[i], time)))
            store.put(*new[-1])
        if share.size > 1:
            store.rows.update(share.gather(new))
        rows = [store.rows[key] for key in looks]
        trials.passes["slopes"] += sum(passes for _, passes in rows)
        trials.images["slopes"] += len(rows)
        means = np.mean([values for values, _ in rows], 0)
        return {head: float(value) for head, value in zip(trials.heads, means)}

    def _one(self, arm: Arm, pair: Pair, time: float) -> list[Any]:
        """Slopes of all heads, in their order, and the passes it took (a backward pass counts as two)."""
        with counted(self.maker.pipe) as count:
            found = slopes_of(self.maker, self.trials.goal.pixels, arm, [pair], time)
        values = [float(found[layer][0, head]) for layer, head in self.trials.heads]
        return [values, count.rows + 3]


def slopes_of(
    maker: PipelineMaker, score: Any, arm: Arm, pairs: Sequence[Pair], time: float, steps: int | None = None
) -> dict[str, torch.Tensor]:
    """``d score / d u`` by layer, (B, heads), at the strengths of ``arm``.

    Args:
        maker: makes items.
        score: differentiable, (B, F, 3, H, W) in [0, 1] and prompts to (B,).
        arm: strengths that are there.
        pairs: B of them.
        time: fraction of the run at which the clean picture is predicted.
        steps: of the run.

    Raises:
        DitAttnError: the scheduler's prediction of the clean picture is not known.
    """
    found, leaves = predicted(maker, score, arm, pairs, time, steps)
    gradients = torch.autograd.grad(found.sum(), list(leaves.values()), allow_unused=True)
    pieces = zip(leaves.items(), gradients)
    return {name: torch.zeros_like(leaf) if slope is None else slope for (name, leaf), slope in pieces}


def predicted(
    maker: PipelineMaker, score: Any, arm: Arm, pairs: Sequence[Pair], time: float, steps: int | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(B,) scores of the predicted clean pictures, with their graph, and the strengths they depend on."""
    base: dict[str, dict[int, float]] = {}
    for layer, head, u in arm:
        base.setdefault(layer, {})[head] = u
    look = Look(time, len(pairs), base)
    method = maker.method
    probe = Probe(scale=method.scale, target=method.target, joint=method.joint).with_look(look)
    pipe = maker.pipe
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))  # what the hooks switch on ends here
        stack.enter_context(_frozen(pipe))
        stack.enter_context(enabled(pipe, probe))
        stack.enter_context(_looking(pipe, look))
        result = maker.run(pairs, steps, output_type="pt")
    images = result.frames if getattr(result, "frames", None) is not None else result.images
    images = images if images.ndim == 5 else images[:, None]
    with torch.enable_grad():
        return score(images, [pair.prompt for pair in pairs]), look.leaves


@contextmanager
def _frozen(pipe: Any) -> Iterator[None]:
    """No gradient of any weight, which would keep every activation of the plain pass."""
    parts = [part for part in vars(pipe).values() if isinstance(part, torch.nn.Module)]
    free = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    for parameter in free:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)


@contextmanager
def _looking(pipe: Any, look: Look) -> Iterator[None]:
    """Gradients on from the looked-at step, whose predicted clean picture goes straight to the decoder."""
    scheduler = pipe.scheduler
    stock = type(scheduler)
    models = models_of(pipe)
    after = ExitStack()

    def step(self: Any, model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = kwargs.get("return_dict", True)
        if look.done:
            found = sample
        elif torch.is_grad_enabled():
            found = clean(self, model_output, timestep, sample)
            look.done = True
            after.enter_context(forwards({model: lambda *_, **__: look.last for model in models}))
        else:
            return stock.step(self, model_output, timestep, sample, *args, **kwargs)
        found = found.to(sample.dtype)
        return _Stepped(found) if plain else (found,)

    def before(module: torch.nn.Module, args: Any) -> None:
        if not look.done and _progress(scheduler, pipe) >= look.at - 1e-9:
            torch.set_grad_enabled(True)

    def behind(module: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and not look.done:
            look.last = _detached(output)

    scheduler.__class__ = type(stock.__name__, (stock,), {"step": step})
    handles = [model.register_forward_pre_hook(before, prepend=True) for model in models]
    handles += [model.register_forward_hook(behind) for model in models]
    try:
        yield
    finally:
        scheduler.__class__ = stock
        after.close()
        for handle in handles:
            handle.remove()


class _Stepped(tuple[Any, ...]):
    """The output of a scheduler's step in both its forms."""

    def __new__(cls, sample: torch.Tensor) -> _Stepped:
        return super().__new__(cls, (sample,))

    @property
    def prev_sample(self) -> Any:
        """The sample."""
        return self[0]


def _progress(scheduler: Any, pipe: Any) -> float:
    """Fraction of the run that is done."""
    index = getattr(scheduler, "step_index", None)
    return (index or 0) / max(len(scheduler.timesteps), 1)


def _detached(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.detach()
    if isinstance(output, dict):
        return type(output)(**{name: _detached(item) for name, item in output.items()})
    return type(output)(_detached(item) for item in output) if isinstance(output, (tuple, list)) else output


def clean(scheduler: Any, prediction: torch.Tensor, timestep: Any, sample: torch.Tensor) -> torch.Tensor:
    """The clean sample that a prediction stands for.

    Raises:
        DitAttnError: not known for this scheduler.
    """
    if getattr(scheduler, "step_index", 0) is None:
        scheduler._init_step_index(timestep)
    name = type(scheduler).__name__
    config = scheduler.config
    if name.startswith("FlowMatch"):
        sigma = scheduler.sigmas[scheduler.step_index].to(sample.device, sample.dtype)
        return sample - sigma * prediction
    kind = str(config.get("algorithm_type", ""))
    solver = config.get("predict_x0", False) or kind in ("dpmsolver++", "sde-dpmsolver++")
    if solver and hasattr(scheduler, "convert_model_output"):
        found: torch.Tensor = scheduler.convert_model_output(prediction, sample=sample)
        return found
    if name.startswith("DDIM") or name.startswith("CogVideoXDDIM"):
        alpha = scheduler.alphas_cumprod[int(timestep)].to(sample.device, sample.dtype)
        kinds = {
            "epsilon": lambda: (sample - (1 - alpha) ** 0.5 * prediction) / alpha**0.5,
            "v_prediction": lambda: alpha**0.5 * sample - (1 - alpha) ** 0.5 * prediction,
            "sample": lambda: prediction,
        }
        return kinds[config.prediction_type]()
    raise DitAttnError(
        f"the gradient needs the clean picture that a step of {name} predicts, which is known for flow-matching "
        "schedulers, UniPC, DPM-Solver++ and DDIM; use another strategy or scheduler"
    )


