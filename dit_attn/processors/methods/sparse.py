"""Base of the sparse methods: block sizes, and the steps and layers that stay dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, ClassVar

from dit_attn.errors import DitAttnError, shorten
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.executor import MIN_TOKENS
from dit_attn.processors.methods.base import Grid, Method, Phase, resolve_count, setting
from dit_attn.processors.methods.head_budget import HeadBudget


@dataclass(frozen=True, kw_only=True)
class SparseMethod(Method):
    """Base of a method that decides which keys the visual rows attend to.

    Dense exceptions: ``dense_steps`` at the start of the run, ``dense_last_steps`` at its end, ``dense_layers`` by
    index (negative counts from the end); a float is a fraction, an int a count.

    Attributes:
        q_block: tokens per query block.
        kv_block: tokens per key block.
        dense_steps: steps at the start of the run that stay dense.
        dense_last_steps: steps at its end that stay dense.
        dense_layers: layers that stay dense.
        max_error: largest relative L2 error of a layer's output, measured on sampled rows once per run (and density); a
            layer above it goes dense for the rest of the session. ``None`` measures nothing.
        densities: density of every layer in place of the one ``density``: the layers of the first part of the run,
            then those of the second, and so on; a number for all heads of a layer, or a row with one for each. A layer
            with density 1 stays dense. The dense exceptions apply too.
        parts: number of equal parts of the run in ``densities``.
        calibration: origin of ``densities``, written by ``dit-attn calibrate``: JSON values; ``transformer`` is
            the class they were measured on. Not compared.

    Raises:
        DitAttnError: a value out of range; ``densities`` together with ``top_p``, of a method without a density, over
            parts of the run where the method has its own schedule, or not as many for every part; ``density`` and
            ``top_p`` for different numbers of heads.
    """

    role: ClassVar[str] = "sparse"
    min_tokens: ClassVar[int] = MIN_TOKENS
    by_step: ClassVar[bool] = True
    """Whether the density may change from part to part of a run."""

    q_block: int = setting(128, "tokens per query block", low=8, high=1024)
    kv_block: int = setting(128, "tokens per key block", low=8, high=1024)
    dense_steps: float | int = setting(0.1, "dense steps at the start (fraction or count)", low=0)
    dense_last_steps: float | int = setting(0.0, "dense steps at the end (fraction or count)", low=0)
    dense_layers: tuple[int, ...] = setting((), "layers that stay dense, by index")
    max_error: float | None = setting(None, "error of a layer's output above which it goes dense", low=0.0)
    densities: tuple[float | tuple[float, ...], ...] | None = setting(
        None, "density of every layer, or a row for its heads, for one part of the run after another"
    )
    parts: int = setting(1, "equal parts of the run in `densities`", low=1)
    calibration: dict[str, Any] | None = field(
        default=None, repr=False, compare=False, metadata={"help": "where `densities` come from"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = {name: len(value) for name, value in self._budgets().items() if isinstance(value, tuple)}
        if len(set(lengths.values())) > 1:
            raise DitAttnError(
                f"{self.slug} has a density for {lengths['density']} heads and a top_p for {lengths['top_p']}; give as "
                "many of each"
            )
        if self.densities is None:
            if self.parts != 1:
                raise DitAttnError(f"{self.slug}.parts is {self.parts}, but there are no densities to divide")
            return
        self._check_table(self.densities)

    def _check_table(self, table: Any) -> None:
        names = {spec.name for spec in fields(self)}
        if "density" not in names:
            raise DitAttnError(f"{self.slug} has no density, so it takes no densities; leave them out")
        if getattr(self, "top_p", None) is not None:
            raise DitAttnError(f"{self.slug} takes densities or top_p, not both: each sets the number of blocks")
        if self.parts > 1 and not self.by_step:
            raise DitAttnError(f"{self.slug}.parts must be 1, got {self.parts}: it has its own schedule over steps")
        if not isinstance(table, tuple) or not table or len(table) % self.parts:
            raise DitAttnError(
                f"{self.slug}.densities must be a list of numbers, as many for each of {self.parts} parts, got "
                f"{shorten(table)}"
            )
        for row in table:
            for value in row if isinstance(row, tuple) and row else (row,):
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
                    raise DitAttnError(f"{self.slug}.densities must be above 0 and at most 1, got {shorten(value)}")

    def check_model(self, transformer: str, layers: int) -> None:
        """Refuse dense layers that do not exist, and densities that were measured on another model.

        Args:
            transformer: class name.
            layers: number of attention layers that can be wrapped.

        Raises:
            DitAttnError: no such layer; another class than in ``calibration``, or another number of layers.
        """
        absent = [index for index in self.dense_layers if not -layers <= index < layers]
        if absent:
            raise DitAttnError(
                f"{self.slug}.dense_layers names layer {absent[0]}, but {transformer} has {layers} attention layers: "
                f"0 to {layers - 1}, or -{layers} to -1 from the end"
            )
        if self.densities is None:
            return
        made_for = (self.calibration or {}).get("transformer", transformer)
        if made_for != transformer:
            raise DitAttnError(
                f"the densities of {self.slug} were measured on {made_for}, this is {transformer}; "
                "run `dit-attn calibrate` for this model"
            )
        rows = len(self.densities) // self.parts
        if rows != layers:
            raise DitAttnError(
                f"{self.slug} has densities for {rows} layers, but {transformer} has {layers}; "
                "run `dit-attn calibrate` for this model"
            )

    def check_heads(self, transformer: str, heads: Sequence[int | None]) -> None:
        """Refuse budgets of another number of heads than a layer has; arguments as in the base class.

        Layers in ``dense_layers`` need none.

        Raises:
            DitAttnError: a layer has another number of heads.
        """
        layers = len(heads)
        dense = {index % layers for index in self.dense_layers}
        for index, count in enumerate(heads):
            if count is None or index in dense:
                continue
            rows = self.densities[index::layers] if self.densities is not None else ()
            for name, budget in (*(("densities", row) for row in rows), *(() if rows else self._budgets().items())):
                if isinstance(budget, tuple) and len(budget) != count:
                    raise DitAttnError(
                        f"{self.slug}.{name} has {len(budget)} numbers for the heads of layer {index}, but "
                        f"{transformer} has {count} heads there; give {count} numbers, or one for all heads"
                    )

    def _budgets(self) -> dict[str, HeadBudget | None]:
        """The budgets that hold for all layers, by name."""
        return {name: getattr(self, name, None) for name in ("density", "top_p")}

    def at(self, call: AttentionCall) -> SparseMethod:
        """Return the method with the density of this call's layer and step; itself where ``densities`` are not set."""
        if self.densities is None:
            return self
        layers = len(self.densities) // self.parts
        return _with_density(self, self.densities[part_of_run(call.clock, self.parts) * layers + call.layer.index])

    @property
    def is_dense(self) -> bool:
        """Whether the settings are dense attention."""
        return False

    @property
    def executed(self) -> float | None:
        """Attention a sparse call computes for the visual rows, as a fraction of dense; ``None`` if unknown."""
        return None

    @property
    def expected(self) -> float | None:
        """:attr:`executed`, as a mean over ``densities`` where they are set; those of 1 count as dense."""
        if self.densities is None:
            return self.executed
        each = [_with_density(self, density) for density in self.densities]
        known = [1.0 if method.is_dense else method.executed for method in each]
        return sum(fraction or 0.0 for fraction in known) / len(known)

    def relative_time(self, ratio: Callable[[float], float], grid: Grid) -> float | None:
        """Return the expected time of the visual rows of a sparse call, as a fraction of dense; ``None`` if unknown.

        The mean over a period, where calls differ from step to step.

        Args:
            ratio: that of plain block-sparse attention with its selection, by density.
            grid: (T, H, W) visual tokens.
        """
        return None if self.executed is None or self.expected is None else ratio(self.expected)

    def density_at(self, grid: Grid) -> float | None:
        """Return :attr:`expected` on a (T, H, W) grid of visual tokens, for methods that depend on it."""
        return self.expected

    def request(self, call: AttentionCall, request: Request) -> None:
        """Plan the call, or decline it (dense step, dense layer, density 1)."""
        mine = self.at(call)
        if mine is not self:
            request.density = getattr(mine, "density", None)
            mine.request(call, request)
            return
        reason = self.exception(call)
        if reason:
            request.decline(reason)
            return
        request.max_error = self.max_error
        self.plan(call, request)

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """Return one sparse step in the middle of those that are not dense, none where all are dense."""
        first, last = self.sparse_range(steps)
        return (Phase("sparse", (first + last) // 2),) if first < last else ()

    def sparse_range(self, steps: int) -> tuple[int, int]:
        """Return the first and last + 1 step that is not dense by setting, of a run of ``steps`` steps."""
        return resolve_count(self.dense_steps, steps), steps - resolve_count(self.dense_last_steps, steps)

    def plan(self, call: AttentionCall, request: Request) -> None:
        """Set in ``request`` how the visual rows of ``call`` are computed."""
        raise NotImplementedError

    def exception(self, call: AttentionCall) -> str | None:
        """Return the reason this call stays dense, or ``None``."""
        if self.is_dense:
            return "density 1"
        layers = call.layer_count
        if any(index % layers == call.layer.index for index in self.dense_layers):
            return "dense layer"
        heads = call.q.shape[2] * call.shard[1]
        for name, budget in self._budgets().items():
            if isinstance(budget, tuple) and len(budget) != heads:
                return f"{name} for {len(budget)} heads, the layer has {heads}"
        return dense_step(self.dense_steps, self.dense_last_steps, call)


def as_sparse(method: Method) -> SparseMethod | None:
    """Return ``method`` as a sparse method, ``None`` where it is of another kind."""
    return method if isinstance(method, SparseMethod) else None


@lru_cache(maxsize=4096)
def _with_density(method: SparseMethod, density: HeadBudget) -> SparseMethod:
    changes: dict[str, Any] = {"density": density, "densities": None, "parts": 1, "calibration": None}
    return replace(method, **changes)


def part_of_run(clock: Clock, parts: int) -> int:
    """Return the index, from 0, of the part of the run the clock is in, of ``parts`` equal ones."""
    part = clock.step * parts // clock.total if clock.total else int(clock.progress * parts)
    return min(part, parts - 1)


def dense_step(first: float | int, last: float | int, call: AttentionCall) -> str | None:
    """Return ``"dense step"`` when the call's step is one of the first or last steps that stay dense, else ``None``.

    With an unknown number of steps, fractions refer to the noise range and counts at the end are ignored.
    """
    clock = call.clock
    if clock.total:
        start, stop = resolve_count(first, clock.total), clock.total - resolve_count(last, clock.total)
        if not start <= clock.step < stop:
            return "dense step"
        return None
    early = clock.progress < first if isinstance(first, float) else clock.step < first
    late = isinstance(last, float) and last > 0 and clock.progress >= 1.0 - last
    return "dense step" if early or late else None
