"""The guidance update: how it is added to predictions, and to what the scheduler gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.guidance_delta import GuidanceDelta, StepHook, added, each, flat, scaled, take_rows

X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
DELTA = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))


def update(*deltas: Any) -> GuidanceDelta:
    """An update of the first step."""
    return GuidanceDelta(run=1, step=0, weight=1.0, delta=list(deltas), cond=[])


# -- predictions ------------------------------------------------------------------------------------------------------


def test_every_branch_gets_the_update_of_its_samples() -> None:
    found = added((X, "kept"), update(DELTA), 2.0, range(4))
    assert isinstance(found, tuple) and found[1] == "kept"
    torch.testing.assert_close(found[0], X + 2.0 * torch.cat([DELTA, DELTA]))
    before = X.clone()
    assert torch.equal(added(X, update(DELTA), 2.0, [2, 3])[:2], before[:2]) and torch.equal(X, before)


def test_lists_of_samples_are_updated_one_by_one() -> None:
    samples = [torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(3, 2), torch.zeros(3, 4)]
    delta = [torch.ones(3, 2), torch.full((3, 4), 2.0)]
    (found,) = added((samples,), update(delta), 0.5, [0, 3])
    assert [float(x.mean()) for x in found] == [0.5, 0.0, 0.0, 1.0]


def test_predictions_of_two_modalities_get_their_own_update() -> None:
    video, audio = added((X, X[:, 0]), update(DELTA, DELTA[:, 0] * 3), 1.0, range(4))
    torch.testing.assert_close(video - X, torch.cat([DELTA, DELTA]))
    torch.testing.assert_close(audio - X[:, 0], torch.cat([DELTA, DELTA])[:, 0] * 3)
    with pytest.raises(ValueError, match="zip"):
        added((X, X), update(DELTA), 1.0, range(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_update_is_added_in_its_own_precision_and_the_type_stays(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    delta = DELTA.double() if dtype == torch.float64 else DELTA
    found = added(x, update(delta), 2.0, range(4))
    wide = x.double() if dtype == torch.float64 else x.float()
    assert found.dtype == dtype and torch.equal(found, (wide + 2.0 * torch.cat([delta, delta])).to(dtype))


def test_parts_of_predictions() -> None:
    assert take_rows(X, [0, 1, 2, 3]) is X and torch.equal(take_rows(X, [3, 1]), X[[3, 1]])  # type: ignore[arg-type]
    samples = list(X)
    assert [x is y for x, y in zip(take_rows(samples, [2, 0]), (samples[2], samples[0]), strict=True)] == [True, True]
    assert torch.equal(flat(samples), flat(X)) and flat(X).shape == (60,)
    assert flat(X.half()).dtype == torch.float32 and flat(X.double()).dtype == torch.float64
    assert torch.equal(scaled(X, -2.0), X * -2.0)  # type: ignore[arg-type]
    assert all(torch.equal(a, b * 2.0) for a, b in zip(scaled(samples, 2.0), samples, strict=True))
    assert torch.equal(each(torch.sub, X, X), torch.zeros_like(X))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="zip"):
        each(torch.sub, samples, samples[:1])


# -- the scheduler ----------------------------------------------------------------------------------------------------


class Scheduler:
    """Returns what it is given."""

    def step(self, model_output: torch.Tensor, timestep: float = 0.0, **more: Any) -> tuple[Any, ...]:
        """The arguments."""
        return model_output, timestep, more


def test_one_step_gets_the_update_and_the_scheduler_has_its_own_step_again() -> None:
    scheduler: Any = Scheduler()
    scheduler.step = StepHook(scheduler, DELTA)
    found, timestep, more = scheduler.step(X[:2], 7.0, generator=None)
    torch.testing.assert_close(found, X[:2] + DELTA)
    assert (timestep, more) == (7.0, {"generator": None}) and "step" not in vars(scheduler)
    assert scheduler.step(X[:2])[0] is not None and torch.equal(scheduler.step(X[:2])[0], X[:2])


def test_a_step_that_other_code_put_there_comes_back() -> None:
    scheduler: Any = Scheduler()
    own = lambda model_output, *rest: ("other", model_output)  # noqa: E731
    scheduler.step = own
    scheduler.step = StepHook(scheduler, DELTA)
    name, found = scheduler.step(X[:2])
    assert name == "other" and scheduler.step is own
    torch.testing.assert_close(found, X[:2] + DELTA)
    hook = scheduler.step = StepHook(scheduler, DELTA)
    hook.remove()
    assert scheduler.step is own


@pytest.mark.parametrize(
    ("delta", "shape"),
    [
        ((2, 3, 5), (2, 3, 5)),
        ((2, 6, 5), (2, 3, 5)),  # a learned variance
        ((2, 3, 1, 5), (2, 3, 5)),  # an image with a frame axis
        ((2, 3, 9), (2, 3, 5)),  # tokens of reference images
        ((2, 3, 5), (4, 3, 5)),  # the scheduler gets all branches
    ],
    ids=["same", "variance", "frame", "references", "branches"],
)
def test_the_update_is_cut_to_what_the_scheduler_predicts(delta: tuple[int, ...], shape: tuple[int, ...]) -> None:
    scheduler: Any = Scheduler()
    values = torch.randn(delta, generator=torch.Generator().manual_seed(2))
    scheduler.step = StepHook(scheduler, values)
    found = scheduler.step(torch.zeros(shape))[0]
    values = values.squeeze(2) if len(delta) > len(shape) else values
    expected = torch.cat([values] * (shape[0] // delta[0]))[:, : shape[1], : shape[2]]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("delta", "shape"), [((2, 3, 5), (3, 3, 5)), ((2, 3, 4), (2, 3, 5)), ((2, 3, 5), (2, 15))])
def test_an_update_of_another_shape_is_refused_with_the_remedy(delta: tuple[int, ...], shape: tuple[int, ...]) -> None:
    scheduler: Any = Scheduler()
    scheduler.step = StepHook(scheduler, torch.zeros(delta))
    with pytest.raises(DitAttnError, match="use inject='shift'"):
        scheduler.step(torch.zeros(shape))
    assert "step" not in vars(scheduler)


def test_samples_of_a_list_are_stacked_for_the_scheduler() -> None:
    scheduler: Any = Scheduler()
    scheduler.step = StepHook(scheduler, list(DELTA))
    assert torch.equal(scheduler.step(torch.zeros_like(DELTA))[0], DELTA)
