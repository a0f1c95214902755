"""Metrics of a comparison by networks, each against what dense made of the same prompts and noise.

Every item passes through a network once; what remains of it (a score, or features) is enough for the figure and for its
interval, which leaves out whole prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_attn.errors import DitAttnError, import_problem, unknown
from dit_attn.eval.report.metric_labels import COLUMNS
from dit_attn.pipelines.compare import defects, statistics

if TYPE_CHECKING:
    import torch

    from dit_attn.eval.extractors import Networks
    from dit_attn.pipelines.compare.records import Take

    Judge = Callable[[torch.Tensor, torch.Tensor, str], Any]  # images, those of dense, caption

DENSE = "dense"
WORLD = ("fid-world", "clip-world")  # the choice for embedded models


@dataclass(frozen=True)
class Metric:
    """A metric of a comparison; ``eval.columns`` has its name in tables.

    Attributes:
        judge: key of ``JUDGES``: the network, loaded once for all metrics that read it.
        distance: of two sets of features, for metrics of sets; ``None`` where the judge gives one number an item.
        of_dense: whether dense has a figure of its own.
    """

    judge: str
    distance: Callable[[torch.Tensor, torch.Tensor], float] | None = None
    of_dense: bool = False


def check(names: Iterable[str], networks: Networks | None = None) -> None:
    """Load every network that the metrics need and let it go again.

    Raises:
        DitAttnError: an unknown metric, or a network that is not there; the message says what to do.
    """
    for name in names:
        if name not in METRICS:
            raise unknown("metric of a comparison", name, METRICS)
    for judge in dict.fromkeys(METRICS[name].judge for name in names):
        _load(judge, networks, "cpu")


def measure(
    names: Sequence[str],
    takes: Sequence[Take],
    read: Callable[[Take], np.ndarray],
    networks: Networks | None = None,
    device: Any = "cpu",
) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores of every variant.

    Args:
        names: metrics.
        takes: every item of every variant; failed ones are left out.
        read: (F, H, W, 3) uint8 of a take.
        networks: where the networks are.
        device: where to compute.

    Returns:
        By label and metric a figure: ``value`` (``None`` where there is none, with the reason as ``why``), ``ci95``,
        ``n`` (items), ``label`` (what judged, against what), ``better`` and, where a reader must know more,
        ``caution``.

    Raises:
        DitAttnError: as :func:`check`.
    """
    if not names:
        return {}
    made = [take for take in takes if take.error is None]
    seen: dict[str, tuple[str, dict[Any, Any]]] = {}
    for key in dict.fromkeys(METRICS[name].judge for name in names):
        judge, network = _load(key, networks, device)
        seen[key] = network, _judge(judge, made, read, device)
    labels = dict.fromkeys(take.variant for take in takes)
    return {label: {name: _figure(name, label, made, *seen[METRICS[name].judge]) for name in names} for label in labels}


def _judge(judge: Judge, takes: Sequence[Take], read: Callable[[Take], np.ndarray], device: Any) -> dict[Any, Any]:
    """What the network makes of every take, by (label, index); the reason as text where it makes nothing."""
    import torch

    found: dict[Any, Any] = {}
    dense: tuple[int, torch.Tensor] | None = None
    for take in sorted(takes, key=lambda take: (take.index, take.variant != DENSE)):
        images = torch.from_numpy(np.array(read(take))).permute(0, 3, 1, 2).contiguous().to(device)
        if take.variant == DENSE:
            dense = (take.index, images)
        beside = dense[1] if dense is not None and dense[0] == take.index else None
        try:
            with torch.no_grad():
                score = "dense was not made" if beside is None else judge(images, beside, take.prompt)
            found[take.variant, take.index] = score
        except (DitAttnError, RuntimeError, ValueError) as error:
            found[take.variant, take.index] = str(error).splitlines()[0]
    return found


