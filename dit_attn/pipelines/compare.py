"""One model, the same prompts and noise, dense and with methods: what each method costs and what it keeps.

    from dit_attn import models
    from dit_attn.pipelines.compare import Variant, compare

    pipe = models.load("tiny-image")
    result = compare(
        pipe,
        ["a large red circle at the left on white"],
        [Variant("half", (dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32),))],
        seeds=(0, 1),
        call=models.call_defaults("tiny-image"),
    )
    print(result.headline())

Dense always takes part and goes first in every round; the variants take turns on every item, so that all of them see
the same state of the machine, and a ratio of times is formed within rounds only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit_attn.api import disable, enabled, explain, summary
from dit_attn.errors import DitAttnError, RunStopped
from dit_attn.pipelines import scores
from dit_attn.processors.method import Method


@dataclass(frozen=True)
class Variant:
    """One competitor.

    Attributes:
        label: its name in tables; unique.
        methods: what is on the pipeline; nothing is dense.
    """

    label: str
    methods: tuple[Method, ...] = ()


DENSE = Variant("dense")


@dataclass
class Take:
    """One item made by one variant. JSON values only.

    Attributes:
        variant: label.
        index, prompt, seed: of the item.
        file: output, relative to the folder of the comparison; ``None`` in memory or when it failed.
        seconds: time of the pipeline call.
        dense_seconds: time of the dense call of the same round.
        density: executed share of the attention map where a method engaged; ``None`` where none did.
        run_density: the same over all attention calls, the declined ones counted as dense.
        psnr: dB to the dense item, ``None`` where they are equal.
        ssim: to the dense item.
        equal: whether the pixels equal those of the dense item.
        verdict: attributes of the caption that the pixels show; ``None`` for prompts outside the shapes world.
        error: one line, when it failed.
    """

    variant: str
    index: int
    prompt: str
    seed: int
    file: str | None = None
    seconds: float | None = None
    dense_seconds: float | None = None
    density: float | None = None
    run_density: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    equal: bool | None = None
    verdict: dict[str, bool] | None = None
    error: str | None = None


@dataclass
class Comparison:
    """What was made.

    Attributes:
        variants: the competitors, dense first.
        takes: every item of every variant.
        attention_share: attention's part of the floating-point operations of a dense step, ``None`` when unknown.
        frames: (F, H, W, 3) uint8 by (label, index), for comparisons held in memory.
    """

    variants: tuple[Variant, ...]
    takes: list[Take]
    attention_share: float | None = None
    frames: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, repr=False)

    def of(self, label: str) -> list[Take]:
        """The takes of one variant that did not fail."""
        return [take for take in self.takes if take.variant == label and take.error is None]

    def headline(self) -> list[dict[str, Any]]:
        """One row of figures a variant, dense first; see :func:`headline_row`."""
        dense = self.of(DENSE.label)
        rows = []
        for variant in self.variants:
            failed = sum(take.variant == variant.label and take.error is not None for take in self.takes)
            row = headline_row(self.of(variant.label), dense, self.attention_share)
            settings = [method.to_dict() for method in variant.methods]
            rows.append({"label": variant.label, "methods": settings, "failed": failed, **row})
        return rows


def compare(
    pipe: Any,
    prompts: Sequence[str],
    variants: Sequence[Variant],
    *,
    seeds: Sequence[int] = (0,),
    call: dict[str, Any] | None = None,
) -> Comparison:
    """Every prompt with every seed, dense and by every variant, held in memory.

    Args:
        pipe: a stock pipeline; methods on it are taken off.
        prompts: texts.
        variants: competitors besides dense.
        seeds: of the CPU generators.
        call: further arguments of the pipeline's call.

    Raises:
        DitAttnError: two variants of one name, or a method that does not fit the pipeline.
    """
    import torch

    call, everyone = call or {}, with_dense(variants)
    result = Comparison(everyone, [], share_of_attention(pipe, call))
    items = [(prompt, seed) for prompt in prompts for seed in seeds]

    def run(prompt: str, seed: int, changes: dict[str, Any]) -> tuple[np.ndarray, float]:
        started = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(seed)
        out = pipe(prompt, generator=generator, output_type="np", **{**call, **changes})
        return as_frames(out), time.perf_counter() - started

    for variant in everyone if items else ():  # the first call of a process pays for set-up: it is not timed
        with on(pipe, variant):
            run(*items[0], {"num_inference_steps": 2} if "num_inference_steps" in call else {})
    for index, (prompt, seed) in enumerate(items):

        def make(prompt: str = prompt, seed: int = seed) -> tuple[np.ndarray, float]:
            return run(prompt, seed, {})

        def keep(variant: Variant, frames: np.ndarray, seconds: float, index: int = index) -> None:
            result.frames[variant.label, index] = frames

        blank = Take("", index, prompt, seed)
        result.takes += list(play_round(pipe, blank, everyone, make, keep))
    return result


def with_dense(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """The competitors with dense in front.

    Raises:
        DitAttnError: two of one name.
    """
    everyone = (DENSE, *(variant for variant in variants if variant != DENSE))
    labels = [variant.label for variant in everyone]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise DitAttnError(f"two competitors are called {twice!r}; give every method once (dense is always included)")
    return everyone


def play_round(
    pipe: Any,
    blank: Take,
    variants: Sequence[Variant],
    make: Callable[[], tuple[np.ndarray, float]],
    keep: Callable[[Variant, np.ndarray, float], str | None],
) -> Iterator[Take]:
    """One item by every variant in turn; a failure of one does not stop the others.

    Args:
        pipe: the pipeline.
        blank: index, prompt and seed of the item.
        variants: dense first: fidelity and time are taken against it.
        make: makes the item with whatever is on the pipeline: (F, H, W, 3) uint8 and seconds.
        keep: saves it, while the method is still on; the name of the file.

    Raises:
        RunStopped: ``make`` or ``keep`` says that nothing more can be made (a full disk).
    """
    dense: tuple[np.ndarray, float] | None = None
    for variant in variants:
        take = Take(variant.label, blank.index, blank.prompt, blank.seed)
        try:
            with on(pipe, variant):
                frames, take.seconds = make()
                if variant.methods:
                    seen = summary(pipe)
                    take.density, take.run_density = seen.density, seen.run_density
                take.file = keep(variant, frames, take.seconds)
            if not variant.methods:
                dense, take.density, take.run_density = (frames, take.seconds), 1.0, 1.0
            if dense is not None:
                take.dense_seconds = dense[1]
                take.psnr, take.ssim, take.equal = _fidelity(dense[0], frames)
            take.verdict = scores.verdict(frames, blank.prompt)
        except RunStopped:
            raise
        except Exception as error:  # whatever one take does, the others go on; the line names it
            lines = str(error).strip().splitlines()
            take.error = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        yield take


def on(pipe: Any, variant: Variant) -> AbstractContextManager[Any]:
    """A variant's methods on the pipeline for a ``with`` block; for dense the untouched stock pipeline."""
    if variant.methods:
        return enabled(pipe, *variant.methods)
    disable(pipe)
    return nullcontext()


