"""Find the step of the run, and the branch of the guidance, that a transformer call belongs to.

Where the caller says the position (:class:`RunPosition`), that is it. Otherwise the clock uses, in this order: what the
pipeline says through ``cache_context``, the scheduler of the pipeline that is running, and the ``timestep`` argument of
the transformer, whose value changes exactly when a new step begins. Transformers of one pipeline (Wan 2.2 has two)
share one clock.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from dit_attn.processors.core.cfg import CFGRule

# Names pipelines give to `cache_context`, in the vocabulary of this package.
_BRANCH_NAMES = {
    "cond": "cond",
    "uncond": "uncond",
    "pred_cond": "cond",
    "pred_uncond": "uncond",
    "pred_cond_skip": "perturbed",
    "uncond_stg": "perturbed",
    "uncond_modality": "perturbed",
}
_TRAIN_TIMESTEPS = 1000.0
_UNKNOWN = object()  # no schedule is this one


@dataclass(frozen=True)
class RunPosition:
    """What the caller of a transformer says of its calls.

    Attributes:
        step: step in the run, from 0.
        steps: number of steps of the run.
        branch: the guidance branches that the batch stacks, in order, each with as many rows; empty where only the
            ``cache_context`` may name one, and without it all rows are conditional.
        window: window or tile of the sample that the calls are for, ``None`` where there is only one.
    """

    step: int
    steps: int
    branch: tuple[str, ...] = ()
    window: Hashable = None


@dataclass
class Clock:
    """Position in the current run; resets itself when a new run begins.

    Attributes:
        run: number of runs seen, from 1 (0 before the first call).
        step: step in the run, from 0; a run may begin late in its schedule (image to image).
        total: number of steps of the run, ``None`` when unknown.
        call: transformer calls seen at this step, from 0.
        context: the name the pipeline gave to the call, or ``None``.
        timestep: value of the transformer's ``timestep`` argument.
        grows: whether it rises during a run.
        position: what the caller says of the call, ``None`` where it says nothing.
        restarted: whether the run began with the time step of the last one, of which only that step was seen. It may
            be the same run then: windows, tiles or branches that nobody named.
    """

    run: int = 0
    step: int = 0
    total: int | None = None
    call: int = 0
    context: str | None = None
    timestep: float = float("nan")
    grows: bool = False
    position: RunPosition | None = None
    restarted: bool = False
    _caller: Any = field(default=None, repr=False)
    _schedule: Any = field(default=None, repr=False)
    _begin: int | None = field(default=None, repr=False)  # position in the schedule where the run began

    def tick(
        self,
        timestep: float,
        rule: CFGRule,
        *,
        grows: bool = False,
        scheduler: Any = None,
        context: Any = None,
        length: int | None = None,
        caller: Hashable = None,
        again: bool = False,
    ) -> None:
        """Advance to the transformer call that is about to start.

        Args:
            timestep: value of the transformer's ``timestep`` argument, that with the most noise of several.
            rule: the CFG rule of the family (how many calls a step may have).
            grows: whether this family's timesteps rise during a run (they fall in most).
            scheduler: the pipeline's scheduler, when the pipeline is known.
            context: the pipeline's cache context (name, and from diffusers 0.42 step and total), when it gives one.
            length: steps of the run by the pipeline, which may leave out the beginning of the schedule.
            caller: names the call of the pipeline that is running; another one is a new run.
            again: whether this call cannot belong to the same step as the last, by what else is known of it.
        """
        if self._caller != caller:
            self._schedule = _UNKNOWN  # nothing of the last run counts
        schedule = getattr(scheduler, "timesteps", None)
        if schedule is not self._schedule:
            self._begin = getattr(scheduler, "begin_index", None)
        known = getattr(context, "step_index", None)
        if known is None and scheduler is not None:
            known = self._from_scheduler(scheduler, schedule is self._schedule, timestep)
        fresh = self._is_new_run(timestep, known, schedule, grows)
        restarted = not fresh and self._repeats_first_step(timestep, known, rule, again)
        if fresh or restarted:
            self.run += 1
            self.step, self.call, self.restarted = 0, 0, restarted
        elif timestep != self.timestep or (known is not None and known != self.step):
            self.step, self.call = self.step + 1, 0
        else:
            self.call += 1
        if known is not None:
            self.step = int(known)
        total = getattr(context, "num_inference_steps", None)
        if total is None and schedule is not None:
            total = min(len(schedule) - (self._begin or 0), length or len(schedule))
        self.total = total
        self.context = getattr(context, "name", None)
        self.timestep = timestep
        self._schedule, self._caller = schedule, caller
        self.grows, self.position = grows, None

    def place(
        self,
        position: RunPosition,
        timestep: float,
        *,
        grows: bool = False,
        context: Any = None,
        again: bool = False,
        ended: bool = False,
    ) -> None:
        """Advance to a transformer call whose position the caller says.

        Args:
            position: what the caller says. An earlier step, or another number of steps, is a new run.
            timestep, grows, context: as for :meth:`tick`.
            again: whether a call of the first step comes again, which is a new run.
            ended: whether the last run is known to be over.
        """
        fresh = ended or self.position is None or self.position.steps != position.steps or position.step < self.step
        restarted = not fresh and again and position.step == self.step == 0
        if fresh or restarted:
            self.run += 1
            self.call, self.restarted = 0, restarted
        else:
            self.call = self.call + 1 if position.step == self.step else 0
        self.step, self.total, self.position = position.step, position.steps, position
        self.timestep, self.grows, self.context = timestep, grows, getattr(context, "name", None)
        self._schedule, self._caller = _UNKNOWN, None

    def _from_scheduler(self, scheduler: Any, same: bool, timestep: float) -> int | None:
        """Return the step of the run by the scheduler's index, ``None`` where unknown.

        Args:
            scheduler: the pipeline's scheduler.
            same: whether its schedule is that of the last call.
            timestep: see :meth:`tick`.
        """
        index = getattr(scheduler, "step_index", None)
        if index is None:
            # No index yet means the first step, unless the run has moved on: then the pipeline steps copies of its
            # scheduler (diffusion forcing has one for every frame) and the timesteps decide.
            moved = same and (self.step > 0 or timestep != self.timestep)
            return 0 if hasattr(scheduler, "step_index") and not moved else None
        if self._begin is None:  # the scheduler looked the first timestep up at its first step
            self._begin = index - 1 if same and self.step == 0 else 0
        return index - self._begin

    def _is_new_run(self, timestep: float, known: int | None, schedule: Any, grows: bool) -> bool:
        if self.run == 0 or schedule is not self._schedule:
            return True
        if known is not None:
            return known < self.step
        return timestep < self.timestep if grows else timestep > self.timestep

    def _repeats_first_step(self, timestep: float, known: int | None, rule: CFGRule, again: bool) -> bool:
        """Whether a call repeats the only step that was seen: a run of one step, or one that was interrupted there."""
        if self.run == 0 or self.step or timestep != self.timestep:
            return False
        calls = len(rule.order) if rule.style == "separate" else 1
        return again or (known is None and self.total is None and self.call + 1 >= calls)

    @property
    def progress(self) -> float:
        """Fraction of the run that is done when this step begins, in [0, 1).

        With an unknown number of steps it is the fraction of the noise that is gone.
        """
        if self.total:
            return min(self.step / self.total, 1.0)
        return 0.0 if math.isnan(self.timestep) else 1.0 - self.noise

    @property
    def noise(self) -> float:
        """Time of the diffusion at this step, in [0, 1]: 1 is noise alone; also of a run that begins late."""
        if math.isnan(self.timestep):
            return 1.0 - min(self.step / self.total, 1.0) if self.total else 1.0
        time = min(max(self.timestep / (1.0 if self.timestep <= 1.0 else _TRAIN_TIMESTEPS), 0.0), 1.0)
        return 1.0 - time if self.grows else time

    def branches(self, batch: int, rule: CFGRule, stacked: int | None = None) -> tuple[str, ...]:
        """Return the branch of every row of the batch: ``cond``, ``uncond``, or another name of the family's CFG rule.

        Args:
            batch: rows of the call, B.
            rule: the CFG rule of the family.
            stacked: number of branches the run has, 1 without guidance; ``None`` when unknown.
        """
        order = self.position.branch if self.position is not None else ()
        if order:
            return tuple(branch for branch in order for _ in range(batch // len(order)))
        named = _BRANCH_NAMES.get(self.context or "")
        if named or self.position is not None:
            return (named or "cond",) * batch
        if rule.style == "separate":
            order = rule.order if stacked != 1 else ("cond",)
            return (order[self.call % len(order)],) * batch
        order = rule.longer if stacked == len(rule.longer) else rule.order
        if stacked in (None, 1) or batch % len(order):
            return ("cond",) * batch
        return tuple(branch for branch in order for _ in range(batch // len(order)))
