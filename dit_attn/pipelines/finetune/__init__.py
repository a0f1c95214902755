"""Fine-tune a pipeline's transformer with a sparse method in it, so that the method becomes good at it."""

from dit_attn.pipelines.finetune.config import FinetuneConfig
from dit_attn.pipelines.finetune.examples import Example, read_example, read_examples, write_example
from dit_attn.pipelines.finetune.loop import Finetune
from dit_attn.pipelines.finetune.merge import merge_weights
from dit_attn.pipelines.finetune.sla_state import load_sla_state
from dit_attn.pipelines.finetune.teacher import record_examples

__all__ = [
    "Example",
    "Finetune",
    "FinetuneConfig",
    "load_sla_state",
    "merge_weights",
    "read_example",
    "read_examples",
    "record_examples",
    "write_example",
]
