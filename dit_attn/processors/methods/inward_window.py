"""Inward windows (FreeSwim, arXiv 2511.14712): self attention above the native size, in windows of the native size.

A model that makes an image or a video larger than it was trained for sees more keys per query, at greater distances,
than it ever did: layouts repeat or dissolve. Here every visual token attends to as many keys as at the native size,
from a window around it that moves inward at the border, so that tokens there have no fewer. All frames of a video are
in the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from dit_attn.errors import DitAttnError, shorten
from dit_attn.kernels import BlockLayout
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.positions import PositionMap, PositionSite
from dit_attn.processors.methods import dual_path, outside_keys
from dit_attn.processors.methods.base import TWIN, Grid, TwinPass, setting
from dit_attn.processors.methods.rotary_scaling import KINDS, scaled_positions
from dit_attn.processors.methods.sparse import SparseMethod
from dit_attn.processors.methods.window_tiles import WindowTiles


@dataclass(frozen=True, kw_only=True)
class InwardWindow(SparseMethod):
    """Attend to a window of the native size around every visual token, and to all of the text.

    Sizes are in tokens. Where the window covers the grid, as at the native size, a run is bit-equal to the stock one.
    The rows of the text attend to everything.

    Attributes:
        native: (h, w) of the size the model was trained at.
        window: (h, w) or (t, h, w) of the window; ``native``; or ``reference``, the odd number that is at least as
            large, as in the paper's code.
        frames: frames in the window where ``window`` does not say; ``None`` for all of them.
        snap: move windows to the borders of tiles, which leaves no tile partly computed: ``yes``, ``no``, or ``auto``:
            on CPUs, where tiles of about ``kv_block`` tokens divide the grid and are at most half as long as it is.
        tile: (t, h, w) of a tile; ``None`` for the best one that divides the grid.
        border: whether the window moves ``inward`` at a border or is cut off there (``clip``, not with ``snap="yes"``).
        outside: what stands for the keys outside of the window, with snapped windows: ``none``; ``pooled`` for means of
            them; ``anchors`` for one key of every few, another one at every step and in every head.
        outside_tokens: keys that each of those stands for, at most.
        outside_bias: added to their logits; below 0 it damps what is outside. ``-ln(outside_tokens)`` lets every anchor
            count as one key.
        rotary: positions in the rotary embedding: ``plain``; ``interpolated`` into the range of the native size;
            ``ntk`` or ``yarn`` (arXiv 2309.00071), which scale slow frequencies more than fast ones; or ``dype``
            (arXiv 2510.20766), ``ntk`` of a strength 2 t^2 that fades with the noise, t from 1 to 0.
        temperature: factor of the softmax scale of windowed calls; ``entropy`` for the root of ln(keys in the window) /
            ln(keys at the native size).
        override: ``text`` replaces what the windows' rows take from the text by that of a twin pass with dense
            attention (the paper's dual path); ``none`` runs no such pass.
        interval: steps from one twin pass to the next.
        override_uncond: whether rows without the prompt, of classifier-free guidance, take part in the twin pass.
        twin_rotary: as ``rotary``, of the twin pass.
        twin_temperature: factor of the softmax scale of the twin pass; ``entropy`` for the root of ln(keys) / ln(keys
            at the native size).
        store: type in which the rows from the text are kept until the next twin pass: ``model`` for that of the
            model, ``bf16``, or ``fp8`` with a factor a row and head.
        offload: keep them in main memory.

    Raises:
        DitAttnError: a value out of range, or settings that contradict each other.
    """

    slug: ClassVar[str] = "inward-window"
    min_tokens: ClassVar[int] = 0

    native: tuple[int, ...] | None = setting(None, "(h, w) of the size the model was trained at, in tokens")
    window: Literal["native", "reference"] | tuple[int, ...] = setting(
        "native", "(h, w) or (t, h, w) tokens, native, or reference (odd, as in the paper's code)", example=[4, 4]
    )
    frames: int | None = setting(None, "frames in the window; none for all", low=1)
    snap: str = setting("auto", "move windows to the borders of tiles", choices=("auto", "yes", "no"))
    tile: tuple[int, ...] | None = setting(None, "tokens (t, h, w) of a tile")
    border: str = setting("inward", "what a window does at a border", choices=("inward", "clip"))
    outside: str = setting("none", "what stands for the keys outside", choices=("none", "pooled", "anchors"))
    outside_tokens: int = setting(32, "keys that each of those stands for, at most", low=1)
    outside_bias: float = setting(0.0, "added to the logits of what stands for the keys outside")
    rotary: str = setting("plain", "positions in the rotary embedding", choices=KINDS)
    temperature: Literal["entropy"] | float = setting(1.0, "factor of the softmax scale, or entropy")
    override: str = setting("none", "what a dense twin pass replaces in the windowed one", choices=("none", "text"))
    interval: int = setting(2, "steps from one twin pass to the next", low=1)
    override_uncond: bool = setting(True, "rows without the prompt take part in the twin pass")
    twin_rotary: str = setting("plain", "positions of the twin pass", choices=KINDS)
    twin_temperature: Literal["entropy"] | float = setting(1.0, "factor of the softmax scale of the twin pass")
    store: str = setting("model", "type of what the twin pass leaves", choices=("model", "bf16", "fp8"))
    offload: bool = setting(False, "keep what the twin pass leaves in main memory")
    kv_block: int = setting(64, "tokens per tile, at most", low=8, high=1024)
    dense_steps: float | int = setting(0.0, "dense steps at the start (fraction or count)", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, lengths in (
            ("native", self.native, (2,)),
            ("window", self.window, (2, 3)),
            ("tile", self.tile, (3,)),
        ):
            if isinstance(value, tuple) and (len(value) not in lengths or min(value) < 1):
                axes = " or ".join({2: "(h, w)", 3: "(t, h, w)"}[n] for n in lengths)
                raise DitAttnError(
                    f"{self.slug}.{name} must be {axes} in tokens, each at least 1, got {shorten(value)}"
                )
        for name in ("temperature", "twin_temperature"):
            factor = getattr(self, name)
            if isinstance(factor, (int, float)) and not 0.0 < factor < math.inf:
                raise DitAttnError(f"{self.slug}.{name} must be above 0, got {factor!r}")
        if self.snap == "yes" and self.border == "clip":
            raise DitAttnError(f'{self.slug}.border "clip" needs exact windows; leave snap="yes" out')
        if self.outside != "none" and (self.snap == "no" or self.border == "clip"):
            exact = 'snap="no"' if self.snap == "no" else 'border="clip"'
            raise DitAttnError(f'{self.slug}.outside "{self.outside}" needs snapped windows; leave {exact} out')
        if not math.isfinite(self.outside_bias):
            raise DitAttnError(f"{self.slug}.outside_bias must be finite, got {self.outside_bias!r}")

    def check_model(self, transformer: str, layers: int) -> None:
        """Refuse settings that refer to a native size nobody said; arguments as in the base class.

        Raises:
            DitAttnError: as in the base class, or ``native`` is needed.
        """
        super().check_model(transformer, layers)
        twin = self.has_twin and (self.twin_rotary != "plain" or self.twin_temperature == "entropy")
        if isinstance(self.window, str) or self.rotary != "plain" or self.temperature == "entropy" or twin:
            self._native_size()

    def _native_size(self) -> tuple[int, int]:
        if self.native is None:
            raise DitAttnError(
                f"{self.slug} does not know the size the model was trained at; give native=(h, w) in tokens, "
                "e.g. (30, 52) for 480 x 832 pixels at 16 pixels per token"
            )
        return self.native[0], self.native[1]

    def at_native_size(self, native: tuple[int, int], keep: bool = True) -> InwardWindow:
        """Return the windows for a model trained at (h, w) tokens; arguments as in the base class."""
        return self if keep and self.native is not None else replace(self, native=native)

    @property
    def moves_positions(self) -> bool:
        """Whether positions are interpolated."""
        return self.rotary != "plain" or (self.has_twin and self.twin_rotary != "plain")

    @property
    def sites(self) -> tuple[str, ...]:  # type: ignore[override]
        """Self attention, and that to the text where a twin pass replaces it."""
        return ("self", "text") if self.has_twin else ("self",)

    @property
    def has_twin(self) -> bool:
        """Whether there is a twin pass."""
        return self.override != "none"

    @property
    def cache_on_host(self) -> bool:
        """Whether what the twin pass leaves lies in main memory."""
        return self.offload

    def cache_bytes(self, tokens: int, heads: int, head_dim: int, element: int) -> int:
        """Return the bytes of what the twin pass leaves; arguments as in the base class."""
        if not self.has_twin:
            return 0
        whole = dual_path.stored_bytes(tokens, heads, head_dim, element, self.store)
        return whole if self.override_uncond else whole // 2

    def twin(self, clock: Clock, branches: Sequence[str]) -> TwinPass | None:
        """Ask for a dense pass every ``interval`` steps."""
        if not self.has_twin or clock.step % self.interval:
            return None
        return TwinPass(() if self.override_uncond else tuple({*branches} - {"uncond"}) or ("cond",))

    def twin_work(self, steps: int, branches: int) -> float:
        """Return the twin passes of a run, per step; arguments as in the base class."""
        refreshes = -(-steps // self.interval) / steps if self.has_twin and steps else 0.0
        return refreshes * (branches if self.override_uncond else 1)

    def twin_at(self, grid: Grid | None) -> bool:
        """Return whether the window leaves anything out on a grid."""
        return grid is None or self.window_of(grid) != grid

    def window_of(self, grid: Grid) -> Grid:
        """Return the window (t, h, w) on a grid, at most the grid itself."""
        t, h, w = grid
        if isinstance(self.window, tuple):
            sizes = self.window if len(self.window) == 3 else (self.frames or t, *self.window)
        else:
            odd = self.window == "reference"
            sizes = (self.frames or t, *(2 * (n // 2) + 1 if odd else n for n in self._native_size()))
        return min(sizes[0], t), min(sizes[1], h), min(sizes[2], w)

    def density_at(self, grid: Grid) -> float | None:
        """Return the attention computed on a grid, as a fraction of dense: 1 where the window covers it."""
        if self.window_of(grid) == grid:
            return 1.0
        layout, _ = self.layout(grid)
        if self.outside == "none":
            return float(layout.density)
        if layout.elements is not None:
            return 1.0  # left to stock attention
        return float(layout.density) + 1.0 / outside_keys.tokens_per_key(self.outside_tokens, layout.kv_block)

    def layout(
        self, grid: Grid, others: int = 0, device: torch.device | str = "cpu"
    ) -> tuple[BlockLayout, Grid | None]:
        """Return the layout of the visual rows in tile order, and the tile; ``None`` for the default one.

        Args:
            grid: (T, H, W) visual tokens.
            others: tokens of the sequence that are not visual; all rows attend to them.
            device: where the lists are.

        Raises:
            DitAttnError: ``snap="yes"``, and no tile divides the grid.
        """
        return self._tiles.layout(grid, self.window_of(grid), others, device)

    @property
    def _tiles(self) -> WindowTiles:
        tile = None if self.tile is None else (self.tile[0], self.tile[1], self.tile[2])
        inward, full_blocks = self.border == "inward", self.outside != "none"
        return WindowTiles(self.snap, tile, self.q_block, self.kv_block, inward, full_blocks)

    def plan(self, call: AttentionCall, request: Request) -> None:
        """Set the layout, the token order, the scale and the pooled keys, and what takes the place of the text."""
        assert call.tokens is not None
        grids = [span.grid for span in call.tokens.visual]
        if len(grids) != 1 or grids[0] is None:
            request.decline("windows need one image or video in the sequence")
            return
        grid = grids[0]
        window = self.window_of(grid)
        if window == grid:
            request.decline("the window covers the picture")
            return
        if call.pass_name == TWIN:
            self._plan_twin(call, request, grid)
            return
        if call.kind != "self":
            dual_path.replace_cross(call, request)
            return
        others = call.tokens.seq_len - math.prod(grid)
        layout, tile = self.layout(grid, others, call.q.device)
        if self.outside != "none" and layout.elements is not None:
            request.decline(f"{outside_keys.WORDS[self.outside]} need tiles that divide the picture")
            return
        request.permuted = rows = request.permute(call, "tiles", tile)
        request.layout = layout
        request.multiply_scale(self._temperature(self.temperature, window, grid))
        if self.outside != "none":
            tokens = outside_keys.tokens_per_key(self.outside_tokens, layout.kv_block)
            step, bias = call.clock.step, self.outside_bias
            request.compensation = outside_keys.compensation(self.outside, rows, tokens, step, bias)
        if self.has_twin and dual_path.has_text(call):
            dual_path.replace_joint(call, request)

    def _plan_twin(self, call: AttentionCall, request: Request, grid: Grid) -> None:
        """Record what the visual rows take from the text; attention itself stays dense."""
        store, offload = self.store, self.offload
        if call.kind != "self":
            request.record_output(lambda out: dual_path.put(call, out, store, offload))
            return
        factor = self._temperature(self.twin_temperature, grid, grid)
        request.multiply_scale(factor)
        if dual_path.has_text(call):
            rows, _ = dual_path.text_part(call, request, call.softmax_scale * factor)
            dual_path.put(call, rows, store, offload)
        request.decline("full-field pass")

    def _temperature(self, given: Literal["entropy"] | float, window: Grid, grid: Grid) -> float:
        if isinstance(given, (int, float)):
            return float(given)
        return math.sqrt(math.log(math.prod(window)) / math.log(grid[0] * math.prod(self._native_size())))

    def positions(self, site: PositionSite) -> PositionMap | None:
        """Place the tokens of a larger grid within the range of the native one."""
        kind = self.twin_rotary if site.pass_name == TWIN else self.rotary
        if kind == "plain" or site.grid is None:
            return None
        return scaled_positions(kind, site.grid, self._native_size(), site.clock.noise)
