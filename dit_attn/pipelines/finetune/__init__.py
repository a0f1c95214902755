"""Fine-tune a pipeline's transformer with a sparse method in it, so that the method becomes good at it."""

from dit_attn.pipelines.finetune.config import FinetuneConfig
from dit_attn.pipelines.finetune.examples import Example, read_example, read_examples, write_example
from dit_attn.pipelines.finetune.loop import Finetune
from dit_attn.pipelines.finetune.merge import merge_weights
from dit_attn.pipelines.finetune.moh_state import XL_2_90, load_moh_state, moh_transformer
from dit_attn.pipelines.finetune.sla_state import load_sla_state
from dit_attn.pipelines.finetune.teacher import record_examples

__all__ = [
    "XL_2_90",
    "Example",
    "Finetune",
    "FinetuneConfig",
    "load_moh_state",
    "load_sla_state",
    "merge_weights",
    "moh_transformer",
    "read_example",
    "read_examples",
    "record_examples",
    "write_example",
]
