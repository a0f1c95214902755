"""Run state of one model in ComfyUI: what its sampler writes into ``transformer_options``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from dit_attn.processors.core.call import CallMethod
from dit_attn.processors.core.clock import Clock, RunPosition
from dit_attn.processors.core.layer import PLAIN, Layer
from dit_attn.processors.core.run_state import RunState
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span

Grid = tuple[int, int, int]
_BRANCHES = {0: "cond", 1: "uncond"}
_STACKS = ("blocks", "double_blocks", "single_blocks", "joint_blocks", "transformer_blocks", "layers")


class ComfyRun(RunState):
    """Run state of one model in ComfyUI.

    Layers are found while the model runs: one for each block, named ``double.3`` by the type and the index of the
    block. State is kept for each block, and for each set of conditionings (``uuids``) and size of the latents.

    Attributes:
        calls: attention calls of the run that belong to no layer, by reason.
        heads: number of heads of every layer that has run, by name.
        known: names of the layers whose tokens are known, those that methods can be for.
        sigma: noise level of the current call of the model.
        dispatching: whether an attention call is being computed, so that an inner one is stock.
    """

    def __init__(self, methods: Sequence[CallMethod] = (), blocks: int = 0) -> None:
        super().__init__(methods, Clock())
        self.calls: Counter[str] = Counter()
        self.heads: dict[str, int] = {}
        self.known: set[str] = set()
        self.sigma = math.inf
        self.dispatching = False
        self._blocks = blocks
        self._by_name: dict[str, Layer] = {}
        self._met: set[str] = set()  # blocks of the current call of the model
        self._grid: Grid | None = None
        self._spans: tuple[Any, ...] | None = None
        self._first: set[Any] = set()  # calls of the first step
        self._fresh = False

    def count(self, kind: str) -> int:
        """See the base class; blocks that have not run yet count too."""
        return max(super().count(kind), self._blocks if kind == "self" else 0)

    def begin_run(self) -> None:
        """Note that a sampler begins: statistics and state of the last run are dropped."""
        self._fresh, self._first = True, set()
        self.calls.clear()
        self.reports.clear()
        self.shared.drop()
        for layer in self.layers:
            layer.begin_run()

    def begin_model_call(self, x: Any, options: dict[str, Any], patch: Any) -> None:
        """Note that a call of the model begins.

        Args:
            x: latents (B, C, H, W) or (B, C, T, H, W).
            options: ``transformer_options``.
            patch: latent pixels per token: a number, or one for each axis.
        """
        self._met, self._grid, self._spans = set(), grid_of(x, patch), None
        self.set_layout(None)
        if self.pass_name != PLAIN:
            return
        rows = batch_rows(x)
        self.sigma = _first_value(options.get("sigmas"))
        step, steps = step_of(self.sigma, options.get("sample_sigmas"))
        window = (tuple(map(str, options.get("uuids", ()))), tuple(getattr(x, "shape", ())))
        branch = tuple(_BRANCHES.get(index, f"cond{index}") for index in options.get("cond_or_uncond", ()))
        branch = branch if branch and rows % len(branch) == 0 else ()
        self.clock.place(RunPosition(step, steps, branch, window), self.sigma, ended=self._fresh)
        self._fresh = False
        self.begin_call(rows)
        if step == 0:
            if (window, self.sigma) in self._first:
                for layer in self.layers:
                    layer.stateless = "one conditioning came again in the first step"
            self._first.add((window, self.sigma))

    def layer_of(self, options: dict[str, Any], q: torch.Tensor) -> Layer | str:
        """Return the layer of a self-attention call, or the reason why it has none.

        Args:
            options: ``transformer_options``.
            q: (B, S, H, D).
        """
        index = options.get("block_index")
        if index is None:
            return "block without an index"
        name = f"{options.get('block_type', 'block')}.{index}"
        if name not in self._by_name:  # stock ones too, so that blocks are counted as they run
            self._by_name[name] = layer = self.add_layer(name)
            self.heads[name] = q.shape[2]
            layer.begin_call(self.window, self.pass_name)
        self._read_tokens(options)
        if self.tokens(q.shape[1]) is None:
            return f"unknown token layout for {q.shape[1]} tokens"
        if name in self._met:
            return "second attention call of a block"
        self._met.add(name)
        self.known.add(name)
        return self._by_name[name]

    def _read_tokens(self, options: dict[str, Any]) -> None:
        """Find the parts of the sequence: Wan says its grid, joint models where their image tokens are."""
        sizes, image = options.get("grid_sizes"), options.get("img_slice")
        said = (None if sizes is None else tuple(map(int, sizes)), None if image is None else tuple(map(int, image)))
        if said == self._spans and self.layout is not None:
            return
        self._spans = said
        grid = said[0] if said[0] is not None and len(said[0]) == 3 else self._grid
        if grid is None:
            self.set_layout(None)
            return
        visual = visual_span("video" if grid[0] > 1 else "image", (grid[0], grid[1], grid[2]))
        if said[1] is not None and said[1][1] - said[1][0] == visual.length:
            self.set_layout(TokenLayout((Span("text", said[1][0]), visual, Span("text", None))))
        else:
            self.set_layout(TokenLayout((visual,)))

    def report(self) -> str:
        """Return what was done in the last run, in one line."""
        stats = [layer.stats for layer in self.layers]
        sparse = sum(each.sparse_calls for each in stats)
        reasons = sum((each.fallbacks for each in stats), Counter(self.calls))
        total = sum(each.calls for each in stats) + sum(self.calls.values())
        density = sum(float(each.computed) for each in stats) / sparse if sparse else 1.0
        text = f"{sparse} of {total} attention calls sparse"
        text += f", {density:.0%} of dense attention in them" if sparse else ""
        return text + "".join(f"; {count} x {reason}" for reason, count in reasons.most_common())


def batch_rows(x: Any) -> int:
    """Return the batch rows of latents, 1 where they are no tensor."""
    return x.shape[0] if isinstance(x, torch.Tensor) else 1


def grid_of(x: Any, patch: Any) -> Grid | None:
    """Return the (T, H, W) token grid of latents, ``None`` where it is not known.

    Args:
        x: latents (B, C, H, W) or (B, C, T, H, W).
        patch: latent pixels per token: a number for height and width, or one for each axis.
    """
    if not isinstance(x, torch.Tensor) or x.ndim not in (4, 5) or patch is None:
        return None
    sizes = tuple(x.shape[2:])
    each = (1,) * (len(sizes) - 2) + (patch, patch) if isinstance(patch, int) else tuple(patch)
    if len(each) != len(sizes):
        return None
    grid = tuple(-(-size // part) for size, part in zip(sizes, each))
    return (1, grid[0], grid[1]) if len(grid) == 2 else (grid[0], grid[1], grid[2])


def step_of(sigma: float, schedule: Any) -> tuple[int, int]:
    """Return the step from 0 that a noise level belongs to, and the number of steps; (0, 0) without a schedule.

    Args:
        sigma: noise level of the call; between two steps it belongs to the earlier one.
        schedule: noise levels of the run, falling, (steps + 1,).
    """
    if not isinstance(schedule, torch.Tensor) or schedule.numel() < 2:
        return 0, 0
    levels = schedule.tolist()
    reached = sum(level >= sigma * (1.0 - 1e-5) for level in levels)
    return max(0, min(reached, len(levels) - 1) - 1), len(levels) - 1


def count_blocks(model: Any) -> int:
    """Return the number of blocks of a ComfyUI model, 0 where its lists are not known."""
    lists = [getattr(model, name, None) for name in _STACKS]
    return sum(len(found) for found in lists if isinstance(found, torch.nn.ModuleList))


def _first_value(sigmas: Any) -> float:
    return float(sigmas.flatten()[0]) if isinstance(sigmas, torch.Tensor) and sigmas.numel() else math.inf
