"""Hold a transformer at one denoising step of a run, and choose the steps at which a method is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from dit_attn.api import run_context
from dit_attn.errors import DitAttnError
from dit_attn.kernels.benchmark import timing
from dit_attn.processors.methods.base import Method, Phase
from dit_attn.processors.methods.sparse import SparseMethod, as_sparse

STEPS = 50  # denoising steps of the run that the frozen step is taken from
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Competitor:
    """A method to time.

    Attributes:
        label: its name in tables.
        method: its settings.
        phases: the kinds of steps to time, in order; later ones use the state of earlier ones.
    """

    label: str
    method: SparseMethod
    phases: tuple[Phase, ...]


class FrozenPipeline:
    """A stand-in for a pipeline around a transformer, at a step of its run that does not advance by itself.

    Args:
        transformer: on ``device``.
        inputs: arguments of its forward call.
        device: where it is.
    """

    def __init__(self, transformer: torch.nn.Module, inputs: dict[str, Any], device: torch.device) -> None:
        self.transformer: Any = transformer
        self.inputs, self.device = inputs, device
        self.step = 0

    @property
    def target(self) -> Any:
        """This object, where a pipeline of diffusers is expected."""
        return self

    def set_step(self, step: int) -> None:
        """Make the next calls belong to this step, from 0."""
        self.step = step

    def run_step(self) -> None:
        """Call the transformer once."""
        with run_context(self.transformer, step=self.step, steps=STEPS, branch="cond"):
            self.transformer(**self.inputs, return_dict=False)


def make_competitor(label: str, methods: Sequence[Method]) -> Competitor:
    """Choose the steps at which a method is timed.

    Args:
        label: its name in tables.
        methods: exactly one sparse method.

    Raises:
        DitAttnError: another kind of method, several, or one that is dense by its density or at every step.
    """
    method = as_sparse(methods[0]) if len(methods) == 1 else None
    if method is None:
        slugs = " + ".join(method.slug for method in methods) or "nothing"
        raise DitAttnError(f"--method {label}: {slugs} is not one sparse method; give exactly one")
    if method.is_dense:
        raise DitAttnError(f"--method {label} keeps everything: dense attention is always measured; lower density")
    method = cast(SparseMethod, method.synchronized())  # all layers refresh at one step, and none at the next
    phases = method.phases(STEPS)
    if not phases:
        raise DitAttnError(f"--method {label} has no sparse step among {STEPS}; lower dense_steps or dense_last_steps")
    return Competitor(label, method, phases)


def time_call(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the wall-clock and processor seconds of one call; the latter are 0 on an accelerator."""
    before = time.process_time()
    wall = timing.timed(call, device)
    return 1e-3 * wall, time.process_time() - before if device.type == "cpu" else 0.0


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means too little memory; torch has a class for it on accelerators, not on CPUs."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 120 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
