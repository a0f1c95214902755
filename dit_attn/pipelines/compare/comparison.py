"""Compare methods with dense attention on the same prompts and noise: time, cost and quality.

    from dit_attn import models
    from dit_attn.pipelines.compare import Variant, compare

    pipe = models.load("tiny-image")
    result = compare(
        pipe,
        ["a large red circle at the left on white"],
        [Variant("half", (dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32),))],
        seeds=(0, 1),
        call=models.call_defaults("tiny-image"),
    )
    print(result.summary_rows())

Dense is always included and runs first in every round. The variants take turns on every item, so that all of them meet
the same state of the machine; ratios of times are formed within rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_attn.api import disable, enabled, explain, summary, watch
from dit_attn.errors import DitAttnError, RunStopped
from dit_attn.pipelines.compare import metrics as quality
from dit_attn.pipelines.compare import statistics
from dit_attn.pipelines.compare.records import DENSE, ItemResult, Variant
from dit_attn.pipelines.compare.summary_row import summary_row
from dit_attn.pipelines.output import batch_of
from dit_attn.processors.attach.summary import Summary

if TYPE_CHECKING:
    from dit_attn.eval.extractors import Networks


@dataclass
class Comparison:
    """Results of a comparison.

    Attributes:
        variants: the compared variants, dense first.
        results: of every item and variant.
        metrics: figures of :mod:`~dit_attn.pipelines.compare.metrics` by label and name.
        frames: (F, H, W, 3) uint8 by (label, index), for comparisons in memory.
    """

    variants: tuple[Variant, ...]
    results: list[ItemResult]
    metrics: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    frames: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def attention_share(self) -> float | None:
        """Fraction of the operations of a dense step that attention takes, mean over the items; ``None`` if unknown."""
        known = [r.attention_share for r in self.successful(DENSE.label) if r.attention_share is not None]
        return sum(known) / len(known) if known else None

    def successful(self, label: str) -> list[ItemResult]:
        """Return the results of one variant without those that failed."""
        return [result for result in self.results if result.variant == label and result.error is None]

    def summary_rows(self) -> list[dict[str, Any]]:
        """Return one row per variant, dense first: ``label``, ``methods``, ``call``, ``failed`` (items), ``metrics``
        and the figures of :func:`~dit_attn.pipelines.compare.summary_row.summary_row`."""
        dense = self.successful(DENSE.label)
        rows = []
        for variant in self.variants:
            failed = sum(r.variant == variant.label and r.error is not None for r in self.results)
            row = summary_row(self.successful(variant.label), dense)
            settings = [method.to_dict() for method in variant.methods]
            facts = {"label": variant.label, "methods": settings, "call": dict(variant.call), "failed": failed}
            rows.append({**facts, **row, "metrics": self.metrics.get(variant.label, {})})
        return rows


def compare(
    pipe: Any,
    prompts: Sequence[str],
    variants: Sequence[Variant],
    *,
    seeds: Sequence[int] = (0,),
    call: dict[str, Any] | None = None,
    metrics: Sequence[str] = (),
    networks: Networks | None = None,
) -> Comparison:
    """Run every prompt with every seed, dense and by every variant, in memory.

    Args:
        pipe: a stock pipeline; enabled methods are disabled.
        prompts: texts.
        variants: to compare with dense.
        seeds: of the CPU generators.
        call: further arguments of the pipeline's call.
        metrics: names of :data:`~dit_attn.pipelines.compare.metrics.METRICS`; PSNR and SSIM are always there.
        networks: where the networks of the metrics are.

    Raises:
        DitAttnError: two variants of one label, a method that does not fit the pipeline, or a metric whose network is
            missing.
    """
    quality.check_metrics(metrics, networks)
    call, everyone = call or {}, with_dense(variants)
    result, fraction = Comparison(everyone, []), attention_share(pipe, call)
    items = [(prompt, seed) for prompt in prompts for seed in seeds]

    def run(prompt: str, seed: int, changes: dict[str, Any]) -> tuple[np.ndarray, float]:
        started = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(seed)
        out = pipe(prompt, generator=generator, output_type="np", **{**call, **changes})
        return as_frames(out), time.perf_counter() - started

    for variant in everyone if items else ():  # the first call of a process includes set-up: it is not timed
        with variant_enabled(pipe, variant):
            few = {"num_inference_steps": 2} if "num_inference_steps" in call else {}
            run(*items[0], {**dict(variant.call), **few})
    for index, (prompt, seed) in enumerate(items):

        def make(variant: Variant, prompt: str = prompt, seed: int = seed) -> tuple[np.ndarray, float]:
            return run(prompt, seed, dict(variant.call))

        def save(variant: Variant, frames: np.ndarray, seconds: float, index: int = index) -> None:
            result.frames[variant.label, index] = frames

        item = ItemResult("", index, prompt, seed, attention_share=fraction)
        result.results += list(run_round(pipe, item, everyone, make, save))
    result.metrics = quality.measure_metrics(
        metrics, result.results, lambda one: result.frames[one.variant, one.index], networks
    )
    return result


def with_dense(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """Return the variants with dense in front.

    Raises:
        DitAttnError: two of one label.
    """
    everyone = (DENSE, *(variant for variant in variants if variant != DENSE))
    labels = [variant.label for variant in everyone]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise DitAttnError(f"two variants are called {twice!r}; give every method once (dense is always included)")
    return everyone


def run_round(
    pipe: Any,
    item: ItemResult,
    variants: Sequence[Variant],
    make: Callable[[Variant], tuple[np.ndarray, float]],
    save: Callable[[Variant, np.ndarray, float], str | None],
) -> Iterator[ItemResult]:
    """Run one item by every variant in turn; a variant that fails does not stop the others.

    Args:
        pipe: the pipeline.
        item: index, prompt, seed and attention share of the item.
        variants: dense first: fidelity and time are taken against it.
        make: runs the pipeline with the variant's call and what is enabled: (F, H, W, 3) uint8 and seconds.
        save: saves the frames while the method is enabled; returns the name of the file.

    Raises:
        RunStopped: ``make`` or ``save`` cannot go on (a full disk).
    """
    dense: tuple[np.ndarray, float] | None = None
    for variant in variants:
        result = replace(item, variant=variant.label, warnings=[])
        try:
            with variant_enabled(pipe, variant):
                frames, result.seconds = make(variant)
                report = _summary_of(pipe)
                result.warnings = list(report.warnings) if report else []
                if variant.methods and report:
                    result.density, result.run_density = report.density, report.run_density
                    if report.guidance is not None:
                        result.parallel, result.sideways = report.guidance.parallel, report.guidance.orthogonal
                result.file = save(variant, frames, result.seconds)
            if not variant.methods:
                result.density, result.run_density = 1.0, 1.0
            if variant.is_baseline:
                dense = (frames, result.seconds)
            if dense is not None:
                result.dense_seconds = dense[1]
                fidelity = statistics.pair_scores(dense[0], frames)
                result.psnr, result.ssim, result.equal = (fidelity[name] for name in ("psnr", "ssim", "equal"))
            result.verdict = statistics.verify_caption(frames, item.prompt)
            result.temporal, result.saturation = statistics.temporal(frames), statistics.saturation(frames)
        except RunStopped:
            raise
        except Exception as error:  # whatever fails, the other variants go on; the line names the error
            lines = str(error).strip().splitlines()
            result.error = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        yield result


def variant_enabled(pipe: Any, variant: Variant) -> AbstractContextManager[Any]:
    """Enable a variant's methods for a ``with`` block; dense is only watched, which changes no bit of it."""
    return enabled(pipe, *variant.methods) if variant.methods else _watched(pipe)