def _figure(name: str, label: str, takes: Sequence[Take], network: str, seen: dict[Any, Any]) -> dict[str, Any]:
    """One cell of the table."""
    metric = METRICS[name]
    against = "" if metric.of_dense else ", against dense"
    facts = {"label": f"{name} ({network}{against})", "better": COLUMNS[name].better}
    if label == DENSE and not metric.of_dense:
        return {"value": None, "ci95": None, "n": 0, **facts, "why": "dense is what the others are compared with"}
    own = [take for take in takes if take.variant == label]
    good = [take for take in own if not isinstance(seen[label, take.index], str)]
    reasons = [seen[label, take.index] for take in own if take not in good] or ["no item was made"]
    if metric.distance is None:
        figure = statistics.mean_figure([seen[label, take.index] for take in good], [take.prompt for take in good])
        return {**(figure or {"value": None, "ci95": None, "n": 0, "why": reasons[0]}), **facts}
    pairs = [take for take in good if not isinstance(seen.get((DENSE, take.index), ""), str)]
    if len(pairs) < 2:
        why = f"{name} needs at least 2 items made by both, there are {len(pairs)}"
        return {"value": None, "ci95": None, "n": len(pairs), **facts, "why": why}
    return {**_set_figure(metric.distance, label, pairs, seen), **facts}


def _set_figure(distance: Any, label: str, takes: Sequence[Take], seen: dict[Any, Any]) -> dict[str, Any]:
    """Distance of two sets of features, with its interval from leaving out prompts on both sides at once."""
    import torch

    ours, theirs = ([seen[who, take.index].double().cpu() for take in takes] for who in (label, DENSE))

    def apart(items: list[int]) -> float:
        return distance(torch.cat([ours[i] for i in items]), torch.cat([theirs[i] for i in items]))

    images, size = sum(map(len, ours)), ours[0].shape[1]
    interval = statistics.jackknife(len(takes), [take.prompt for take in takes], apart)
    if interval is not None and distance is frechet:
        interval[0] = max(interval[0], 0.0)
    value = apart(list(range(len(takes))))
    figure: dict[str, Any] = {"value": value, "ci95": interval, "n": len(takes), "images": images}
    if images <= size:
        figure["caution"] = f"{images} images for {size} features: biased, compare only at equal counts"
    return figure


