"""How fast block-sparse attention is on this machine, beside the best dense call, interleaved in one run."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_attn.errors import unknown
from dit_attn.kernels.backends.reference import reference_attention
from dit_attn.kernels.backends.registry import BACKENDS
from dit_attn.kernels.benchmark.inputs import Inputs, counts_of
from dit_attn.kernels.benchmark.third_party import THIRD_PARTY, prepare
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
_CHECKED_ROWS = 256  # rows of the result held against the fp32 reference: no S x S map is built
_FLUSHED = 256 << 20  # bytes written before every timed call on a GPU: more than its cache
_FLUSHES = 8  # times they are written: long enough for the host to get ahead

Call = Callable[[], Any]
Timer = Callable[[Call, torch.device], float]


@dataclass(frozen=True)
class Row:
    """One density.

    Attributes:
        density: executed tiles over all tiles.
        counts: key blocks per row: mean, 95th percentile, largest.
        dense_ms, sparse_ms: shortest times in milliseconds.
        dense_median_ms, sparse_median_ms: medians.
        selection_ms: shortest time of pooling, scoring and choosing the blocks.
        host_ms: time the host takes to start a sparse call on a GPU; above ``sparse_ms``, the host is the limit.
        speedup: dense over sparse, of the shortest times, selection left out.
        speedup_with_selection: the same with selection counted.
        efficiency: speed-up times density; 1 where skipped work costs nothing.
        error: relative L2 difference from the fp32 reference on the same blocks.
        dense_error: the dense call's own, for scale.
        backend: kernel that ran.
        dense_backend: the fastest dense call.
        tflops: 10^12 operations per second of the tiles that were computed.
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
        """JSON values, rounded to four digits."""
        return rounded(asdict(self))


@dataclass(frozen=True)
class Report:
    """What a run found.

    Attributes:
        rows: one a density.
        dense: shortest time in milliseconds of every dense call.
        failed: why a competitor did not run, by name.
    """

    rows: list[Row]
    dense: dict[str, float]
    failed: dict[str, str]


def rounded(value: Any) -> Any:
    """The same with every number of four digits."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measure(inputs: Inputs, repeats: int, backend: str | None = None, against: Sequence[str] = ()) -> Report:
    """Time dense, sparse and selection in turns. A competitor that cannot run costs its own figures only.

    Args:
        inputs: q, k, v and a layout a density.
        repeats: rounds; every round runs every competitor once.
        backend: of the sparse calls; ``None`` picks by capability.
        against: other backends and libraries (``rivals.THIRD_PARTY``) to time on the same layouts.

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
        ours[0]()  # a backend that cannot run says so before anything is timed
        dense = dense_calls(q, k, v)
        others = {name: calls for name in against if (calls := _competitor(name, inputs, failed))}
        found = interleaved(
            [*dense.values(), select, *ours, *(call for calls in others.values() for call in calls)],
            repeats, q.device, kernel_timed,
        )  # fmt: skip
        spent = dict(zip(dense, found))
        selection, sparse = found[len(dense)], found[len(dense) + 1 :]
        dense_name = min(spent, key=lambda name: min(spent[name]))
        full = BlockLayout.dense(q.shape[1], k.shape[1], inputs.block, inputs.block, q.device)
        dense_error = _error(dense[dense_name](), q, k, v, full)
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
    """Its call on every layout; none, and the reason in ``failed``, when it cannot run one of them."""
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
            _wait(q.device)
    except Exception as error:  # whatever another library raises must not cost our own figures
        lines = str(error).strip().splitlines()
        failed[name] = f"{type(error).__name__}: {lines[0] if lines else ''}"
        if q.device.type == "cuda":
            torch.cuda.empty_cache()
        return []
    return calls


def _room_to_compile() -> Any:
    """FlexAttention is compiled anew for a layout; past a number of times it would run as an S x S map."""
    import torch._dynamo

    config = torch._dynamo.config
    return config.patch(recompile_limit=256) if hasattr(config, "recompile_limit") else nullcontext()


def dense_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Every dense attention of this machine that takes (B, S, H, D) q, k, v: torch's backends one by one, xFormers."""
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


# -- time --------------------------------------------------------------------------------------------------------------


def timed(call: Call, device: torch.device) -> float:
    """Milliseconds of one call by the clock on the wall, from an idle device to an idle device."""
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return 1e3 * (time.perf_counter() - started)


def kernel_timed(call: Call, device: torch.device) -> float:
    """Milliseconds a GPU spends on one call with an empty cache; on a CPU as :func:`timed`.

    Writing the cache full also keeps the GPU busy while the host starts the call, so the host's time does not count.
    """
    if device.type != "cuda":
        return timed(call, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(_FLUSHES):
        _scrap(device).zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@lru_cache(maxsize=1)
def _scrap(device: torch.device) -> torch.Tensor:
    return torch.empty(_FLUSHED, dtype=torch.uint8, device=device)


def host_time(call: Call, device: torch.device, repeats: int = 5) -> float | None:
    """Milliseconds the host takes to start one call on a GPU, the shortest of a few; ``None`` on a CPU."""
    times = []
    if device.type != "cuda":
        return None
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return min(times)


def interleaved(
    calls: Sequence[Call], repeats: int, device: torch.device, timer: Timer = timed
) -> list[list[float]]:
    """Milliseconds of every call in every round, after one round that is thrown away."""
    times: list[list[float]] = [[] for _ in calls]
    for round_number in range(repeats + 1):
        for i, call in enumerate(calls):
            milliseconds = timer(call, device)
            if round_number:
                times[i].append(milliseconds)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    """One density from the times of dense, selection and sparse, the errors and names of sparse and dense."""
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
    """Relative L2 difference from the fp32 reference over the first blocks of queries, a head at a time."""
    blocks = max(1, _CHECKED_ROWS // layout.q_block)
    rows = min(blocks * layout.q_block, layout.q_len)
    part = replace(
        layout,
        q_len=rows,
        kv_indices=layout.kv_indices[:, :, :blocks].contiguous(),
        kv_num_blocks=layout.kv_num_blocks[:, :, :blocks].contiguous(),
    )
    apart = size = 0.0
    for h in range(q.shape[2]):
        mine = slice(h, h + 1)
        some, keys, values = (x[:, :, mine].float() for x in (q[:, :rows], k, v))
        expected, _ = reference_attention(some, keys, values, part.of_heads(mine))
        apart += float((out[:, :rows, mine].float() - expected).norm()) ** 2
        size += float(expected.norm()) ** 2
    return (apart / size) ** 0.5
