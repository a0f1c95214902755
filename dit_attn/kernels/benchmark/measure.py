"""Speed of block-sparse attention on this machine compared with the best dense call, interleaved in one run."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_attn.errors import unknown
from dit_attn.kernels.backends.reference import reference_attention
from dit_attn.kernels.backends.registry import BACKENDS
from dit_attn.kernels.benchmark.inputs import Inputs, counts_of
from dit_attn.kernels.benchmark.third_party import THIRD_PARTY, prepare
from dit_attn.kernels.benchmark.timing import Call, host_time, interleaved, kernel_timed, synchronize
from dit_attn.kernels.functional import choose_backend, sparse_attention
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.selection.select import plan_blocks

SHAPES: dict[str, tuple[int, int, int]] = {  # tokens, heads, head size of one layer
    "wan2.1-1.3b": (32760, 12, 128),  # 832 x 480, 81 frames
    "wan2.1-14b": (75600, 40, 128),  # 1280 x 720, 81 frames
    "hunyuan-video": (119056, 24, 128),  # 1280 x 720, 129 frames, with its text
    "cogvideox-5b": (17776, 48, 64),
    "flux-2048": (16896, 24, 128),
    "flux-4096": (66048, 24, 128),
}
_CHECKED_ROWS = 256  # rows of the result compared with the fp32 reference, so that no S x S matrix is built


@dataclass(frozen=True)
class Row:
    """The measurement at one density.

    Attributes:
        density: computed tiles over all tiles.
        counts: key blocks per row: mean, 95th percentile, largest.
        dense_ms, sparse_ms: shortest times of the rounds, in milliseconds.
        dense_median_ms, sparse_median_ms: medians.
        selection_ms: shortest time of pooling, scoring and choosing the blocks.
        host_ms: milliseconds the host takes to launch a sparse call on a GPU; above ``sparse_ms`` it is the limit.
        speedup: dense over sparse, of the shortest times, without selection.
        speedup_with_selection: the same with selection.
        efficiency: speed-up times density; 1 where skipped blocks cost nothing.
        error: relative L2 difference from the fp32 reference on the same blocks.
        dense_error: that of the dense call, for scale.
        backend: the backend of the sparse call.
        dense_backend: the fastest dense call.
        tflops: 10^12 operations per second over the computed tiles.
        others: shortest times in milliseconds of other kernels on the same layout.
        other_errors: their relative L2 differences.
    """

    density: float
    counts: dict[str, float]
    dense_ms: float
    dense_median_ms: float
    sparse_ms: float
    sparse_median_ms: float
    selection_ms: float
    host_ms: float | None
    speedup: float
    speedup_with_selection: float
    efficiency: float
    error: float
    dense_error: float
    backend: str
    dense_backend: str
    tflops: float
    others: dict[str, float]
    other_errors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, rounded to four significant digits."""
        return rounded(asdict(self))


@dataclass(frozen=True)
class Report:
    """The result of a run.

    Attributes:
        rows: one per density.
        dense: shortest time of every dense call, in milliseconds.
        failed: why a competitor did not run, by name.
    """

    rows: list[Row]
    dense: dict[str, float]
    failed: dict[str, str]


