"""Image-mask pairs of anomalies: learn a defect from a few shots, paint it onto normal images, keep what passes.

Importing this package loads nothing heavy: files and folders are checked before torch is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

_EXPORTS = {
    "AnomalyGenerator": "generator",
    "Backbone": "backbone",
    "Concept": "concept",
    "Gate": "gate",
    "GenerateConfig": "orders",
    "MaskDrawer": "mask_drawer",
    "MaskSource": "masks",
    "MaskTrainConfig": "mask_training",
    "TrainConfig": "training",
    "learn_masks": "mask_training",
    "train": "training",
}

if TYPE_CHECKING:
    from dit_attn.pipelines.anomaly.backbone import Backbone
    from dit_attn.pipelines.anomaly.concept import Concept
    from dit_attn.pipelines.anomaly.gate import Gate
    from dit_attn.pipelines.anomaly.generator import AnomalyGenerator
    from dit_attn.pipelines.anomaly.mask_drawer import MaskDrawer
    from dit_attn.pipelines.anomaly.mask_training import MaskTrainConfig, learn_masks
    from dit_attn.pipelines.anomaly.masks import MaskSource
    from dit_attn.pipelines.anomaly.orders import GenerateConfig
    from dit_attn.pipelines.anomaly.training import TrainConfig, train

__all__ = [
    "AnomalyGenerator",
    "Backbone",
    "Concept",
    "Gate",
    "GenerateConfig",
    "MaskDrawer",
    "MaskSource",
    "MaskTrainConfig",
    "TrainConfig",
    "learn_masks",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