@contextmanager
def _watched(pipe: Any) -> Iterator[None]:
    disable(pipe)
    with suppress(DitAttnError):  # a family that is not supported runs unwatched
        watch(pipe)
    try:
        yield
    finally:
        disable(pipe)


def _summary_of(pipe: Any) -> Summary | None:
    try:
        return summary(pipe)
    except DitAttnError:
        return None


def attention_share(pipe: Any, call: dict[str, Any]) -> float | None:
    """Return the fraction of the operations of a dense step that attention takes; ``None`` for unknown families.

    Args:
        pipe: the pipeline.
        call: arguments of its call; ``height``, ``width`` and ``num_frames`` matter.
    """
    size = {key: call.get(key) for key in ("height", "width", "num_frames")}
    try:
        return explain(pipe, **size).attention_share
    except (DitAttnError, AttributeError, TypeError):
        return None


def as_frames(out: Any) -> np.ndarray:
    """Return the first item of a pipeline's ``output_type="np"`` result as (F, H, W, 3) uint8; F is 1 for an image."""
    made = batch_of(out)
    if made is None:
        raise DitAttnError(f"{type(out).__name__} holds neither images nor frames, so there is nothing to compare")
    values = np.asarray(made.items[0])
    values = values if values.ndim == 4 else values[None]
    return (values[..., :3].clip(0.0, 1.0) * 255).round().astype(np.uint8)