def rounded(value: Any) -> Any:
    """Round every float of a nested dict to four significant digits."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measure(inputs: Inputs, repeats: int, backend: str | None = None, against: Sequence[str] = ()) -> Report:
    """Time dense attention, sparse attention and selection in turns. A competitor that fails affects no other figure.

    Args:
        inputs: q, k, v and one layout per density.
        repeats: rounds; every round times every competitor once.
        backend: of the sparse calls; ``None`` picks by capability.
        against: other backends and libraries (``third_party.THIRD_PARTY``) to time on the same layouts.

    Raises:
        DitAttnError: an unknown name, or the backend under test cannot run.
    """
    for name in against:
        if name not in BACKENDS and name not in THIRD_PARTY:
            raise unknown("--against", name, [*BACKENDS, *THIRD_PARTY])
    q, k, v, layouts = inputs.q, inputs.k, inputs.v, inputs.layouts
    failed: dict[str, str] = {}

    def select() -> BlockLayout:
        plan = plan_blocks(q, k, q_block=inputs.block, kv_block=inputs.block, density=min(1.0, layouts[0].density))
        return plan.layout

    with torch.no_grad():
        ours = [partial(sparse_attention, q, k, v, layout, backend=backend) for layout in layouts]
        ours[0]()  # a backend that cannot run raises before anything is timed
        dense = dense_calls(q, k, v)
        others = {name: calls for name in against if (calls := _competitor(name, inputs, failed))}
        found = interleaved(
            [*dense.values(), select, *ours, *(call for calls in others.values() for call in calls)],
            repeats, q.device, kernel_timed,
        )  # fmt: skip
        spent = dict(zip(dense, found))
        selection, sparse = found[len(dense)], found[len(dense) + 1 :]
        dense_name = min(spent, key=lambda name: min(spent[name]))
        all_blocks = BlockLayout.dense(q.shape[1], k.shape[1], inputs.block, inputs.block, q.device)
        dense_error = _error(dense[dense_name](), q, k, v, all_blocks)
        rows = []
        for i, layout in enumerate(layouts):
            places = {name: (j + 1) * len(layouts) + i for j, name in enumerate(others)}
            rows.append(
                _row(
                    inputs,
                    layout,
                    (spent[dense_name], selection, sparse[i]),
                    (_error(cast(torch.Tensor, ours[i]()), q, k, v, layout), dense_error),
                    (backend or choose_backend(q, layout).backend, dense_name),
                    host_time(ours[i], q.device),
                    {name: min(sparse[place]) for name, place in places.items()},
                    {name: _error(calls[i](), q, k, v, layout) for name, calls in others.items()},
                )
            )
    return Report(rows, {name: min(times) for name, times in spent.items()}, failed)


def _competitor(name: str, inputs: Inputs, failed: dict[str, str]) -> list[Call]:
    """The call of a competitor on every layout; none, with the reason in ``failed``, if it cannot run one of them."""
    calls: list[Call] = []
    q, k, v = inputs.q, inputs.k, inputs.v
    try:
        for layout in inputs.layouts:
            if name in BACKENDS:
                calls.append(partial(sparse_attention, q, k, v, layout, backend=name))
            else:
                calls.append(prepare(name, q, k, v, layout))
            with _room_to_compile():
                calls[-1]()
            synchronize(q.device)
    except Exception as error:  # an error of another library must not end the run
        lines = str(error).strip().splitlines()
        failed[name] = f"{type(error).__name__}: {lines[0] if lines else ''}"
        if q.device.type == "cuda":
            torch.cuda.empty_cache()
        return []
    return calls


def _room_to_compile() -> Any:
    """FlexAttention recompiles for every layout; past the limit it would run unfused with an S x S matrix."""
    import torch._dynamo

    config = torch._dynamo.config
    return config.patch(recompile_limit=256) if hasattr(config, "recompile_limit") else nullcontext()


def dense_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Return every dense attention that runs on this machine, by name: torch's backends one by one, xFormers.

    Args:
        q, k, v: (B, S, H, D).
    """
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))

    def torch_call(backend: SDPBackend | None) -> torch.Tensor:
        choice = nullcontext() if backend is None else sdpa_kernel(backend)
        with choice:
            return F.scaled_dot_product_attention(qt, kt, vt).transpose(1, 2)

    calls: dict[str, Callable[[], torch.Tensor]] = {"sdpa": partial(torch_call, None)}
    if q.device.type != "cuda":
        return calls
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        calls[backend.name.removesuffix("_ATTENTION").lower()] = partial(torch_call, backend)
    if importlib.util.find_spec("xformers") is not None:
        calls["xformers"] = partial(_xformers, q, k, v)
    return {name: call for name, call in calls.items() if _runs(call)}


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def _runs(call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception:  # not built in, not for this type or size, or not importable
        return False
    return True


# -- rows --------------------------------------------------------------------------------------------------------------


def _row(
    inputs: Inputs,
    layout: BlockLayout,
    times: tuple[list[float], list[float], list[float]],
    errors: tuple[float, float],
    names: tuple[str, str],
    host: float | None,
    others: dict[str, float],
    other_errors: dict[str, float],
) -> Row:
    """One row from the times of dense, selection and sparse, and the errors and names of sparse and dense."""
    dense, select, sparse = times
    best, ours, choosing = min(dense), min(sparse), min(select)
    batch, seq, heads, dim = inputs.q.shape
    operations = 4 * batch * heads * seq**2 * dim * layout.density
    return Row(
        density=layout.density,
        counts=counts_of(layout),
        dense_ms=best,
        dense_median_ms=statistics.median(dense),
        sparse_ms=ours,
        sparse_median_ms=statistics.median(sparse),
        selection_ms=choosing,
        host_ms=host,
        speedup=best / ours,
        speedup_with_selection=best / (ours + choosing),
        efficiency=best / ours * layout.density,
        error=errors[0],
        dense_error=errors[1],
        backend=names[0],
        dense_backend=names[1],
        tflops=operations / ours / 1e9,
        others=others,
        other_errors=other_errors,
    )


def _error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout) -> float:
    """Relative L2 difference from the fp32 reference over the first blocks of queries, one head at a time."""
    blocks = max(1, _CHECKED_ROWS // layout.q_block)
    rows = min(blocks * layout.q_block, layout.q_len)
    part = replace(
        layout,
        q_len=rows,
        kv_indices=layout.kv_indices[:, :, :blocks].contiguous(),
        kv_num_blocks=layout.kv_num_blocks[:, :, :blocks].contiguous(),
    )
    difference = size = 0.0
    for h in range(q.shape[2]):
        mine = slice(h, h + 1)
        some, keys, values = (x[:, :, mine].float() for x in (q[:, :rows], k, v))
        expected, _ = reference_attention(some, keys, values, part.of_heads(mine))
        difference += float((out[:, :rows, mine].float() - expected).norm()) ** 2
        size += float(expected.norm()) ** 2
    return (difference / size) ** 0.5
