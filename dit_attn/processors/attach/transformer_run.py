"""Run state of one diffusers transformer: what its forward arguments and the running pipeline say of the run."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from dit_attn.processors.attach.families import Family
from dit_attn.processors.attach.pipeline_call import PipelineCall, read_pipeline_call
from dit_attn.processors.core.call import CallMethod
from dit_attn.processors.core.cfg import CFGRule
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.run_state import RunState


class TransformerRun(RunState):
    """Run state of one diffusers transformer.

    Attributes:
        family: the transformer's row of the family table.
        context: what the pipeline said of the call through ``cache_context``.
        pipeline_call: guidance arguments of the pipeline's call that is running.
        seen_branches: guidance branches met in this run.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        family: Family,
        methods: Sequence[CallMethod],
        clock: Clock,
        pipe: Any = None,
    ) -> None:
        super().__init__(methods, clock, family.cfg, family.mask_rule)
        self._model = weakref.ref(model)
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        self.family = family
        self.context: Any = None
        self.pipeline_call = PipelineCall()
        self.seen_branches: set[str] = set()
        self._seen_run = 0
        self._stacked = 1
        self._samples = 0

    @property
    def model(self) -> torch.nn.Module:
        """The transformer."""
        model = self._model()
        if model is None:
            raise ReferenceError("the transformer of this session no longer exists")
        return model

    @property
    def pipe(self) -> Any:
        """The pipeline given to ``enable``, or ``None``."""
        return self._pipe() if self._pipe is not None else None

    @property
    def ran(self) -> bool:
        """Whether the transformer was called in the clock's current run: the second of two may not be."""
        return self._seen_run == self.clock.run

    def on_forward(self, values: dict[str, Any]) -> None:
        """Advance the clock and read the token layout from the arguments of a transformer call that is about to start.

        Args:
            values: the forward arguments named by the family row.
        """
        if self.perturbed is not None and not self.first_perturbed:
            return  # a compiled transformer shows its perturbed passes too
        timestep = values.get(self.family.timestep)
        value = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep or 0.0)
        self.clock.tick(
            value,
            self.cfg,
            grows=self.family.time_grows,
            scheduler=getattr(self.pipe, "scheduler", None),
            context=self.context,
            length=getattr(self.pipe, "_num_timesteps", None),
        )
        self._all_perturbed = bool(values.get(self.cfg.own))
        if fresh := not self.ran:
            self._seen_run = self.clock.run
            self.seen_branches, self._samples = set(), 0
            self.pipeline_call = read_pipeline_call(self.pipe, self.cfg)
            for layer in self.layers:
                layer.begin_run()
        self.perturbed, self.first_perturbed = None, 0
        rows = _batch_rows(values.get("hidden_states", values.get("x")))
        if fresh:
            samples = self.pipeline_call.samples if self.cfg.longer else None
            stacked = _stacked_branches(values.get("hidden_states"), self.cfg)
            self._stacked = rows // samples if samples else stacked
            self._samples = rows // (self.branch_count(rows) or 1)
        self.begin_call(rows)
        self.seen_branches |= set(self.rows_by_branch())
        try:
            self.set_layout(self.family.layout(self.model.config, values))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            self.set_layout(None, f"layout of {self.family.name}: {type(error).__name__}: {error}")

    def guidance_scale(self) -> float | None:
        """Return the scale s of ``u + s (c - u)`` in the pipeline's call, 1 for none, ``None`` where unknown."""
        name = self.cfg.scale
        if name and getattr(self.pipe, "transformer_2", None) is self.model:
            name = f"{name}_2"
        given = self.pipeline_call.scale if self.cfg.argument else None
        value = getattr(self.pipe, name, None) if name else given
        if value is None:
            return None
        return self.cfg.scale_of(float(value))

    def branch_count(self, rows: int) -> int | None:
        """Return the branches of the guidance at this step, 1 without: as the pipeline or its call says.

        Where neither does, by the shape of the batch, which samples of the same noise mislead.

        Args:
            rows: batch rows that are not perturbed.
        """
        call = self.pipeline_call
        guided = getattr(self.pipe, "do_classifier_free_guidance", None) if call.running else None
        if self.cfg.style == "separate":
            return None if guided is None else len(self.cfg.order) if guided else 1
        if guided is None and call.scale is not None:
            guided = call.scale > self.cfg.off
        if guided is None or self.cfg.longer:
            return self._stacked
        return len(self.cfg.order) if guided and rows != self._samples else 1

    def reset(self) -> None:
        """Forget the run: clock, statistics, disabled layers. Never needed between runs."""
        self.clock.__init__()  # type: ignore[misc]
        self._seen_run = 0
        for layer in self.layers:
            layer.begin_run()
            layer.disabled, layer.disabled_run, layer.checked_run = None, False, 0


def _batch_rows(latents: Any) -> int:
    """Batch rows of (B, ...) latents or of a list of samples, 1 where they are neither."""
    return latents.shape[0] if isinstance(latents, torch.Tensor) else len(latents or (None,))


def _stacked_branches(latents: Any, rule: CFGRule) -> int:
    """How many equal parts a batch consists of, if it is as many as the guidance has branches; 1 otherwise.

    Pipelines batch the branches by repeating the latents.
    """
    for count in (len(rule.longer), len(rule.order)):
        if count > 1 and isinstance(latents, torch.Tensor) and latents.shape[0] % count == 0:
            first, *rest = latents.chunk(count)
            if all(torch.equal(first, part) for part in rest):
                return count
    return 1
