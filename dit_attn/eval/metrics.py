"""Image metrics by torchmetrics, with what each needs and what judged.

Images are uint8 (N, 3, H, W). Every score carries the number of samples and the label of the network that judged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from dit_attn.errors import DitAttnError, import_problem, unknown
from dit_attn.eval.extractors import Networks, clip_pair, lpips_metric, with_inception

BATCH = 32
FEW = 100  # samples below which KID is mostly noise
SPLIT = 10  # images a split of the Inception score has at least: one of a single image scores 1 whatever it shows


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        metric: its name.
        value: the score.
        spread: standard deviation over subsets or splits, where the metric has one.
        samples: images it was computed from.
        reference: images it was compared with, if any.
        label: what judged, e.g. ``fid (inception-v3)``.
        better: ``"higher"`` or ``"lower"``.
        caution: what a reader must know, e.g. too few samples for a stable figure; ``None`` when nothing.
    """

    metric: str
    value: float
    spread: float | None
    samples: int
    reference: int | None
    label: str
    better: str
    caution: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Spec:
    """What a metric needs.

    Attributes:
        compute: ``(images, reference, captions, networks, device) -> (value, spread, judge, caution)``.
        needs: ``"images"``, ``"pairs"`` (as many references, in order), ``"reference"`` (any number) or ``"captions"``.
        better: ``"higher"`` or ``"lower"``.
        at_least: samples without which there is no number.
        what: one line for help texts.
    """

    compute: Callable[..., tuple[float, float | None, str | None, str | None]]
    needs: str
    better: str
    at_least: int
    what: str


def score(
    metric: str,
    images: torch.Tensor,
    reference: torch.Tensor | None = None,
    captions: Sequence[str] | None = None,
    networks: Networks | None = None,
    device: torch.device | str = "cpu",
) -> Score:
    """Compute one metric of a set of images; in a distributed run every process gives its part and gets the full score.

    Args:
        metric: a name of ``METRICS``.
        images: uint8 (N, 3, H, W).
        reference: uint8 (M, 3, h, w); for pair metrics as many as images and of their size.
        captions: one per image, for metrics of text and image.
        networks: where FID, CLIP score and LPIPS find theirs.
        device: where to compute.

    Raises:
        DitAttnError: an input is missing or too small, or a network is not there; the message says what to do.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    spec = METRICS[metric]
    problem = import_problem("torchvision", "torchmetrics loads it where it is there")
    if problem is not None:
        raise problem
    _check(metric, spec, images, reference, captions)
    networks, device = networks or Networks(), torch.device(device)
    value, spread, judge, caution = spec.compute(images, reference, captions, networks, device)
    label = metric if judge is None else f"{metric} ({judge})"
    others = None if reference is None or spec.needs in ("images", "captions") else _everywhere(len(reference))
    return Score(metric, value, spread, _everywhere(len(images)), others, label, spec.better, caution)


def _everywhere(count: int) -> int:
    """The sum of a count over the processes of a distributed run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    total = torch.tensor(count)
    torch.distributed.all_reduce(total)
    return int(total)


def _check(
    metric: str, spec: Spec, images: torch.Tensor, reference: torch.Tensor | None, captions: Sequence[str] | None
) -> None:
    for name, x in (("images", images), ("reference", reference)):
        if x is not None and (x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3):
            raise DitAttnError(f"{name} must be uint8 (N, 3, H, W), got {x.dtype} {tuple(x.shape)}")
    if len(images) < spec.at_least:
        raise DitAttnError(f"{metric} needs at least {spec.at_least} images, got {len(images)}; make more")
    if spec.needs in ("pairs", "reference") and reference is None:
        raise DitAttnError(f"{metric} compares with reference images, none were given")
    if spec.needs == "reference" and reference is not None and len(reference) < spec.at_least:
        raise DitAttnError(f"{metric} needs at least {spec.at_least} reference images, got {len(reference)}; add more")
    if spec.needs == "pairs" and reference is not None and reference.shape != images.shape:
        raise DitAttnError(
            f"{metric} compares images one by one with references of their size, got {tuple(images.shape)} and "
            f"{tuple(reference.shape)}; give one reference per image, or use fid for sets"
        )
    if spec.needs == "captions" and (captions is None or len(captions) != len(images)):
        given = "none were" if captions is None else f"{len(captions)} were"
        raise DitAttnError(f"{metric} needs a caption for each of {len(images)} images, {given} given")


# -- the metrics -------------------------------------------------------------------------------------------------------

Result = tuple[float, float | None, str | None, str | None]


def _pairwise(build: Callable[[], Any]) -> Callable[..., Result]:
    """A torchmetrics metric of pairs of images in [0, 1]."""

    def compute(images: torch.Tensor, reference: torch.Tensor, _: Any, __: Any, device: torch.device) -> Result:
        metric = build().to(device)
        for a, b in zip(images.split(BATCH), reference.split(BATCH)):
            metric.update(a.to(device) / 255.0, b.to(device) / 255.0)
        return float(metric.compute()), None, None, None

    return compute


def _psnr() -> Any:
    from torchmetrics.image import PeakSignalNoiseRatio

    # Averaged per image, as papers do: the mean over all pixels would be ruled by the worst image.
    return PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")


def _ssim() -> Any:
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    return StructuralSimilarityIndexMeasure(data_range=1.0)


def _ms_ssim(images: torch.Tensor, reference: torch.Tensor, captions: Any, networks: Any, device: Any) -> Result:
    from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

    if min(images.shape[2:]) <= 160:
        raise DitAttnError(
            f"ms-ssim needs images larger than 160 pixels for its five scales, these are {images.shape[3]} x "
            f"{images.shape[2]}; use ssim"
        )
    build = lambda: MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0)  # noqa: E731
    return _pairwise(build)(images, reference, captions, networks, device)


