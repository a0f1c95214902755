"""Keep the background of an image while a stock pipeline samples: blending at every step of its scheduler.

After a step from noise level s to s', what lies outside the mask becomes the normal image at level s', with one noise
for the entire run; inside, the sample stays. The clean predictions that a multistep solver remembers are blended too.
At the end the background is the normal image itself. (Blended latent diffusion, Avrahami et al. 2023.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dit_attn.errors import DitAttnError


@dataclass
class Blend:
    """What is kept.

    Attributes:
        clean: latents of the normal images, in the pipeline's form.
        noise: of the same shape, the noise of the run.
        masks: masks of a step that goes to noise level s', by s' in [0, 1], broadcast over ``clean``: 1 where a defect
            is painted.
        on_clean: called with the clean prediction of every step, as the model made it; ``None`` for nothing.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    masks: Callable[[float], torch.Tensor]
    on_clean: Callable[[torch.Tensor], None] | None = None


def factors(scheduler: Any, index: int) -> tuple[float, float]:
    """Return the factors (alpha, sigma) of the clean latents and the noise at position ``index`` of a schedule.

    Raises:
        DitAttnError: a scheduler whose levels are not known.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, torch.Tensor):
        raise DitAttnError(
            f"the noise levels of {type(scheduler).__name__} are not known; use a flow-matching scheduler or DPM++"
        )
    sigma = float(sigmas[min(index, len(sigmas) - 1)])
    if type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas", False):
        return 1.0 - sigma, sigma
    alpha = (sigma * sigma + 1.0) ** -0.5
    return alpha, alpha * sigma


def _remembered(scheduler: Any) -> list[Any]:
    """The clean predictions that a multistep solver stores, which may be written to; none where it stores others."""
    config = scheduler.config
    clean = str(config.get("algorithm_type", "++")).endswith("++") and config.get("predict_x0", True)
    return (getattr(scheduler, "model_outputs", None) or []) if clean else []


@contextmanager
def blended(scheduler: Any, blend: Blend) -> Iterator[None]:
    """Blend after every step of ``scheduler`` within a ``with`` block; the scheduler is restored at the end.

    Raises:
        DitAttnError: its levels are not known, or its clean predictions where they are asked for.
    """
    factors(scheduler, 0)
    stock = scheduler.step
    before = vars(scheduler).get("step")

    @functools.wraps(stock)
    def step(model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        index = scheduler.step_index
        if index is None:
            scheduler._init_step_index(timestep)
            index = scheduler.step_index
        flow_euler = type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        result = stock(model_output, timestep, sample, *args, **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        alpha, sigma = factors(scheduler, index + 1)
        mask = blend.masks(sigma / (alpha + sigma)).to(after)
        clean, noise = blend.clean.to(after), blend.noise.to(after)
        if flow_euler:
            predicted = sample - factors(scheduler, index)[1] * model_output
        else:
            remembered = _remembered(scheduler)
            predicted = remembered[-1] if remembered else None
            if predicted is not None:
                remembered[-1] = torch.where(mask > 0, predicted, clean.to(predicted))
        if blend.on_clean is not None:
            if predicted is None:
                raise DitAttnError(
                    f"the clean predictions of {type(scheduler).__name__} are not known, and re-weighting needs them; "
                    "use a flow-matching scheduler or DPM++, or turn it off"
                )
            blend.on_clean(predicted)
        background = clean if sigma == 0.0 else alpha * clean + sigma * noise
        value = torch.where(mask > 0, after, background)
        if isinstance(result, tuple):
            return (value, *result[1:])
        result.prev_sample = value
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before
