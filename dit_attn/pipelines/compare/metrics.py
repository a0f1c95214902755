"""Measure a comparison with networks, each variant against dense on the same prompts and noise.

Every item passes through a network once; its score or features are enough for the figure and for its interval, which
leaves out prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_attn.errors import DitAttnError, unknown
from dit_attn.eval.extractors import Networks
from dit_attn.eval.report.metric_labels import COLUMNS
from dit_attn.pipelines.compare import statistics
from dit_attn.pipelines.compare.records import DENSE, ItemResult
from dit_attn.pipelines.compare.scorers import Scorer, load_scorer
from dit_attn.pipelines.compare.set_distances import frechet_distance, kernel_distance

WORLD = ("fid-world", "clip-world")  # the default metrics of embedded models


@dataclass(frozen=True)
class Metric:
    """A metric of a comparison; ``eval.report.metric_labels`` has its title in tables.

    Attributes:
        scorer: key of ``scorers.SCORERS``; the scorer is loaded once for all metrics that use it.
        distance: between two sets of (N, D) features, for metrics of sets; ``None`` where the scorer gives a number.
        of_dense: whether dense has a figure of its own.
    """

    scorer: str
    distance: Callable[[torch.Tensor, torch.Tensor], float] | None = None
    of_dense: bool = False


def check_metrics(names: Iterable[str], networks: Networks | None = None) -> None:
    """Check that the networks of the metrics can be loaded.

    Args:
        names: keys of :data:`METRICS`.
        networks: where the networks are.

    Raises:
        DitAttnError: unknown metric, or a missing network; the message says what to do.
    """
    for name in names:
        if name not in METRICS:
            raise unknown("metric of a comparison", name, METRICS)
    for scorer in dict.fromkeys(METRICS[name].scorer for name in names):
        load_scorer(scorer, networks, "cpu")


def measure_metrics(
    names: Sequence[str],
    results: Sequence[ItemResult],
    read: Callable[[ItemResult], np.ndarray],
    networks: Networks | None = None,
    device: Any = "cpu",
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure every variant.

    Args:
        names: keys of :data:`METRICS`.
        results: of every item and variant; failed ones are left out.
        read: returns the (F, H, W, 3) uint8 frames of a result.
        networks: where the networks are.
        device: where to compute.

    Returns:
        By label and metric a figure: ``value`` (``None`` where there is none, with the reason as ``why``), ``ci95``,
        ``n`` (items), ``label`` (network and baseline), ``better`` and, where a reader must know more, ``caution``.

    Raises:
        DitAttnError: as :func:`check_metrics`.
    """
    if not names:
        return {}
    made = [result for result in results if result.error is None]
    scores: dict[str, tuple[str, dict[Any, Any]]] = {}
    for key in dict.fromkeys(METRICS[name].scorer for name in names):
        scorer, network = load_scorer(key, networks, device)
        scores[key] = network, _score_all(scorer, made, read, device)
    labels = dict.fromkeys(result.variant for result in results)
    return {
        label: {name: _figure(name, label, made, *scores[METRICS[name].scorer]) for name in names} for label in labels
    }


def _score_all(
    scorer: Scorer, results: Sequence[ItemResult], read: Callable[[ItemResult], np.ndarray], device: Any
) -> dict[Any, Any]:
    """The score or features of every result by (label, index); the reason as text where there are none."""
    scores: dict[Any, Any] = {}
    dense: tuple[int, torch.Tensor] | None = None
    for result in sorted(results, key=lambda result: (result.index, result.variant != DENSE.label)):
        images = torch.from_numpy(np.array(read(result))).permute(0, 3, 1, 2).contiguous().to(device)
        if result.variant == DENSE.label:
            dense = (result.index, images)
        baseline = dense[1] if dense is not None and dense[0] == result.index else None
        try:
            with torch.no_grad():
                score = "dense was not made" if baseline is None else scorer(images, baseline, result.prompt)
            scores[result.variant, result.index] = score
        except (DitAttnError, RuntimeError, ValueError) as error:
            scores[result.variant, result.index] = str(error).splitlines()[0]
    return scores


def _figure(
    name: str, label: str, results: Sequence[ItemResult], network: str, scores: dict[Any, Any]
) -> dict[str, Any]:
    """One cell of the table."""
    metric = METRICS[name]
    against = "" if metric.of_dense else ", against dense"
    facts = {"label": f"{name} ({network}{against})", "better": COLUMNS[name].better}
    if label == DENSE.label and not metric.of_dense:
        return {"value": None, "ci95": None, "n": 0, **facts, "why": "dense is what the others are compared with"}
    own = [result for result in results if result.variant == label]
    good = [result for result in own if not isinstance(scores[label, result.index], str)]
    reasons = [scores[label, result.index] for result in own if result not in good] or ["no item was made"]
    if metric.distance is None:
        values, prompts = [scores[label, result.index] for result in good], [result.prompt for result in good]
        figure = statistics.mean_figure(values, prompts)
        return {**(figure or {"value": None, "ci95": None, "n": 0, "why": reasons[0]}), **facts}
    pairs = [result for result in good if not isinstance(scores.get((DENSE.label, result.index), ""), str)]
    if len(pairs) < 2:
        why = f"{name} needs at least 2 items made by both, there are {len(pairs)}"
        return {"value": None, "ci95": None, "n": len(pairs), **facts, "why": why}
    return {**_set_figure(metric.distance, label, pairs, scores), **facts}


def _set_figure(distance: Any, label: str, results: Sequence[ItemResult], scores: dict[Any, Any]) -> dict[str, Any]:
    """Distance of two sets of features, with its interval from leaving out prompts on both sides at once."""
    ours, theirs = ([scores[who, result.index].double().cpu() for result in results] for who in (label, DENSE.label))

    def between(items: list[int]) -> float:
        return distance(torch.cat([ours[i] for i in items]), torch.cat([theirs[i] for i in items]))

    images, size = sum(map(len, ours)), ours[0].shape[1]
    interval = statistics.jackknife(len(results), [result.prompt for result in results], between)
    if interval is not None and distance is frechet_distance:
        interval[0] = max(interval[0], 0.0)
    value = between(list(range(len(results))))
    figure: dict[str, Any] = {"value": value, "ci95": interval, "n": len(results), "images": images}
    if images <= size:
        figure["caution"] = f"{images} images for {size} features: biased, compare only at equal counts"
    return figure


METRICS: dict[str, Metric] = {
    "ms-ssim": Metric("five scales"),
    "lpips": Metric("lpips"),
    "fid": Metric("inception-v3", frechet_distance),
    "kid": Metric("inception-v3", kernel_distance),
    "clip": Metric("clip", of_dense=True),
    "fid-world": Metric("world-clip", frechet_distance),
    "kid-world": Metric("world-clip", kernel_distance),
    "clip-world": Metric("world-clip score", of_dense=True),
    "saturation": Metric("saturation", of_dense=True),
    "artifact-rate": Metric("artifacts", of_dense=True),
}