def _lpips(images: torch.Tensor, reference: torch.Tensor, _: Any, networks: Networks, device: torch.device) -> Result:
    value = _pairwise(lambda: lpips_metric(networks))(images, reference, None, None, device)[0]
    return value, None, networks.lpips, None


def _sets(metric: Any, images: torch.Tensor, reference: torch.Tensor, device: torch.device) -> Any:
    metric = metric.to(device)
    for real, part in ((True, reference), (False, images)):
        for batch in part.split(BATCH):
            metric.update(batch.to(device), real=real)
    return metric.compute()


@contextmanager
def _hushed() -> Iterator[None]:
    """Without the warnings that features are kept in memory and that one split has no deviation."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric .* will save all extracted features")
        warnings.filterwarnings("ignore", message=r"std\(\): degrees of freedom")
        yield


@contextmanager
def _seeded() -> Iterator[None]:
    """With torch's random numbers from 0, and as they were afterwards: subsets and splits are drawn from them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _fid(images: torch.Tensor, reference: torch.Tensor, _: Any, networks: Networks, device: torch.device) -> Result:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric, judge = with_inception(FrechetInceptionDistance, networks)  # sums in fp64
    features = len(cast(torch.Tensor, metric.real_features_sum))
    fewest = min(_everywhere(len(images)), _everywhere(len(reference)))
    caution = None
    if fewest <= features:
        caution = f"{fewest} samples for {features} features: biased upwards, compare only at equal counts"
    return float(_sets(metric, images, reference, device)), None, judge, caution


def _kid(images: torch.Tensor, reference: torch.Tensor, _: Any, networks: Networks, device: torch.device) -> Result:
    from torchmetrics.image.kid import KernelInceptionDistance

    fewest = min(_everywhere(len(images)), _everywhere(len(reference)))
    caution = f"{fewest} samples: unbiased, but mostly noise below {FEW}" if fewest < FEW else None
    with _hushed(), _seeded():
        metric, judge = with_inception(KernelInceptionDistance, networks, subset_size=min(1000, fewest))
        mean, deviation = _sets(metric, images, reference, device)
    return float(mean), float(deviation) if fewest > 1000 else None, judge, caution


def _inception_score(images: torch.Tensor, _: Any, __: Any, networks: Networks, device: torch.device) -> Result:
    from torchmetrics.image.inception import InceptionScore

    count = _everywhere(len(images))
    splits = max(1, min(10, count // SPLIT))
    with _hushed(), _seeded():
        metric, judge = with_inception(InceptionScore, networks, splits=splits)
        metric = metric.to(device)
        for batch in images.split(BATCH):
            metric.update(batch.to(device))
        mean, deviation = metric.compute()
    caution = f"{count} samples: grows with their number, compare only at equal counts" if count < 5000 else None
    return float(mean), float(deviation) if splits > 1 else None, judge, caution


def _clip(images: torch.Tensor, _: Any, captions: Sequence[str], networks: Networks, device: torch.device) -> Result:
    from torchmetrics.multimodal.clip_score import CLIPScore

    metric = CLIPScore(clip_pair(networks.clip)).to(device)  # type: ignore[arg-type]
    for low in range(0, len(images), BATCH):
        metric.update(images[low : low + BATCH].to(device), list(captions[low : low + BATCH]))
    return float(metric.compute()), None, networks.clip, None


def _by_world(compute: Callable[..., Result]) -> Callable[..., Result]:
    """The same metric with the features of ``world-clip``."""

    def run(images: torch.Tensor, reference: torch.Tensor, captions: Any, _: Networks, device: torch.device) -> Result:
        from dit_attn.eval.shapes_world.world_clip import WorldFeatures

        return compute(images, reference, captions, Networks(features=WorldFeatures()), device)

    return run


def _clip_world(images: torch.Tensor, _: Any, captions: Sequence[str], __: Any, device: torch.device) -> Result:
    from torchmetrics import MeanMetric

    from dit_attn.eval.shapes_world.world_clip import WorldFeatures, world_scores

    mean = MeanMetric().to(device)
    for low in range(0, len(images), BATCH):
        mean.update(world_scores(images[low : low + BATCH].to(device), list(captions[low : low + BATCH])))
    return float(mean.compute()), None, WorldFeatures.name, None


METRICS: dict[str, Spec] = {
    "psnr": Spec(_pairwise(_psnr), "pairs", "higher", 1, "signal to noise in dB, against paired references"),
    "ssim": Spec(_pairwise(_ssim), "pairs", "higher", 1, "structural similarity, against paired references"),
    "ms-ssim": Spec(_ms_ssim, "pairs", "higher", 1, "the same over five scales; images above 160 pixels"),
    "lpips": Spec(_lpips, "pairs", "lower", 1, "perceptual distance, against paired references"),
    "fid": Spec(_fid, "reference", "lower", 2, "distance of two sets of images, Gaussian in Inception features"),
    "kid": Spec(_kid, "reference", "lower", 2, "the same by a polynomial kernel; unbiased for few samples"),
    "is": Spec(_inception_score, "images", "higher", 2, "Inception score: sharp and diverse classes"),
    "clip": Spec(_clip, "captions", "higher", 1, "100 x cosine of image and caption in CLIP"),
    "fid-world": Spec(_by_world(_fid), "reference", "lower", 2, "fid by the shapes world's own network, no download"),
    "kid-world": Spec(_by_world(_kid), "reference", "lower", 2, "kid by the shapes world's own network"),
    "clip-world": Spec(_clip_world, "captions", "higher", 1, "clip by the shapes world's own network"),
}
