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
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_attn.api import disable, enabled, explain, summary, watch
from dit_attn.errors import DitAttnError, RunStopped
from dit_attn.pipelines import quality, scores
from dit_attn.pipelines.headline import headline_row
from dit_attn.processors.method import Method
from dit_attn.processors.summary import Summary

if TYPE_CHECKING:
    from dit_attn.eval.extractors import Networks


@dataclass(frozen=True)
class Variant:
    """One competitor.

    Attributes:
        label: its name in tables; unique.
        methods: what is on the pipeline; nothing is dense.
        call: arguments of the pipeline's call that differ for this competitor, as pairs of name and value.
    """

    label: str
    methods: tuple[Method, ...] = ()
    call: tuple[tuple[str, Any], ...] = ()

    @property
    def plain(self) -> bool:
        """Whether this is the stock pipeline as everyone else calls it."""
        return not self.methods and not self.call


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
        saturation: mean over the pixels of largest minus smallest channel, in [0, 1]; strong guidance raises it.
        parallel, sideways: of a guidance method's push, see ``processors.summary.GuidanceSummary``.
        temporal: how smoothly a clip moves (``eval.errors.temporal_consistency``), ``None`` for pictures.
        attention_share: attention's part of the floating-point operations of a dense step at the item's size.
        verdict: attributes of the caption that the pixels show; ``None`` for prompts outside the shapes world.
        error: one line, when it failed.
        warnings: what ``summary`` warns of: guidance that was asked for and did not happen.
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
    saturation: float | None = None
    parallel: float | None = None
    sideways: float | None = None
    temporal: float | None = None
    attention_share: float | None = None
    verdict: dict[str, bool] | None = None
    error: str | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """What was made.

    Attributes:
        variants: the competitors, dense first.
        takes: every item of every variant.
        metrics: scores of ``pipelines.quality`` by label and name.
        frames: (F, H, W, 3) uint8 by (label, index), for comparisons held in memory.
    """

    variants: tuple[Variant, ...]
    takes: list[Take]
    metrics: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    frames: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def attention_share(self) -> float | None:
        """Attention's part of the operations of a dense step, mean over the items; ``None`` when unknown."""
        known = [take.attention_share for take in self.of(DENSE.label) if take.attention_share is not None]
        return sum(known) / len(known) if known else None

    def of(self, label: str) -> list[Take]:
        """The takes of one variant that did not fail."""
        return [take for take in self.takes if take.variant == label and take.error is None]

    def headline(self) -> list[dict[str, Any]]:
        """One row of figures a variant, dense first: those of ``headline_row``, and ``metrics``."""
        dense = self.of(DENSE.label)
        rows = []
        for variant in self.variants:
            failed = sum(take.variant == variant.label and take.error is not None for take in self.takes)
            row = headline_row(self.of(variant.label), dense)
            settings = [method.to_dict() for method in variant.methods]
            found = self.metrics.get(variant.label, {})
            about = {"label": variant.label, "methods": settings, "call": dict(variant.call), "failed": failed}
            rows.append({**about, **row, "metrics": found})
        return rows


