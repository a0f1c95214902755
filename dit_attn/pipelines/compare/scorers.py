"""Networks and rules that score the items of a comparison, or turn them into features.

A scorer is called as ``scorer(images, dense, caption)`` with the images of an item and those of dense, (F, 3, H, W)
uint8, and returns a number or (F, D) features.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_attn.errors import DitAttnError, import_problem
from dit_attn.eval.extractors import (
    INCEPTION_FILE,
    Networks,
    clip_pair,
    inception_options,
    lpips_metric,
    with_inception,
)
from dit_attn.pipelines.compare import defects

Scorer = Callable[[torch.Tensor, torch.Tensor, str], Any]


def load_scorer(name: str, networks: Networks | None, device: Any) -> tuple[Scorer, str]:
    """Load a scorer and return it with the name of its network.

    Args:
        name: key of :data:`SCORERS`.
        networks: where the networks are; ``None`` for the defaults.
        device: where to compute.

    Raises:
        DitAttnError: the network is missing; the message says what to do.
    """
    return SCORERS[name](networks or Networks(), device)


def _ms_ssim(networks: Networks, device: Any) -> tuple[Scorer, str]:
    _need_torchmetrics("ms-ssim")
    return partial(_pair_score, "ms-ssim", networks, device), "five scales"


def _pair_score(name: str, networks: Networks, device: Any, images: Any, dense: Any, caption: str) -> float:
    from dit_attn.eval.metrics import score

    return score(name, images, dense, networks=networks, device=device).value


def _lpips(networks: Networks, device: Any) -> tuple[Scorer, str]:
    _need_torchmetrics("lpips")
    metric: Any = lpips_metric(networks).to(device)
    return lambda images, dense, caption: float(metric(images / 255.0, dense / 255.0)), networks.lpips


def _clip(networks: Networks, device: Any) -> tuple[Scorer, str]:
    _need_torchmetrics("clip")
    from torchmetrics.multimodal.clip_score import CLIPScore

    pair: Any = clip_pair(networks.clip)
    metric: Any = CLIPScore(pair).to(device)
    return lambda images, dense, caption: float(metric(images, [caption] * len(images))), networks.clip


def _inception(networks: Networks, device: Any) -> tuple[Scorer, str]:
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


def _world_features(networks: Networks, device: Any) -> tuple[Scorer, str]:
    from dit_attn.eval.shapes_world.world_clip import WorldFeatures

    network = WorldFeatures().to(device)
    return lambda images, dense, caption: _features(network, images), network.name


def _features(network: Any, images: torch.Tensor) -> torch.Tensor:
    """(F, D) on the CPU, a batch at a time."""
    return torch.cat([network(batch).float().cpu() for batch in images.split(32)])


def _world_score(networks: Networks, device: Any) -> tuple[Scorer, str]:
    from dit_attn.eval.shapes_world.world_clip import WorldFeatures, load, world_scores

    load()

    def score(images: torch.Tensor, dense: torch.Tensor, caption: str) -> float:
        return float(world_scores(images, [caption] * len(images)).mean())

    return score, WorldFeatures.name


def _saturation(networks: Networks, device: Any) -> tuple[Scorer, str]:
    def score(images: torch.Tensor, dense: torch.Tensor, caption: str) -> float:
        if images is dense and not defects.is_world_caption(caption):
            raise DitAttnError("dense is what the others are compared with")
        return defects.saturation(_as_frames(images), _as_frames(dense), caption)

    return score, f"{defects.PALETTE}; {defects.AGAINST} for other prompts"


def _artifacts(networks: Networks, device: Any) -> tuple[Scorer, str]:
    def score(images: torch.Tensor, dense: torch.Tensor, caption: str) -> float:
        return defects.artifact_rate(_as_frames(images), caption)

    return score, "verifier of the shapes world"


def _as_frames(images: torch.Tensor) -> np.ndarray:
    """(F, H, W, 3) uint8, as in the files."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def _need_torchmetrics(what: str) -> None:
    if importlib.util.find_spec("torchmetrics") is None:
        raise DitAttnError(f"{what} needs torchmetrics: pip install torchmetrics, or use fid-world and clip-world")
    problem = import_problem("torchvision", "torchmetrics loads it where it is there")
    if problem is not None:
        raise problem


SCORERS: dict[str, Callable[[Networks, Any], tuple[Scorer, str]]] = {
    "five scales": _ms_ssim,
    "lpips": _lpips,
    "clip": _clip,
    "inception-v3": _inception,
    "world-clip": _world_features,
    "world-clip score": _world_score,
    "saturation": _saturation,
    "artifacts": _artifacts,
}
