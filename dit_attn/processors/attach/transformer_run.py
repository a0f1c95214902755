"""Run state of one diffusers transformer: what the code around its calls, and their arguments, say of the run.

What is known comes from the first of these that exists (:attr:`TransformerRun.source`): a ``run_context``, the call of
the pipeline that is running, with the guider of a modular one, the ``cache_context`` of a loop, and the time steps of
the calls. Time steps alone do not tell windows, tiles or unnamed branches apart; what may be wrong then is left out,
with the reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.components import unwrap
from dit_attn.processors.attach.families import Family
from dit_attn.processors.attach.guider_context import guider_context, guider_scale
from dit_attn.processors.attach.layer_shape import head_count
from dit_attn.processors.attach.pipeline_call import PipelineCall, find_running, read_pipeline_call
from dit_attn.processors.attach.prompt_spans.lookup import PromptLookup
from dit_attn.processors.attach.reduced_heads import ReducedHeads
from dit_attn.processors.attach.run_context import aborted, declared_position
from dit_attn.processors.core.call import AttentionCall, CallMethod
from dit_attn.processors.core.cfg import CFGRule
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import PLAIN
from dit_attn.processors.core.run_state import RunState


class TransformerRun(RunState):
    """Run state of one diffusers transformer.

    Attributes:
        family: the transformer's row of the family table.
        context: what the pipeline said of the call through ``cache_context``.
        pipeline_call: guidance arguments of the pipeline's call that is running.
        seen_branches: guidance branches met in this run.
        source: where step, number of steps and branches come from: ``run_context``, ``pipeline call``,
            ``cache_context`` or ``time steps``; ``""`` before the first call.
        scale: scale s of ``u + s (c - u)`` at the last call, ``None`` where unknown.
        doubt: reason why state that an earlier call stored may belong to another window, branch or run, or ``None``;
            no method stores any for the rest of the run, and guidance stops.
        reduced: the heads of every layer, where a method leaves some out, or ``None``.
        is_step: whether the call is one of a step; others only store something for later ones.
        branch_doubt: reason why the rows of a call may be of other branches than assumed, or ``None``; guidance stops.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        family: Family,
        methods: Sequence[CallMethod],
        clock: Clock,
        pipe: Any = None,
    ) -> None:
        super().__init__(methods, clock, family.cfg, family.mask_rule, family.text_kind)
        self._model = weakref.ref(model)
        self._owner = weakref.ref(pipe) if pipe is not None else None
        self._pipe: weakref.ref[Any] | None = None
        self.family = family
        self.context: Any = None
        self.pipeline_call = PipelineCall()
        self.seen_branches: set[str] = set()
        self.source, self.is_step = "", True
        self.scale: float | None = None
        self.doubt: str | None = None
        self.branch_doubt: str | None = None
        self._seen_run = 0
        self._stacked = 1
        self._samples = 0
        self._step = (0, 0)
        self._calls: set[tuple[Any, ...]] = set()  # of this step
        self._latents: Any = None  # of the last call of a loop
        self._moved = False
        self._aborted = aborted(model)
        self._prompts = PromptLookup()
        self.reduced: ReducedHeads | None = None

    @property
    def model(self) -> torch.nn.Module:
        """The transformer."""
        model = self._model()
        if model is None:
            raise ReferenceError("the transformer of this session no longer exists")
        return model

    @property
    def owner(self) -> Any:
        """The pipeline given to ``enable``, or ``None``. Another one may be running."""
        return self._owner() if self._owner is not None else None

    @property
    def pipe(self) -> Any:
        """The pipeline that was running at the last call, ``None`` where none was."""
        return self._pipe() if self._pipe is not None else None

    def heads_of(self, name: str) -> int | None:
        """Return the number of heads that a layer attends with, the fewest of the run; ``None`` where unknown."""
        count = head_count(self.model.get_submodule(name))
        return count if self.reduced is None else self.reduced.fewest(name, count)

    @property
    def ran(self) -> bool:
        """Whether the transformer was called in the clock's current run: the second of two may not be."""
        return self._seen_run == self.clock.run

    def on_forward(self, values: dict[str, Any]) -> None:
        """Advance the clock and read the token layout from the arguments of a transformer call that is about to start.

        Args:
            values: the forward arguments named by the family row.
        """
        if self.pass_name != PLAIN:
            return  # a compiled transformer shows its perturbed passes too
        between = self.family.between_steps(values)
        self.is_step = between is None
        if between is not None:
            self.set_layout(None, f"stock path: {between}")
            return
        latents = values.get(self.family.latents, values.get("x"))
        pipe = self._advance(values, latents)
        self._all_perturbed = bool(values.get(self.cfg.own))
        if fresh := not self.ran:
            self._begin_run(pipe)
        self.perturbed, self.first_perturbed, self.negative_rows = None, 0, 0
        rows = _batch_rows(latents)
        if fresh:
            samples = self.pipeline_call.samples if self.cfg.longer else None
            stacked = _stacked_branches(values.get("hidden_states"), self.cfg)
            self._stacked = rows // samples if samples else stacked
            self._samples = rows // (self.branch_count(rows) or 1)
        self.begin_call(rows)
        self._check_call(rows)
        self.seen_branches |= set(self.rows_by_branch())
        self.scale = self.guidance_scale()
        try:
            self.set_layout(self.family.layout(self.model.config, values))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            self.set_layout(None, f"layout of {self.family.name}: {type(error).__name__}: {error}")

    def _advance(self, values: dict[str, Any], latents: Any) -> Any:
        """Advance the clock to the call that is about to start, and return the pipeline that is running."""
        pipe, caller = find_running(self.model)
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        timestep = values.get(self.family.timestep)
        value = _noisiest(timestep, self.family.time_grows)
        context = self.context or guider_context(pipe)
        grows, named = self.family.time_grows, getattr(context, "name", None)
        position = declared_position(self.model)
        guessed, current = position is None and pipe is None, self._step == (self.clock.run, self.clock.step)
        looped = pipe is None or position is not None
        self._moved = looped and (position is not None or named is None) and not _same_latents(latents, self._latents)
        self._latents = latents if looped else None
        if position is not None:
            self.source = "run_context"
            again = current and any(call[:2] == (position.window, position.branch or named) for call in self._calls)
            again = again and (self._moved or position.steps == 1)  # the very same call may be made again
            ended, self._aborted = self._aborted != aborted(self.model), aborted(self.model)
            self.clock.place(position, value, grows=grows, context=context, again=again, ended=ended)
            return pipe
        known = getattr(context, "num_inference_steps", None) is not None
        self.source = "pipeline call" if pipe is not None else "cache_context" if known else "time steps"
        self.clock.tick(
            value,
            self.cfg,
            grows=grows,
            scheduler=getattr(pipe, "scheduler", None),
            context=context,
            length=getattr(pipe, "_num_timesteps", None),
            caller=caller or None,
            again=guessed and (self._moved or (named is not None and current and named in self._names)),
        )
        return pipe

    @property
    def _names(self) -> set[Any]:
        """What the calls of this step were named."""
        return {call[1] for call in self._calls}

    def _begin_run(self, pipe: Any) -> None:
        self._seen_run = self.clock.run
        self.seen_branches, self._samples = set(), 0
        self.doubt = self.branch_doubt = None
        self.pipeline_call = read_pipeline_call(pipe, self.cfg)
        self._prompts.forget()
        self._forget_run()

    def _forget_run(self) -> None:
        self.shared.drop()
        self.reports.clear()
        for layer in self.layers:
            layer.begin_run()

    def _check_call(self, rows: int) -> None:
        """Find out whether the call can be told from the others of its step.

        Raises:
            DitAttnError: the batch does not divide into the branches that a ``run_context`` names.
        """
        clock, position = self.clock, self.clock.position
        if position is not None and position.branch and rows % len(position.branch):
            raise DitAttnError(
                f"run_context: a batch of {rows} does not divide into the branches {', '.join(position.branch)}; "
                "give the names that this call stacks"
            )
        first = (clock.run, clock.step) != self._step
        if first:
            self._step, self._calls = (clock.run, clock.step), set()
        branches = self.rows_by_branch()
        if position is not None:
            call = (position.window, position.branch or clock.context, branches)
        else:
            call = (None, clock.context, branches)
            if self._stacked > 1 and clock.context is None and self.cfg.style == "separate" and self.pipe is None:
                self.branch_doubt = "rows of the batch share their latents and may be branches of the guidance"
        if clock.restarted and clock.step:
            self._lose_track("the first step came again before the second")
        elif call in self._calls and (position is None or self._moved):
            self._lose_track(f"the branch {branches[0]} came again in step {clock.step}")
        elif position is None and self._moved and not first:
            self._lose_track(f"the latents changed within step {clock.step}")
        self._calls.add(call)

    def _lose_track(self, reason: str) -> None:
        """Store nothing for the rest of the run: it may be of another window, branch or run."""
        if self.doubt is None:
            self.doubt = reason
            RunState.drop_state(self)
            for layer in self.layers:
                layer.stateless = reason

    @property
    def stack_layers(self) -> list[str]:
        """Names of the self-attention layers in the stacks of blocks, which guidance numbers."""
        return [layer.name for layer in self.layers if layer.kind == "self" and not self.family.is_side(layer.name)]

    def find_piece(self, call: AttentionCall, piece: str | tuple[int, int]) -> torch.Tensor:
        """See the base class; the prompts are those of the pipeline that is running, or of a ``run_context``."""
        return self._prompts.find(self, self.model, self.pipe, self.owner, call, piece)

    def find_prompts(self, call: AttentionCall) -> tuple[str, ...]:
        """See the base class; the prompts are found as for :meth:`find_piece`."""
        return self._prompts.prompts(self, self.model, self.pipe, self.owner, call)

    def guidance_scale(self) -> float | None:
        """Return the scale s of ``u + s (c - u)`` in the pipeline's call, 1 for none, ``None`` where unknown."""
        told = guider_scale(self.pipe)
        if told is not None:
            return told
        name = self.cfg.scale
        if name and unwrap(getattr(self.pipe, "transformer_2", None)) is self.model:
            name = f"{name}_2"
        given = self.pipeline_call.scale if self.cfg.argument else None
        value = self.pipeline_call.fixed.get(name, getattr(self.pipe, name, None)) if name else given
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
        self._seen_run, self._step, self._latents = 0, (0, 0), None
        self._forget_run()
        for layer in self.layers:
            layer.disabled, layer.disabled_run, layer.checked_run = None, False, 0


def _noisiest(timestep: Any, grows: bool) -> float:
    """Time of what is made: frames that condition it are held at a time with less noise."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.min() if grows else timestep.max())
    return float(timestep or 0.0)


def _batch_rows(latents: Any) -> int:
    """Batch rows of (B, ...) latents or of a list of samples, 1 where they are neither."""
    return latents.shape[0] if isinstance(latents, torch.Tensor) else len(latents or (None,))


def _same_latents(latents: Any, last: Any) -> bool:
    """Whether two calls have the same latents, as the branches of a step do; the first call is like its last."""
    if last is None or latents is last:
        return True
    if isinstance(latents, torch.Tensor) and isinstance(last, torch.Tensor):
        return latents.shape == last.shape and latents.device == last.device and torch.equal(latents, last)
    if isinstance(latents, list) and isinstance(last, list):
        return len(latents) == len(last) and all(map(_same_latents, latents, last))
    return False


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
