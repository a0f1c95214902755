"""Making and scoring pictures with some heads perturbed: every outcome is kept, and shared between processes."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from dit_attn.api import disable, enabled
from dit_attn.errors import DitAttnError, unknown
from dit_attn.pipelines.head_search.objectives import Objective, judged
from dit_attn.pipelines.measurement_log import Store
from dit_attn.processors.attach.attach import session_of
from dit_attn.processors.guidance import heads
from dit_attn.processors.methods.softpag import SoftPAG

Head = tuple[str, int]  # layer and position
Arm = tuple[tuple[str, int, float], ...]  # heads with their strengths; () is no guidance
Layers = dict[str, int]


class Maker(Protocol):
    """Makes the items of an arm: ``make(arm, pairs, steps)`` gives one uint8 (F, H, W, 3) a pair (``None`` where the
    result is not finite), and the transformer passes a pair took."""

    def __call__(self, arm: Arm, pairs: Sequence[Pair], steps: int | None) -> tuple[list[np.ndarray | None], float]: ...


@dataclass(frozen=True)
class Pair:
    """A prompt and the seed of its noise."""

    prompt: str
    seed: int


@dataclass
class Share:
    """The part of one process in a search by several.

    Attributes:
        rank, size: which of how many.
        gather: everyone's lists, joined, to everyone.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[list[Any]], list[Any]] = lambda items: items


