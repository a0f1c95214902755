"""The stages of a run: their names, their times, and what comes out of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dit_attn.pipelines.high_resolution.native_pass import NativePass
from dit_attn.processors.attach.summary import Summary

STAGES = ("native pass", "upscale", "encode", "denoise", "decode")


@dataclass(frozen=True)
class HighResolutionResult:
    """What came out of the two stages.

    Attributes:
        output: the pipeline's output of the second stage, of the ``output_type`` that was asked for.
        first: the native pass, to go on from again.
        sigma: noise level that the second stage began at.
        steps: steps of the second stage.
        seconds: time of every stage that was run, of :data:`STAGES`.
        summary: what the methods did in the second stage, ``None`` where attention is dense.
    """

    output: Any
    first: NativePass
    sigma: float
    steps: int
    seconds: dict[str, float]
    summary: Summary | None = None

    @property
    def native(self) -> torch.Tensor:
        """Images (B, C, H, W) or clips (B, C, F, H, W) of the first stage, fp32, on the CPU: in [0, 1], or latents."""
        return self.first.values.float()

    @property
    def images(self) -> Any:
        """Images of the second stage."""
        return self.output.images

    @property
    def frames(self) -> Any:
        """Clips of the second stage."""
        return self.output.frames


class Stages:
    """Times the stages one after the other."""

    def __init__(self, on_stage: Callable[[str], None] | None) -> None:
        self._on_stage, self._name, self._since = on_stage, "", 0.0
        self._seconds: dict[str, float] = {}

    def begin(self, name: str) -> None:
        if name == self._name:
            return
        self.end()
        self._name, self._since = name, time.perf_counter()
        if self._on_stage is not None:
            self._on_stage(name)

    def end(self) -> dict[str, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._name:
            self._seconds[self._name] = time.perf_counter() - self._since
        self._name = ""
        return self._seconds


@contextmanager
def at_decode(pipe: Any, begin: Callable[[], None]) -> Iterator[None]:
    """Call a function when the autoencoder is first asked to decode within a ``with`` block."""
    vae, stock = pipe.vae, pipe.vae.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        begin()
        return stock(*args, **kwargs)

    before = vars(vae).get("decode")
    vae.decode = decode
    try:
        yield
    finally:
        del vae.decode
        if before is not None:
            vae.decode = before
