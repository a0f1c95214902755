"""Image-mask pairs of anomalies: learn a defect from a few shots, paint it onto normal images, keep what passes."""

from dit_attn.pipelines.anomaly.backbone import Backbone
from dit_attn.pipelines.anomaly.concept import Concept
from dit_attn.pipelines.anomaly.gate import Gate
from dit_attn.pipelines.anomaly.generator import AnomalyGenerator, GenerateConfig
from dit_attn.pipelines.anomaly.masks import MaskSource
from dit_attn.pipelines.anomaly.training import TrainConfig, train

__all__ = ["AnomalyGenerator", "Backbone", "Concept", "Gate", "GenerateConfig", "MaskSource", "TrainConfig", "train"]
