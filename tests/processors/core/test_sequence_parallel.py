"""Ulysses on ranks that are threads: what is sharded, what every rank holds after the exchange, and the way back."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn import BlockSparse, RectifiedSpaAttn
from dit_attn.processors.core import executor, sequence_parallel
from dit_attn.processors.core.call import AttentionCall, Request, SDPAArgs
from dit_attn.processors.core.dispatch import dispatch_attention
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from tests._support.core_calls import Dispatched, host_run, random_args, stock_attention

JOINT = TokenLayout((Span("text", None), visual_span("image", (1, 4, 6))))


class Ranks:
    """Threads in the place of processes: the collectives that the exchange uses, with a barrier between them."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=20)
        self.posted: list[Any] = [None] * world

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        """Results of ``work(mesh)`` on every rank."""
        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(self.world) as pool:
            for name in ("all_to_all_single", "all_gather", "all_reduce", "get_backend"):
                patch.setattr(torch.distributed, name, getattr(self, name))
            return [job.result() for job in [pool.submit(work, Mesh(self, rank)) for rank in range(self.world)]]

    def all_to_all_single(self, out: torch.Tensor, x: torch.Tensor, group: Mesh) -> None:
        """Part r of every rank goes to rank r."""
        out.copy_(torch.cat([part.chunk(self.world)[group.rank] for part in self._exchanged(group, x)]))

    def all_gather(self, parts: list[torch.Tensor], x: torch.Tensor, group: Mesh) -> None:
        """Every rank gets the tensors of all."""
        for part, found in zip(parts, self._exchanged(group, x), strict=True):
            part.copy_(found)

    def all_reduce(self, x: torch.Tensor, op: Any, group: Mesh) -> None:
        """The smallest of all."""
        assert op == torch.distributed.ReduceOp.MIN
        x.copy_(torch.stack(self._exchanged(group, x)).amin(0))

    def get_backend(self, group: Mesh) -> str:
        """Tensors stay on the CPU."""
        return "gloo"

    def _exchanged(self, group: Mesh, x: torch.Tensor) -> list[torch.Tensor]:
        self.posted[group.rank] = x.clone()
        self.barrier.wait()
        found = list(self.posted)
        self.barrier.wait()
        return found


