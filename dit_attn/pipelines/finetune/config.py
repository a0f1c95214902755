"""The settings of a fine-tuning, checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dit_attn.errors import DitAttnError, unknown
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.sparse import as_sparse

STAGES = ("proj", "full", "lora")
LOSSES = ("teacher", "flow")


@dataclass(frozen=True)
class FinetuneConfig:
    """What is tuned, and how.

    Attributes:
        method: the sparse method, or the one that learns, that is enabled while the transformer is tuned; dense steps
            are left out.
        stage: ``proj`` (the tensors of the method alone), ``full`` (all of the transformer too) or ``lora`` (adapters
            of the attention projections, and the tensors of the method).
        loss: distance to the prediction of the dense ``teacher``, or the model's own ``flow`` matching loss.
        steps: optimizer steps.
        batch: examples of a step.
        lr, weight_decay, betas, clip: of AdamW, and the largest norm of a gradient.
        warmup: steps over which the learning rate rises from 0.
        densities: densities of the method for equal parts of the run, such as (0.3, 0.1, 0.05); empty for its own.
        ema: decay of the moving average, which is what is saved; 0 saves the last tensors.
        rank: of the adapters.
        bf16: compute the transformer under autocast in bf16.
        gradient_checkpointing: compute activations twice instead of storing them.
        time_mean, time_std, time_shift: of the logit-normal noise levels that clean examples are noised to.
        held_out: fraction of the examples, at least one, whose loss is measured every ``log_every`` steps and that are
            not trained on; 0 for none.
        log_every, checkpoint_every: steps between entries of the log, and between checkpoints.
        seed: of the order of examples and of the noise.

    Raises:
        DitAttnError: a value out of range, or a stage that the method has nothing for.
    """

    method: Method
    stage: str = "full"
    loss: str = "teacher"
    steps: int = 2000
    batch: int = 4
    lr: float = 1e-5
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    warmup: int = 0
    densities: tuple[float, ...] = ()
    ema: float = 0.0
    rank: int = 16
    bf16: bool = False
    gradient_checkpointing: bool = False
    time_mean: float = 0.0
    time_std: float = 1.6
    time_shift: float = 5.0
    held_out: float = 0.1
    log_every: int = 50
    checkpoint_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, names in (("stage", self.stage, STAGES), ("loss", self.loss, LOSSES)):
            if value not in names:
                raise unknown(name, value, names)
        for name in ("steps", "batch", "rank", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise DitAttnError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0.0:
            raise DitAttnError(f"lr must be above 0, got {self.lr}")
        if not 0.0 <= self.ema < 1.0 or not 0.0 <= self.held_out < 1.0:
            raise DitAttnError(f"ema and held_out must lie in [0, 1), got {self.ema} and {self.held_out}")
        if any(not 0.0 < density <= 1.0 for density in self.densities):
            raise DitAttnError(f"densities must be above 0 and at most 1, got {self.densities}")
        method = self.method
        if as_sparse(method) is None and not method.learns:
            raise DitAttnError(
                f"{method.slug} decides no keys and learns nothing; fine-tune sla or another sparse method"
            )
        if method.cache_bytes(4096, 1, 64, 4):
            raise DitAttnError(
                f"{method.slug} goes by what earlier steps of a run stored, which single training steps do not have; "
                "fine-tune sla, block-sparse or rectified-spaattn"
            )
        if self.densities and getattr(method, "density", None) is None:
            raise DitAttnError(f"{method.slug} has no density to change over the run; leave densities out")
        if self.stage == "proj" and not method.learns:
            raise DitAttnError(f"{method.slug} learns no tensors of its own; use stage full or lora")

    def method_at(self, step: int) -> Method:
        """Return the method of a step, with no dense steps and the density of its part of the run."""
        changes: dict[str, Any] = {}
        if as_sparse(self.method) is not None:
            changes = {"dense_steps": 0, "dense_last_steps": 0, "max_error": None}
        if self.densities:
            part = min(step * len(self.densities) // self.steps, len(self.densities) - 1)
            changes["density"] = self.densities[part]
        return dataclasses.replace(self.method, **changes)

    def setup(self) -> dict[str, Any]:
        """Return what a checkpoint must share with the run that continues it, as JSON values."""
        names = ("stage", "loss", "batch", "rank", "seed")
        return {"method": self.method.slug, **{name: getattr(self, name) for name in names}}
