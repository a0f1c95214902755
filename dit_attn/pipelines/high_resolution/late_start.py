"""Let a stock pipeline begin its denoising loop late: from a given noise level on, with the scheduler's own steps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_attn.errors import DitAttnError


@dataclass
class ScheduleCall:
    """Arguments with which a pipeline last set its scheduler's time steps."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; the device is left out: it is that of the loop which the steps are set for."""
        kwargs = {name: value for name, value in self.kwargs.items() if name != "device"}
        return {"args": [_plain(x) for x in self.args], "kwargs": {name: _plain(x) for name, x in kwargs.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ScheduleCall:
        """Return the call that :meth:`to_dict` described."""
        return cls(tuple(data["args"]), dict(data["kwargs"]))


@dataclass(frozen=True)
class LateStart:
    """Where a loop begins.

    Attributes:
        first: steps that are left out.
        level: noise level of the first one that is not, in (0, 1]: 1 is noise alone.
        steps: steps that are left.
        ratio: standard deviation of the noise over the factor of the clean latents there, ``inf`` at level 1.
        flow: whether the two factors add up to 1 (flow matching); else their squares do.
    """

    first: int
    level: float
    steps: int
    ratio: float
    flow: bool

    def noised(self, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return clean latents with noise of the same shape at this level."""
        if self.flow:
            return (1.0 - self.level) * clean + self.level * noise
        kept = (1.0 + self.ratio**2) ** -0.5
        return kept * clean + (1.0 - kept**2) ** 0.5 * noise


@contextmanager
def recorded(scheduler: Any) -> Iterator[ScheduleCall]:
    """Note how time steps are set within a ``with`` block."""
    call = ScheduleCall()

    def note(stock: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.args, call.kwargs = args, kwargs
        stock(*args, **kwargs)

    with _replaced(scheduler, note):
        yield call


@contextmanager
def beginning_at(scheduler: Any, call: ScheduleCall, start: LateStart) -> Iterator[None]:
    """Within a ``with`` block, set the steps of ``call`` whatever is asked for, and leave out the first ones."""

    def cut(stock: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        device = {} if "device" in call.kwargs or "device" not in kwargs else {"device": kwargs["device"]}
        stock(*call.args, **call.kwargs, **device)
        scheduler.timesteps = scheduler.timesteps[start.first :]
        if isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
            scheduler.sigmas = scheduler.sigmas[start.first :]
            scheduler.num_inference_steps = len(scheduler.timesteps)

    with _replaced(scheduler, cut):
        yield


def late_start(scheduler: Any, call: ScheduleCall, sigma: float) -> LateStart:
    """Find the first step of a schedule whose noise level is at most ``sigma``.

    Args:
        scheduler: of the pipeline; it is not changed.
        call: how the pipeline sets its time steps.
        sigma: noise level in (0, 1].

    Raises:
        DitAttnError: no step is left, or a scheduler whose levels are not known.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(*call.args, **call.kwargs)
    name, count = type(scheduler).__name__, len(scheduler.timesteps)
    if getattr(scheduler, "order", 1) != 1 or float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise DitAttnError(
            f"{name} cannot start late: it takes several passes per step or scales its first noise; use the scheduler "
            "that the model was published with"
        )
    flow = name.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas", False))
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor):
        sigmas = sigmas[:count].double().cpu()
    elif hasattr(scheduler, "alphas_cumprod"):
        kept = scheduler.alphas_cumprod.double().cpu()[scheduler.timesteps.long().cpu()]
        sigmas = ((1.0 - kept) / kept).sqrt()
    else:
        raise DitAttnError(f"the noise levels of {name} are not known; use a flow-matching scheduler, DPM++ or DDIM")
    ratios = sigmas / (1.0 - sigmas) if flow else sigmas
    levels = sigmas if flow else sigmas / (1.0 + sigmas)
    found = (levels <= sigma + 1e-6).nonzero()
    if not len(found):
        raise DitAttnError(
            f"sigma {sigma:g} leaves no step: the lowest of {count} noise levels is {float(levels[-1]):.3g}; "
            "take a larger sigma or more steps"
        )
    first = int(found[0])
    return LateStart(first, float(levels[first]), count - first, float(ratios[first]), flow)


def _plain(value: Any) -> Any:
    """An argument of ``set_timesteps`` as a JSON value."""
    return value.tolist() if hasattr(value, "tolist") else value


@contextmanager
def _replaced(scheduler: Any, through: Callable[..., None]) -> Iterator[None]:
    """Let calls of ``set_timesteps`` go ``through(stock, args, kwargs)``; pipelines still find its signature."""
    stock = scheduler.set_timesteps

    @functools.wraps(stock)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        through(stock, args, kwargs)

    before = vars(scheduler).get("set_timesteps")
    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps
        if before is not None:
            scheduler.set_timesteps = before