def compare(
    pipe: Any,
    prompts: Sequence[str],
    variants: Sequence[Variant],
    *,
    seeds: Sequence[int] = (0,),
    call: dict[str, Any] | None = None,
    metrics: Sequence[str] = (),
    networks: Networks | None = None,
) -> Comparison:
    """Every prompt with every seed, dense and by every variant, held in memory.

    Args:
        pipe: a stock pipeline; methods on it are taken off.
        prompts: texts.
        variants: competitors besides dense.
        seeds: of the CPU generators.
        call: further arguments of the pipeline's call.
        metrics: names of ``pipelines.quality.METRICS``, besides PSNR and SSIM.
        networks: where the networks of the metrics are.

    Raises:
        DitAttnError: two variants of one name, a method that does not fit the pipeline, a metric whose network is not
            there.
    """
    import torch

    quality.check(metrics, networks)
    call, everyone = call or {}, with_dense(variants)
    result, share = Comparison(everyone, []), share_of_attention(pipe, call)
    items = [(prompt, seed) for prompt in prompts for seed in seeds]

    def run(prompt: str, seed: int, changes: dict[str, Any]) -> tuple[np.ndarray, float]:
        started = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(seed)
        out = pipe(prompt, generator=generator, output_type="np", **{**call, **changes})
        return as_frames(out), time.perf_counter() - started

    for variant in everyone if items else ():  # the first call of a process pays for set-up: it is not timed
        with on(pipe, variant):
            few = {"num_inference_steps": 2} if "num_inference_steps" in call else {}
            run(*items[0], {**dict(variant.call), **few})
    for index, (prompt, seed) in enumerate(items):

        def make(variant: Variant, prompt: str = prompt, seed: int = seed) -> tuple[np.ndarray, float]:
            return run(prompt, seed, dict(variant.call))

        def keep(variant: Variant, frames: np.ndarray, seconds: float, index: int = index) -> None:
            result.frames[variant.label, index] = frames

        blank = Take("", index, prompt, seed, attention_share=share)
        result.takes += list(play_round(pipe, blank, everyone, make, keep))
    result.metrics = quality.measure(
        metrics, result.takes, lambda take: result.frames[take.variant, take.index], networks
    )
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
    make: Callable[[Variant], tuple[np.ndarray, float]],
    keep: Callable[[Variant, np.ndarray, float], str | None],
) -> Iterator[Take]:
    """One item by every variant in turn; a failure of one does not stop the others.

    Args:
        pipe: the pipeline.
        blank: index, prompt, seed and share of attention of the item.
        variants: dense first: fidelity and time are taken against it.
        make: makes the item with the variant's call and whatever is on the pipeline: (F, H, W, 3) uint8 and seconds.
        keep: saves it, while the method is still on; the name of the file.

    Raises:
        RunStopped: ``make`` or ``keep`` says that nothing more can be made (a full disk).
    """
    dense: tuple[np.ndarray, float] | None = None
    for variant in variants:
        take = replace(blank, variant=variant.label, warnings=[])
        try:
            with on(pipe, variant):
                frames, take.seconds = make(variant)
                seen = _seen(pipe)
                take.warnings = list(seen.warnings) if seen else []
                if variant.methods and seen:
                    take.density, take.run_density = seen.density, seen.run_density
                    if seen.guidance is not None:
                        take.parallel, take.sideways = seen.guidance.parallel, seen.guidance.sideways
                take.file = keep(variant, frames, take.seconds)
            if not variant.methods:
                take.density, take.run_density = 1.0, 1.0
            if variant.plain:
                dense = (frames, take.seconds)
            if dense is not None:
                take.dense_seconds = dense[1]
                take.psnr, take.ssim, take.equal = _fidelity(dense[0], frames)
            take.verdict, take.temporal = scores.verdict(frames, blank.prompt), scores.temporal(frames)
            take.saturation = scores.saturation(frames)
        except RunStopped:
            raise
        except Exception as error:  # whatever one take does, the others go on; the line names it
            lines = str(error).strip().splitlines()
            take.error = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        yield take


def on(pipe: Any, variant: Variant) -> AbstractContextManager[Any]:
    """A variant's methods on the pipeline for a ``with`` block; dense is watched and no bit of it touched."""
    return enabled(pipe, *variant.methods) if variant.methods else _watched(pipe)


@contextmanager
def _watched(pipe: Any) -> Iterator[None]:
    disable(pipe)
    with suppress(DitAttnError):  # a family that is not supported runs unwatched
        watch(pipe)
    try:
        yield
    finally:
        disable(pipe)


def _seen(pipe: Any) -> Summary | None:
    try:
        return summary(pipe)
    except DitAttnError:
        return None


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