class Trials:
    """Scores of arms on pairs of prompt and noise, each made once.

    All arms get the same pairs, so that differences between arms are paired (common random numbers).

    Args:
        make: makes items.
        goal: scores them.
        pairs: prompts with seeds.
        layers: layers with their number of heads, in the order they run.
        batch: pairs made in one call.
        store: what was measured before, and where to put the rest.
        share: which part of the work is this process's.
        tell: is told of the images that are done and those still to be made in this call.
    """

    def __init__(
        self,
        make: Maker,
        goal: Objective,
        pairs: Sequence[Pair],
        layers: Layers,
        *,
        batch: int = 4,
        store: Store | None = None,
        share: Share | None = None,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.make, self.goal, self.pairs, self.layers = make, goal, list(pairs), layers
        self.batch, self.store, self.share, self.tell = batch, store or Store(), share or Share(), tell
        self._order = {layer: i for i, layer in enumerate(layers)}
        self._counted: set[str] = set()
        self.images: Counter[str] = Counter()  # by purpose, also those an earlier run made
        self.passes: Counter[str] = Counter()

    @property
    def heads(self) -> list[Head]:
        """Every candidate."""
        return [(layer, head) for layer, count in self.layers.items() for head in range(count)]

    def ordered(self, arm: Sequence[tuple[str, int, float]]) -> Arm:
        """The arm in the order of layers and heads; of a head named twice the last strength counts, 0 is left out."""
        found = {(layer, head): u for layer, head, u in arm}
        places = sorted(found, key=lambda where: (self._order[where[0]], where[1]))
        return tuple((layer, head, found[layer, head]) for layer, head in places if found[layer, head] > 0.0)

    def scores(
        self, arms: Sequence[Arm], where: Sequence[int], steps: int | None = None, purpose: str = "candidates"
    ) -> np.ndarray:
        """Scores of arms.

        Args:
            arms: what to score.
            where: positions of pairs.
            steps: of a run; ``None``: as the call says.
            purpose: what it is for, in the count of evaluations.

        Returns:
            (arms, pairs), NaN where nothing finite was made; (arms, 1) for objectives of whole sets.
        """
        arms = [self.ordered(arm) for arm in arms]
        groups = self._groups(where)
        work = list(dict.fromkeys((arm, group) for arm in arms for group in self._missing(arm, groups, steps)))
        self._do(work, steps)
        keys = [[self._key(arm, part, steps) for part in self._parts(where)] for arm in arms]
        for key in (key for row in keys for key in row if key not in self._counted):
            self._counted.add(key)
            self.images[purpose] += int(self.store.rows[key][2])
            self.passes[purpose] += self.store.rows[key][1]
        values = [[self.store.rows[key][0] for key in row] for row in keys]
        return np.array([[np.nan if x is None else x for x in row] for row in values], dtype=np.float64)

    def mean(self, table: np.ndarray) -> np.ndarray:
        """(arms,) means over pairs; an arm that broke down anywhere is the worst there is."""
        return np.where(np.isnan(table).any(1), -np.inf, np.nan_to_num(table).mean(1))

    def _parts(self, where: Sequence[int]) -> list[tuple[int, ...]]:
        """The units that have a score."""
        return [tuple(where)] if self.goal.whole else [(i,) for i in where]

    def _groups(self, where: Sequence[int]) -> list[tuple[int, ...]]:
        """Pairs that are made in one call; the same ones for every arm."""
        if self.goal.whole:
            return [tuple(where)]
        groups: dict[int, list[int]] = {}
        for i in where:
            groups.setdefault(i // self.batch, []).append(i)
        return [tuple(group) for group in groups.values()]

    def _missing(self, arm: Arm, groups: Sequence[tuple[int, ...]], steps: int | None) -> Iterator[tuple[int, ...]]:
        for group in groups:
            units = [part for part in self._parts(group) if self._key(arm, part, steps) not in self.store.rows]
            if units:
                yield tuple(i for part in units for i in part)

    def _key(self, arm: Arm, part: tuple[int, ...], steps: int | None) -> str:
        pairs = ",".join(map(str, part))
        return f"{steps or 'all'}/{pairs}/{address(arm)}"

    def _do(self, work: Sequence[tuple[Arm, tuple[int, ...]]], steps: int | None) -> None:
        """Make what is missing, every process its part, and let everyone know."""
        share, total = self.share, sum(len(group) for _, group in work)
        new: list[tuple[str, Any]] = []
        failure: list[str] = []
        done = 0
        try:
            for arm, group in work[share.rank :: share.size]:
                for key, row in self._one(arm, group, steps):
                    self.store.put(key, row)
                    new.append((key, row))
                done += len(group)
                self.tell(min(done * share.size, total), total)
        except Exception as error:
            if share.size == 1:
                raise
            failure.append(f"process {share.rank}: {type(error).__name__}: {error}")
        if share.size == 1 or not work:
            return
        self.store.rows.update(share.gather(new))
        failures = share.gather(failure)
        if failures:
            raise DitAttnError(f"{failures[0]}; what was made is kept: run the same command with --resume")

    def _one(self, arm: Arm, group: tuple[int, ...], steps: int | None) -> list[tuple[str, Any]]:
        pairs = [self.pairs[i] for i in group]
        calls = [slice(x, x + self.batch) for x in range(0, len(pairs), self.batch)]
        images: list[np.ndarray | None] = []
        passes = 0.0
        for part in calls:
            found, cost = self.make(arm, pairs[part], steps)
            images += found
            passes += cost * len(pairs[part])
        good = [i for i, image in enumerate(images) if image is not None]
        prompts = [pair.prompt for pair in pairs]
        shown = [image for image in images if image is not None]
        if self.goal.whole:
            whole = judged(self.goal, shown, prompts)[0] if len(good) == len(images) else None
            return [(self._key(arm, group, steps), [whole, passes, len(group)])]
        scores = dict(zip(good, judged(self.goal, shown, [prompts[i] for i in good]) if good else []))
        each = passes / len(group)
        return [(self._key(arm, (i,), steps), [scores.get(n), each, 1]) for n, i in enumerate(group)]


def address(arm: Arm) -> str:
    """The canonical text of an arm; ``none`` for no guidance."""
    return heads.canonical([(layer, head, u) for layer, head, u in arm]) or "none"


def layers_of(pipe: Any) -> Layers:
    """The layers of a pipeline whose heads can be perturbed, with their number of heads.

    Raises:
        DitAttnError: unsupported family, or a layer that does not say how many heads it has.
    """
    found: dict[str, int | None] = {}

    class Looking(SoftPAG):
        def perturbation(self, layers: dict[str, int | None], blocks: list[str]) -> Any:
            found.update(layers)
            return super().perturbation(layers, blocks)

    with enabled(pipe, Looking(heads="0:0")):
        pass
    silent = [layer for layer, count in found.items() if count is None]
    if silent:
        raise DitAttnError(f"{silent[0]} does not say how many heads it has, so they cannot be searched")
    return {layer: int(count or 0) for layer, count in found.items()}


class PipelineMaker:
    """Makes items with a stock pipeline.

    Args:
        pipe: the pipeline; what was enabled on it is taken off.
        method: settings of the guidance; its heads are replaced by those of the arm.
        call: further arguments of the pipeline's call.

    Raises:
        DitAttnError: an argument that the pipeline does not take.
    """

    def __init__(self, pipe: Any, method: SoftPAG, call: dict[str, Any]) -> None:
        self.pipe, self.method, self.call = pipe, method, dict(call)
        self.takes = inspect.signature(type(pipe).__call__).parameters
        if wrong := [name for name in call if name not in self.takes]:
            raise unknown(f"argument of {type(pipe).__name__}", wrong[0], list(self.takes)[1:])
        disable(pipe)

    def __call__(self, arm: Arm, pairs: Sequence[Pair], steps: int | None) -> tuple[list[np.ndarray | None], float]:
        """See :class:`Maker`."""
        if not arm:
            with counted(self.pipe) as count:
                result = self.run(pairs, steps)
            return pictures(result), count.rows / len(pairs)
        with enabled(self.pipe, replace(self.method, heads=address(arm))), counted(self.pipe) as count:
            result = self.run(pairs, steps)
            guided = [session_of(model).guider for model in models_of(self.pipe)]  # type: ignore[union-attr]
            extra = sum(guide.evaluations for guide in guided if guide is not None)
        return pictures(result), count.rows / len(pairs) + extra

    def run(self, pairs: Sequence[Pair], steps: int | None, **changes: Any) -> Any:
        """The pipeline's output for pairs, with what is enabled on it."""
        call = {**self.call, "output_type": "np", **changes}
        if steps is not None:
            call["num_inference_steps"] = steps
        noise = [torch.Generator("cpu").manual_seed(pair.seed) for pair in pairs]
        return self.pipe(
            prompt=[pair.prompt for pair in pairs], generator=noise if len(noise) > 1 else noise[0],
            **{name: value for name, value in call.items() if name in self.takes},
        )  # fmt: skip


def models_of(pipe: Any) -> list[torch.nn.Module]:
    """The transformers of a pipeline."""
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    return [model for model in found if model is not None]


@dataclass
class Count:
    """Transformer passes, one a sample."""

    rows: int = 0


@contextmanager
def counted(pipe: Any) -> Iterator[Count]:
    """Count the samples that go through the transformers; the perturbed pass of a guidance method is not seen."""
    count = Count()

    def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("hidden_states", args[0] if args else None)
        count.rows += len(given) if given is not None else 1

    handles = [model.register_forward_pre_hook(see, with_kwargs=True) for model in models_of(pipe)]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def pictures(result: Any) -> list[np.ndarray | None]:
    """Every image (1, H, W, 3) or clip (F, H, W, 3) of a pipeline's output as uint8; ``None`` where it is not finite.

    Raises:
        DitAttnError: it holds neither.
    """
    video = getattr(result, "frames", None) is not None
    batch = result.frames if video else getattr(result, "images", None)
    if batch is None:
        raise DitAttnError(f"{type(result).__name__} holds neither images nor frames, so there is nothing to score")
    out: list[np.ndarray | None] = []
    for item in batch:
        values = np.stack([np.asarray(frame) for frame in item]) if video else np.asarray(item)[None]
        if values.dtype != np.uint8:
            if not np.isfinite(values).all():
                out.append(None)
                continue
            values = (values.clip(0.0, 1.0) * 255).round().astype(np.uint8)
        out.append(np.repeat(values, 3, -1) if values.shape[-1] == 1 else values[..., :3])
    return out