# -- distances of sets -------------------------------------------------------------------------------------------------


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of Gaussians through two sets of features (N, D) and (M, D), fp64: the arithmetic of FID.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) with covariances A and B (Heusel et al. 2017, eq. 6). With A = X'X
    and B = Y'Y the last trace is the nuclear norm of X Y', which needs no matrix root and is exact for few samples.
    """
    import torch

    x, y = _root(a), _root(b)
    spread = x.square().sum() + y.square().sum() - 2.0 * torch.linalg.svdvals(x @ y.T).sum()
    return max(float((a.mean(0) - b.mean(0)).square().sum() + spread), 0.0)


def _root(features: torch.Tensor) -> torch.Tensor:
    """X with X'X the covariance of (N, D) features, of at most D rows."""
    import torch

    x = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared maximum mean discrepancy of two sets of features under KID's cubic kernel, unbiased, over all pairs.

    Binkowski et al. 2018; the means over subsets of other implementations estimate this number.
    """

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def among(x: torch.Tensor) -> torch.Tensor:
        found = kernel(x, x)
        return (found.sum() - found.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(among(a) + among(b) - 2.0 * kernel(a, b).mean())


# -- networks ----------------------------------------------------------------------------------------------------------


def _load(judge: str, networks: Networks | None, device: Any) -> tuple[Judge, str]:
    """The judge and the name of its network."""
    from dit_attn.eval.extractors import Networks

    return JUDGES[judge](networks or Networks(), device)


def _ms_ssim(networks: Networks, device: Any) -> tuple[Judge, str]:
    _need_torchmetrics("ms-ssim")
    return partial(_pair_score, "ms-ssim", networks, device), "five scales"


def _pair_score(name: str, networks: Networks, device: Any, images: Any, dense: Any, caption: str) -> float:
    from dit_attn.eval.metrics import score

    return score(name, images, dense, networks=networks, device=device).value


def _lpips(networks: Networks, device: Any) -> tuple[Judge, str]:
    from dit_attn.eval.extractors import lpips_metric

    _need_torchmetrics("lpips")
    metric: Any = lpips_metric(networks).to(device)
    return lambda images, dense, caption: float(metric(images / 255.0, dense / 255.0)), networks.lpips


def _clip(networks: Networks, device: Any) -> tuple[Judge, str]:
    from dit_attn.eval.extractors import clip_pair

    _need_torchmetrics("clip")
    from torchmetrics.multimodal.clip_score import CLIPScore

    pair: Any = clip_pair(networks.clip)
    metric: Any = CLIPScore(pair).to(device)
    return lambda images, dense, caption: float(metric(images, [caption] * len(images))), networks.clip


def _inception(networks: Networks, device: Any) -> tuple[Judge, str]:
    import torch

    from dit_attn.eval.extractors import INCEPTION_FILE, inception_options, with_inception

    _need_torchmetrics("fid and kid")
    options, _ = inception_options(networks)
    file = options.get("feature_extractor_weights_path", "")
    if file is None:
        place = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        raise DitAttnError(
            f"fid and kid need the Inception weights at {place}; give --inception FILE with {INCEPTION_FILE}, or use "
            "fid-world, which needs no download"
        )
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric, name = with_inception(FrechetInceptionDistance, networks)
    network: Any = metric.inception.to(device).eval()
    return lambda images, dense, caption: _features(network, images), name


def _world_features(networks: Networks, device: Any) -> tuple[Judge, str]:
    from dit_attn.eval.shapes_world.world_clip import WorldFeatures

    network = WorldFeatures().to(device)
    return lambda images, dense, caption: _features(network, images), network.name


def _features(network: Any, images: torch.Tensor) -> torch.Tensor:
    """(N, D) on the CPU, a batch at a time."""
    import torch

    return torch.cat([network(batch).float().cpu() for batch in images.split(32)])


def _world_score(networks: Networks, device: Any) -> tuple[Judge, str]:
    from dit_attn.eval.shapes_world.world_clip import WorldFeatures, load, world_scores

    load()

    def judge(images: torch.Tensor, dense: torch.Tensor, caption: str) -> float:
        return float(world_scores(images, [caption] * len(images)).mean())

    return judge, WorldFeatures.name


def _saturation(networks: Networks, device: Any) -> tuple[Judge, str]:
    def judge(images: torch.Tensor, dense: torch.Tensor, caption: str) -> float:
        if images is dense and not defects.of_world(caption):
            raise DitAttnError("dense is what the others are compared with")
        return defects.saturation(_frames(images), _frames(dense), caption)

    return judge, f"{defects.PALETTE}; {defects.AGAINST} for other prompts"


def _artifacts(networks: Networks, device: Any) -> tuple[Judge, str]:
    def judge(images: torch.Tensor, dense: torch.Tensor, caption: str) -> float:
        return defects.artifact_rate(_frames(images), caption)

    return judge, "verifier of the shapes world"


def _frames(images: torch.Tensor) -> np.ndarray:
    """(F, H, W, 3) uint8 as the files hold them."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def _need_torchmetrics(what: str) -> None:
    import importlib.util

    if importlib.util.find_spec("torchmetrics") is None:
        raise DitAttnError(f"{what} needs torchmetrics: pip install torchmetrics, or use fid-world and clip-world")
    problem = import_problem("torchvision", "torchmetrics loads it where it is there")
    if problem is not None:
        raise problem


JUDGES: dict[str, Callable[[Networks, Any], tuple[Judge, str]]] = {
    "five scales": _ms_ssim,
    "lpips": _lpips,
    "clip": _clip,
    "inception-v3": _inception,
    "world-clip": _world_features,
    "world-clip score": _world_score,
    "saturation": _saturation,
    "artifacts": _artifacts,
}
METRICS: dict[str, Metric] = {
    "ms-ssim": Metric("five scales"),
    "lpips": Metric("lpips"),
    "fid": Metric("inception-v3", frechet),
    "kid": Metric("inception-v3", kernel_distance),
    "clip": Metric("clip", of_dense=True),
    "fid-world": Metric("world-clip", frechet),
    "kid-world": Metric("world-clip", kernel_distance),
    "clip-world": Metric("world-clip score", of_dense=True),
    "saturation": Metric("saturation", of_dense=True),
    "artifact-rate": Metric("artifacts", of_dense=True),
}
