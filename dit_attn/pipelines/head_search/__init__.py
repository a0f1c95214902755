"""Search for attention heads whose perturbation raises an objective."""

from dit_attn.pipelines.head_search.config import SearchConfig, SearchPlan
from dit_attn.pipelines.head_search.evaluation import Pair
from dit_attn.pipelines.head_search.head_hunter import HeadHunter
from dit_attn.pipelines.head_search.head_set import HeadSet
from dit_attn.pipelines.head_search.objective import Objective, ScorerOptions
from dit_attn.pipelines.head_search.objectives import OBJECTIVES, make_objective
from dit_attn.pipelines.worker_share import WorkerShare

__all__ = [
    "OBJECTIVES",
    "HeadHunter",
    "HeadSet",
    "Objective",
    "Pair",
    "ScorerOptions",
    "SearchConfig",
    "SearchPlan",
    "WorkerShare",
    "make_objective",
]