class Mesh:
    """One rank's view of the ranks; its own process group."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def size(self) -> int:
        """Number of ranks."""
        return self.ranks.world

    def get_group(self) -> Mesh:
        """The group the collectives get."""
        return self

    def get_local_rank(self) -> int:
        """Place of this rank."""
        return self.rank


class Size:
    """A mesh that is only asked for its size."""

    def __init__(self, world: int) -> None:
        self.size = lambda: world


def sharded(x: torch.Tensor, parts: list[int], world: int, rank: int) -> torch.Tensor:
    """The shard of a rank as a joint model makes it: a chunk of the text, then a chunk of the image."""
    return torch.cat([part.chunk(world, 1)[rank] for part in x.split(parts, 1)], 1)


@pytest.mark.parametrize(
    ("spans", "parts"),
    [
        ((visual_span("video", (2, 2, 3)),), [12]),
        ((Span("text", None), visual_span("image", (1, 2, 3))), [4, 6]),
        ((Span("text", None), visual_span("image", (1, 2, 3)), visual_span("reference", (1, 1, 2))), [4, 8]),
        ((visual_span("video", (2, 2, 3)), Span("text", None)), [12, 4]),
    ],
)
def test_shards_are_put_back_into_the_order_of_the_sequence(spans: tuple[Span, ...], parts: list[int]) -> None:
    tokens = TokenLayout(spans).resolve(sum(parts))
    assert tokens is not None and sequence_parallel.split_parts(tokens) == parts
    pieces = torch.arange(sum(parts)).split(parts)
    shards = torch.cat([piece.chunk(2)[i] for i in range(2) for piece in pieces])
    assert torch.equal(shards[sequence_parallel.sequence_order(parts, 2)], torch.arange(sum(parts)))


@pytest.mark.parametrize("parts", [[4, 6], [10]])
def test_tokens_are_gathered_in_the_order_of_the_model_and_given_back(parts: list[int]) -> None:
    full = torch.randn(sum(parts), 3)
    order = sequence_parallel.sequence_order(parts, 2) if len(parts) > 1 else None

    def work(mesh: Mesh) -> None:
        own = sharded(full[None], parts, 2, mesh.rank)[0]
        exchange = sequence_parallel.Exchange(mesh, order)
        assert torch.equal(exchange.gather_tokens(own, 0), full)
        assert torch.equal(exchange.gather_tokens(own.T, 1), full.T)
        assert torch.equal(exchange.own_tokens(full, 0), own)

    Ranks(2).run(work)


@given(world=st.integers(1, 5), parts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_the_order_finds_every_token_in_the_shards_of_any_number_of_ranks(world: int, parts: list[int]) -> None:
    parts = [length * world for length in parts]
    tokens = torch.arange(sum(parts))[None]
    shards = torch.cat([sharded(tokens, parts, world, rank) for rank in range(world)], 1)
    assert torch.equal(shards[0][sequence_parallel.sequence_order(parts, world)], tokens[0])


@settings(max_examples=15, deadline=None)
@given(world=st.integers(1, 3), heads=st.integers(1, 2), joint=st.booleans(), masked=st.booleans())
def test_every_rank_holds_all_tokens_of_its_heads_and_gets_its_shard_back(
    world: int, heads: int, joint: bool, masked: bool
) -> None:
    parts = [6, 24] if joint else [24]
    layout = JOINT if joint else TokenLayout((visual_span("image", (1, 4, 6)),))
    q, k, v = torch.randn(3, 2, sum(parts), heads * world, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(sum(parts))[None].expand(2, -1) if masked else None

    def work(mesh: Mesh) -> Any:
        local = [sharded(x, parts, world, mesh.rank) for x in (q, k, v)]
        key_mask = None if mask is None else sharded(mask, parts, world, mesh.rank)
        exchange = sequence_parallel.exchange_for(mesh, layout, local[0].shape[1])
        assert (exchange.order is None) == (not joint)
        here = exchange.scatter_heads(SDPAArgs(*local, key_mask))
        found, found_mask = (here.q, here.k, here.v), here.mask
        mine = slice(mesh.rank * heads, (mesh.rank + 1) * heads)
        assert all(torch.equal(x, full[:, :, mine]) for x, full in zip(found, (q, k, v), strict=True))
        assert (found_mask is None) if mask is None else torch.equal(found_mask, mask)
        assert torch.equal(exchange.gather_heads(found[0]), local[0])
        return mesh.rank

    assert Ranks(world).run(work) == list(range(world))


def test_a_mask_of_the_full_sequence_is_not_gathered() -> None:
    mask = torch.ones(1, 1, 1, 24, dtype=torch.bool)

    def work(mesh: Mesh) -> bool:
        x = torch.zeros(1, 12, 2, 4)
        return sequence_parallel.Exchange(mesh).scatter_heads(SDPAArgs(x, x, x, mask)).mask is mask

    assert Ranks(2).run(work) == [True, True]


@pytest.mark.parametrize("full_keys", (False, True))
@pytest.mark.parametrize("mask_heads", (None, 1, 4))
def test_every_rank_holds_all_tokens_and_all_keys_of_its_heads_in_cross_attention(
    full_keys: bool, mask_heads: int | None
) -> None:
    """The text is split evenly, or every rank has all of it; the parts of the sequence are in another order."""
    parts, draw = [6, 24], torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, tokens, 4, 5, generator=draw) for tokens in (30, 10))
    mask = None if mask_heads is None else torch.rand(2, mask_heads, 1, 10, generator=draw) > 0.3
    if mask_heads == 4 and not full_keys:
        mask = None  # heads of a mask are not exchanged

    def work(mesh: Mesh) -> None:
        mine = slice(2 * mesh.rank, 2 * mesh.rank + 2)
        text, own = k, mask
        if not full_keys:
            text = k.chunk(2, 1)[mesh.rank]
            own = None if mask is None else mask.chunk(2, -1)[mesh.rank]
        exchange = sequence_parallel.exchange_for(mesh, JOINT, 15)
        args = SDPAArgs(sharded(q, parts, 2, mesh.rank), text, text + 1, own, mesh=mesh, full_keys=full_keys)
        found = exchange.scatter_heads(args, cross=True)
        assert torch.equal(found.q, q[:, :, mine])
        assert torch.equal(found.k, k[:, :, mine]) and torch.equal(found.v, k[:, :, mine] + 1)
        expected = mask[:, mine] if mask is not None and mask_heads == 4 else mask
        assert (found.mask is None) if expected is None else torch.equal(found.mask, expected)

    Ranks(2).run(work)


def test_full_keys_whose_heads_do_not_split_evenly_are_refused() -> None:
    x = torch.zeros(1, 12, 6, 4)
    args = SDPAArgs(x, x[:, :, :3], x[:, :, :3], full_keys=True)
    mesh: Any = SimpleNamespace(size=lambda: 2, get_local_rank=lambda: 0)
    with pytest.raises(NotImplementedError, match="3 key heads do not split evenly over 2 ranks"):
        sequence_parallel.Exchange(mesh).scatter_heads(args, cross=True)


def test_layouts_that_are_unknown_or_do_not_split_evenly_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="unknown token layout for 12 tokens on each of 2 ranks"):
        sequence_parallel.exchange_for(Size(2), None, 12)
    with pytest.raises(NotImplementedError, match="unknown token layout"):
        sequence_parallel.exchange_for(Size(2), TokenLayout((visual_span("image", (1, 4, 6)),)), 13)
    uneven = TokenLayout((Span("text", 5), visual_span("image", (1, 5, 5))))
    with pytest.raises(NotImplementedError, match=r"parts of \[5, 25\] tokens do not split evenly over 2 ranks"):
        sequence_parallel.exchange_for(Size(2), uneven, 15)


@pytest.mark.parametrize(("votes", "agree"), [((True, True, True), True), ((True, False, True), False)])
def test_ranks_agree_only_where_all_do(votes: tuple[bool, ...], agree: bool) -> None:
    assert Ranks(3).run(lambda mesh: sequence_parallel.all_agree(votes[mesh.rank], mesh)) == [agree] * 3


@pytest.mark.filterwarnings("ignore:dit_attn. blocks.0 goes back to dense attention")
@pytest.mark.parametrize("value", [1.0, float("nan")], ids=["finite", "poisoned on one rank"])
def test_a_dispatched_call_of_two_ranks_is_that_of_one(value: float) -> None:
    """Both ranks go dense together where one of them finds a NaN."""
    method = BlockSparse(density=0.3, q_block=32, kv_block=32, dense_steps=0)
    full = random_args()
    parts = [20, 288]
    alone = Dispatched(*host_run([method]), full)
    if value != value:
        full.v[:, 40, 1] = value  # a visual token, of the heads of rank 1

    def work(mesh: Mesh) -> tuple[torch.Tensor, Any]:
        run, layer = host_run([method])
        q, k, v = (sharded(x, parts, 2, mesh.rank) for x in (full.q, full.k, full.v))
        stock = sharded(torch.zeros_like(full.q), parts, 2, mesh.rank)
        args = replace(full, q=q, k=k, v=v, mesh=mesh)
        return dispatch_attention(run, layer, args, lambda args: stock), layer

    found = Ranks(2).run(work)
    if value == value:
        for rank, (out, layer) in enumerate(found):
            torch.testing.assert_close(out, sharded(alone.out, parts, 2, rank), atol=1e-5, rtol=1e-4)
            assert layer.stats.sparse_calls == 1
    else:
        assert all(not out.any() and layer.disabled == "kernel gave NaN or infinity" for out, layer in found)


class HeadLift:
    """A method that lifts text keys by a value of each head, and adds a factor of each; the first two have none."""

    role, min_tokens, sites = "", 0, ("self",)
    values = torch.tensor([0.0, 0.0, 1.5, -0.7])

    def request(self, call: AttentionCall, request: Request) -> None:
        here = self.values[call.heads]
        request.add_span_bias(call, slice(None), slice(0, 12), here[None])
        ramp = torch.linspace(-1, 1, call.q.shape[1])
        request.add_bias(call, here[None, :, None, None].expand(1, -1, 40, 1), ramp[None, None, :, None], first=5)
        request.add_span_bias(call, slice(30, 90), slice(100, 140), -math.inf)


class WholeLift(HeadLift):
    """The same, with the values of all heads of the model, of which a rank uses its own."""

    def request(self, call: AttentionCall, request: Request) -> None:
        request.add_span_bias(call, slice(None), slice(0, 12), self.values[None])
        ramp = torch.linspace(-1, 1, call.q.shape[1])[None, None, :, None]
        request.add_bias(call, self.values[None, :, None, None].expand(1, -1, 40, 1), ramp, first=5)


SPLIT_METHODS: dict[str, tuple[Any, ...]] = {
    "density of each head": (BlockSparse(density=(0.2, 0.6, 1.0, 0.4), q_block=32, kv_block=32, dense_steps=0),),
    "one rank dense": (BlockSparse(density=(1.0, 1.0, 0.2, 0.4), q_block=32, kv_block=32, dense_steps=0),),
    "rectified": (RectifiedSpaAttn(density=(0.2, 0.6, 1.0, 0.4), q_block=32, kv_block=32, dense_steps=0),),
    "biases": (HeadLift(),),
    "biases of all heads": (WholeLift(),),
    "biases and a layout": (
        HeadLift(),
        BlockSparse(top_p=(0.2, 0.6, 1.0, 0.4), q_block=32, kv_block=32, dense_steps=0),
    ),
}


@pytest.mark.parametrize("name", SPLIT_METHODS)
def test_every_rank_uses_the_budgets_and_biases_of_its_own_heads(name: str) -> None:
    methods, full = SPLIT_METHODS[name], random_args()
    alone = Dispatched(*host_run(methods), full)

    def work(mesh: Mesh) -> tuple[torch.Tensor, Any]:
        run, layer = host_run(methods)
        q, k, v = (sharded(x, [20, 288], 2, mesh.rank) for x in (full.q, full.k, full.v))
        stock = torch.full_like(q, float("nan"))
        return dispatch_attention(run, layer, replace(full, q=q, k=k, v=v, mesh=mesh), lambda _: stock), layer

    for rank, (out, layer) in enumerate(Ranks(2).run(work)):
        torch.testing.assert_close(out, sharded(alone.out, [20, 288], 2, rank), atol=1e-5, rtol=1e-4)
        assert not layer.stats.fallbacks


@pytest.mark.parametrize("form", ("span", "factors"))
def test_biases_that_are_zero_on_one_rank_are_biases_on_both(form: str) -> None:
    """A rank that took stock attention alone would leave the other one waiting in an exchange."""

    class LastHead(HeadLift):
        def request(self, call: AttentionCall, request: Request) -> None:
            last = torch.tensor([0.0, 0.0, 0.0, 2.0])[call.heads]
            if form == "span":
                request.add_span_bias(call, slice(None), slice(0, 12), last[None])
                return
            ramp = torch.linspace(-1, 1, 308)[None, None, :, None]
            request.add_bias(call, last[None, :, None, None].expand(1, -1, 40, 1), ramp)

    full = random_args()
    alone = Dispatched(*host_run([LastHead()]), full)

    def work(mesh: Mesh) -> torch.Tensor:
        run, layer = host_run([LastHead()])
        q, k, v = (sharded(x, [20, 288], 2, mesh.rank) for x in (full.q, full.k, full.v))
        out = dispatch_attention(run, layer, replace(full, q=q, k=k, v=v, mesh=mesh), lambda _: torch.zeros_like(q))
        assert layer.stats.biased_calls == 1 and not layer.stats.fallbacks
        return out

    for rank, out in enumerate(Ranks(2).run(work)):
        torch.testing.assert_close(out, sharded(alone.out, [20, 288], 2, rank), atol=1e-5, rtol=1e-4)


def test_a_bias_of_the_number_0_leaves_every_rank_to_stock_attention() -> None:
    class Nothing(HeadLift):
        def request(self, call: AttentionCall, request: Request) -> None:
            request.add_span_bias(call, slice(None), slice(0, 12), 0.0)

    full = random_args()

    def work(mesh: Mesh) -> tuple[bool, Any]:
        run, layer = host_run([Nothing()])
        q, k, v = (sharded(x, [20, 288], 2, mesh.rank) for x in (full.q, full.k, full.v))
        out = dispatch_attention(run, layer, replace(full, q=q, k=k, v=v, mesh=mesh), lambda _: torch.zeros_like(q))
        return bool(out.any()), layer.stats.fallbacks

    assert Ranks(2).run(work) == [(False, {"nothing requested": 1})] * 2


@pytest.mark.parametrize("fails", [False, True], ids=["bounded", "failed kernel"])
def test_no_rank_goes_dense_alone(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """The error of a rank's heads is its own, and so is the failure of its kernel: the others wait in an exchange."""
    method = BlockSparse(density=0.1, q_block=32, kv_block=32, dense_steps=0, max_error=1e-9)
    full = random_args()
    if fails:
        monkeypatch.setattr(executor, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory for the tile")))

    def work(mesh: Mesh) -> Any:
        run, layer = host_run([method])
        q, k, v = (sharded(x, [20, 288], 2, mesh.rank) for x in (full.q, full.k, full.v))
        dispatch_attention(run, layer, replace(full, q=q, k=k, v=v, mesh=mesh), lambda _: q)
        return layer

    if fails:
        with pytest.raises(RuntimeError, match="no memory for the tile"):
            Ranks(2).run(work)
        return
    for layer in Ranks(2).run(work):
        assert layer.disabled is None and layer.stats.sparse_calls == 1 and layer.stats.error is None


def test_a_rank_records_all_tokens_of_its_heads_of_a_call_that_stock_attention_computes() -> None:
    full, parts = random_args(), [20, 288]
    result = torch.randn(full.q.shape, generator=torch.Generator().manual_seed(3))

    class Records:
        role, min_tokens, sites = "", 0, ("self",)

        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def request(self, call: AttentionCall, request: Request) -> None:
            request.record_output(self.seen.append)

    def work(mesh: Mesh) -> torch.Tensor:
        method = Records()
        run, layer = host_run([method])
        q, k, v, stock = (sharded(x, parts, 2, mesh.rank) for x in (full.q, full.k, full.v, result))
        out = dispatch_attention(run, layer, replace(full, q=q, k=k, v=v, mesh=mesh), lambda _: stock)
        assert torch.equal(out, stock)
        return method.seen[0]

    first, second = Ranks(2).run(work)
    assert torch.equal(torch.cat([first, second], 2), result)


@pytest.mark.parametrize("count", (2, 3, 8))
def test_budgets_of_another_number_of_heads_are_counted_on_every_rank(count: int) -> None:
    """Two are what a rank holds, and not what the layer has."""
    method, full = BlockSparse(density=(0.5,) * count, q_block=32, kv_block=32, dense_steps=0), random_args()

    def work(mesh: Mesh) -> tuple[bool, Any]:
        run, layer = host_run([method])
        q, k, v = (sharded(x, [20, 288], 2, mesh.rank) for x in (full.q, full.k, full.v))
        out = dispatch_attention(run, layer, replace(full, q=q, k=k, v=v, mesh=mesh), lambda _: torch.zeros_like(q))
        return bool(out.any()), layer.stats.fallbacks

    assert Ranks(2).run(work) == [(False, {f"density for {count} heads, the layer has 4": 1})] * 2


def test_cross_attention_of_a_split_sequence_is_left_to_stock_before_any_exchange() -> None:
    run, layer = host_run([BlockSparse(density=0.3, q_block=32, kv_block=32, dense_steps=0)])
    args = random_args(keys=77, mesh=Size(2))
    assert torch.equal(Dispatched(run, layer, args).out, stock_attention(args))
    assert layer.stats.fallbacks == {"cross attention": 1}
