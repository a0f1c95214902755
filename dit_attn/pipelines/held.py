"""A transformer held at one step of a run, and the steps at which a method shows what it costs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import bench
from dit_attn.processors.method import Method, share
from dit_attn.processors.re_ttention import ReTtention
from dit_attn.processors.reader import Reader

STEPS = 50  # steps of the run that the held step is taken from
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Phase:
    """A kind of step of a method: its name, and a step of the run that shows it."""

    name: str
    step: int


@dataclass(frozen=True)
class Competitor:
    """A method to measure.

    Attributes:
        label: its name in tables.
        method: its settings.
        phases: the steps to time, in order; later ones use what earlier ones left.
    """

    label: str
    method: Reader
    phases: tuple[Phase, ...]


class HeldPipeline:
    """Stands for a pipeline around a transformer, at a step of its run that does not move by itself.

    Args:
        transformer: on ``device``.
        inputs: arguments of its forward call.
        device: where it is.
    """

    do_classifier_free_guidance = False

    def __init__(self, transformer: torch.nn.Module, inputs: dict[str, Any], device: torch.device) -> None:
        self.transformer, self.inputs, self.device = transformer, inputs, device
        self.scheduler = SimpleNamespace(timesteps=torch.linspace(999.0, 0.0, STEPS), step_index=0)

    def hold(self, step: int) -> None:
        """The next calls belong to this step, from 0."""
        self.scheduler.step_index = step

    def step(self) -> None:
        """One call of the transformer."""
        self.transformer(**self.inputs, return_dict=False)


def competitor(label: str, methods: Sequence[Method]) -> Competitor:
    """A method with the steps to time.

    Args:
        label: its name in tables.
        methods: exactly one, which decides which keys are read.

    Raises:
        DitAttnError: another kind of method, several, or one that is dense by its density or at every step.
    """
    if len(methods) != 1 or not isinstance(methods[0], Reader):
        slugs = " + ".join(method.slug for method in methods) or "nothing"
        raise DitAttnError(f"--method {label}: {slugs} is not one method that decides which keys are read; give one")
    method = methods[0]
    if method.is_dense:
        raise DitAttnError(f"--method {label} keeps everything: dense attention is always measured; lower density")
    first, last = share(method.dense_steps, STEPS), STEPS - share(method.dense_last_steps, STEPS)
    if last - first < 1 + isinstance(method, ReTtention):
        raise DitAttnError(f"--method {label} has no sparse step among {STEPS}; lower dense_steps or dense_last_steps")
    if isinstance(method, ReTtention):
        method = dataclasses.replace(method, stagger=False)  # all layers refresh at one step, and none at the next
        names = ("refresh", "sparse")[: method.period]
        return Competitor(label, method, tuple(Phase(name, first + i) for i, name in enumerate(names)))
    return Competitor(label, method, (Phase("sparse", (first + last) // 2),))


def watched(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds on the wall and of the process's threads that one call takes; the latter are 0 on an accelerator."""
    before = time.process_time()
    wall = bench.timed(call, device)
    return 1e-3 * wall, time.process_time() - before if device.type == "cpu" else 0.0


def out_of_memory(error: BaseException) -> bool:
    """Torch says it in a class of its own on accelerators, and only in words on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