def headline_row(takes: Sequence[Take], dense: Sequence[Take], attention_share: float | None) -> dict[str, Any]:
    """Figures of one variant, each ``{"value", "ci95", "n"}`` or ``None``.

    Args:
        takes: of the variant.
        dense: of dense, for differences on the same items.
        attention_share: attention's part of the operations of a dense step.

    Returns:
        ``items``; ``seconds`` per item; ``speedup`` (sum of dense over sum of own seconds, pairs of one round);
        ``density`` where engaged; ``attention_flops`` (share of the dense attention work over the run);
        ``step_flops`` and ``ceiling`` (all operations of the transformer, and the speed-up that this would allow);
        ``psnr`` (of the items that differ), ``ssim``, ``equal`` (items with the pixels of dense); ``verifier``:
        whole-prompt accuracy ``whole``, its difference to dense ``change``, mean over attributes ``attributes``,
        and each attribute under ``by``.
    """
    pairs = [take for take in takes if take.seconds is not None and take.dense_seconds is not None]
    kept = scores.mean_figure([take.run_density for take in takes])
    step = None if kept is None or attention_share is None else 1.0 - attention_share * (1.0 - kept["value"])
    return {
        "items": len(takes),
        "seconds": scores.mean_figure([take.seconds for take in takes]),
        "speedup": scores.ratio_figure([t.dense_seconds or 0.0 for t in pairs], [t.seconds or 0.0 for t in pairs]),
        "density": scores.mean_figure([take.density for take in takes]),
        "attention_flops": kept,
        "step_flops": step,
        "ceiling": 1.0 / step if step else None,
        "psnr": scores.mean_figure([take.psnr for take in takes]),
        "ssim": scores.mean_figure([take.ssim for take in takes]),
        "equal": sum(bool(take.equal) for take in takes),
        "verifier": _verifier(takes, dense),
    }


def share_of_attention(pipe: Any, call: dict[str, Any]) -> float | None:
    """Attention's part of the operations of a dense step at the size of ``call``; ``None`` for unknown families."""
    size = {key: call.get(key) for key in ("height", "width", "num_frames")}
    try:
        return explain(pipe, **size).attention_share
    except (DitAttnError, AttributeError, TypeError):
        return None


def as_frames(out: Any) -> np.ndarray:
    """(F, H, W, 3) uint8 from a pipeline's ``output_type="np"`` result, first item; one frame for a picture."""
    batch = getattr(out, "frames", None)
    values = np.asarray(batch[0] if batch is not None else out.images[0])
    values = values if values.ndim == 4 else values[None]
    return (values[..., :3].clip(0.0, 1.0) * 255).round().astype(np.uint8)


def _fidelity(dense: np.ndarray, frames: np.ndarray) -> tuple[float | None, float | None, bool]:
    found = scores.pair_scores(dense, frames)
    return found["psnr"], found["ssim"], found["equal"]


def _verifier(takes: Sequence[Take], dense: Sequence[Take]) -> dict[str, Any] | None:
    judged = {take.index: take.verdict for take in takes if take.verdict is not None}
    if not judged:
        return None
    before = {take.index: take.verdict for take in dense if take.verdict is not None}
    both = [index for index in judged if index in before]
    names = dict.fromkeys(name for verdict in judged.values() for name in verdict)
    change = scores.difference_figure([_whole(judged[i]) for i in both], [_whole(before[i]) for i in both])
    return {
        "whole": scores.mean_figure([_whole(verdict) for verdict in judged.values()]),
        "change": change,
        "attributes": scores.mean_figure([sum(v.values()) / len(v) for v in judged.values()]),
        "by": {name: scores.mean_figure([v.get(name) for v in judged.values()]) for name in names},
    }


def _whole(verdict: dict[str, bool] | None) -> bool:
    return bool(verdict) and all((verdict or {}).values())
