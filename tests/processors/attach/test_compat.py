"""The private names of diffusers: our backend, the registries, step caches, and how a sequence is split."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn

from dit_attn.processors.attach import compat
from dit_attn.processors.core.call import SDPAArgs
from tests._support.core_calls import random_args, stock_attention

# -- the backend ------------------------------------------------------------------------------------------------------


def test_our_backend_cannot_be_selected_by_name() -> None:
    member = compat.backend_member()
    assert member is compat.backend_member() and isinstance(member, AttentionBackendName)
    assert (member.name, member.value) == ("DIT_ATTN", "dit_attn")
    assert member not in list(AttentionBackendName)
    with pytest.raises(ValueError, match="dit_attn"):
        AttentionBackendName("dit_attn")


def test_a_registered_function_gets_the_calls_of_its_member_and_users_lose_nothing() -> None:
    before = dict(_AttentionBackendRegistry._backends)
    default = _AttentionBackendRegistry._active_backend
    args = random_args(8)
    calls = []

    def ours(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, scale: Any = None
    ) -> torch.Tensor:
        calls.append((query, key, value, scale))
        return value

    member = compat.backend_member()
    known = {
        table: getattr(_AttentionBackendRegistry, table).get(member)
        for table in ("_backends", "_constraints", "_supported_arg_names")
    }
    try:
        assert compat.register_backend(ours) is compat.register_backend(ours) is member
        assert dispatch_attention_fn(args.q, args.k, args.v, scale=0.5, backend=member) is args.v
        assert len(calls) == 1 and all(x is y for x, y in zip(calls[0], (args.q, args.k, args.v, 0.5)))
    finally:
        for table, entry in known.items():
            found = getattr(_AttentionBackendRegistry, table)
            found.pop(member) if entry is None else found.update({member: entry})
    assert _AttentionBackendRegistry._backends == before and _AttentionBackendRegistry._active_backend == default


@pytest.mark.parametrize("backend", [None, "native", "_native_math"])
def test_stock_calls_go_to_the_backend_of_the_user(backend: str | None) -> None:
    args = random_args(8, key_heads=4, mask=torch.rand(2, 1, 1, 8) < 0.8)
    member = None if backend is None else AttentionBackendName(backend)
    found = compat.dispatch(
        args.q, args.k, args.v, backend=member, parallel_config=None, attn_mask=args.mask, scale=0.3
    )
    torch.testing.assert_close(found, stock_attention(replace(args, scale=0.3)), atol=1e-6, rtol=1e-5)


def test_the_backend_of_the_user_is_really_called(monkeypatch: pytest.MonkeyPatch) -> None:
    args, member = random_args(8), AttentionBackendName("_native_math")

    def marked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: Any) -> torch.Tensor:
        return torch.full_like(query, 7.0)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, member, marked)
    assert (compat.dispatch(args.q, args.k, args.v, backend=member, parallel_config=None) == 7.0).all()
    assert not (
        compat.dispatch(args.q, args.k, args.v, backend=None, parallel_config=None, enable_gqa=True) == 7.0
    ).any()


# -- registries -------------------------------------------------------------------------------------------------------


def test_a_derived_processor_has_the_registry_entry_of_its_stock_class() -> None:
    from diffusers.hooks._helpers import AttentionProcessorRegistry
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    derived, unknown = type("Derived", (FluxAttnProcessor,), {}), type("Unknown", (), {})
    compat.copy_registry_entry(FluxAttnProcessor, derived)
    compat.copy_registry_entry(unknown, type("DerivedUnknown", (unknown,), {}))
    try:
        assert AttentionProcessorRegistry.get(derived) is AttentionProcessorRegistry.get(FluxAttnProcessor)
    finally:
        del AttentionProcessorRegistry._registry[derived]


def block(name: str) -> torch.nn.Module:
    """A module of a class of that name."""
    made: torch.nn.Module = type(name, (torch.nn.Module,), {})()
    return made


def test_streams_of_blocks_come_from_our_table_then_from_diffusers() -> None:
    from diffusers.models.transformers.transformer_mochi import MochiTransformerBlock

    assert compat.block_streams(block("WanTransformerBlock")) == ("hidden_states",)
    assert compat.block_streams(block("Flux2TransformerBlock")) == ("encoder_hidden_states", "hidden_states")
    wrapper = block("HiDreamBlock")
    wrapper.block = block("HiDreamImageSingleTransformerBlock")
    assert compat.block_streams(wrapper) == ("hidden_states",)
    mochi: Any = MochiTransformerBlock.__new__(MochiTransformerBlock)
    torch.nn.Module.__init__(mochi)
    assert compat.block_streams(mochi) == ("hidden_states", "encoder_hidden_states")
    assert compat.block_streams(block("BlockOfTomorrow")) is None


# -- step caches ------------------------------------------------------------------------------------------------------


def hooked(stateful: bool, **attributes: Any) -> torch.nn.Module:
    """A module with a hook of diffusers, whose forward it replaced."""
    module = torch.nn.Linear(2, 2)
    reference = SimpleNamespace(forward="cached", original_forward="original")
    hook = SimpleNamespace(fn_ref=reference, _is_stateful=stateful, **attributes)
    module._diffusers_hook = SimpleNamespace(hooks={"cache": hook})  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("fails", [False, True])
def test_caches_with_one_state_for_all_branches_are_off_inside_the_block_only(fails: bool) -> None:
    shared, by_branch, stateless = hooked(True, state={}), hooked(True, state_manager={}), hooked(False)
    model = torch.nn.ModuleList([shared, by_branch, stateless, torch.nn.Linear(2, 2)])

    def forwards() -> list[str]:
        parts: list[Any] = [shared, by_branch, stateless]
        return [part._diffusers_hook.hooks["cache"].fn_ref.forward for part in parts]

    try:
        with compat.without_caches(model, shared_only=True):
            assert forwards() == ["original", "cached", "cached"]
            if fails:
                raise InterruptedError
    except InterruptedError:
        assert fails
    assert forwards() == ["cached"] * 3


# -- sequences that are split over devices ----------------------------------------------------------------------------


def parallel(**given: Any) -> Any:
    """Parallel settings as diffusers passes them."""
    return SimpleNamespace(context_parallel_config=SimpleNamespace(**given))


def test_ring_and_uneven_shards_are_declined_with_the_reason() -> None:
    for settings, words in (
        ({"ring_degree": 2, "ulysses_degree": 1}, "ring attention"),
        ({"ring_degree": 1, "ulysses_degree": 2, "ulysses_anything": True}, "uneven"),
    ):
        config = SimpleNamespace(context_parallel_config=SimpleNamespace(**settings, _ulysses_mesh=None))
        with pytest.raises(NotImplementedError, match=words):
            compat.ulysses_mesh(config)
    assert compat.ulysses_mesh(SimpleNamespace(context_parallel_config=None)) is None


def test_a_call_without_parallel_settings_stays_what_it_is() -> None:
    args = random_args(8)
    assert compat.split_args(args, None) is args
    found = compat.split_args(args, SimpleNamespace(context_parallel_config=None))
    assert not found.split and found.q is args.q
    assert not compat.split_args(args, SimpleNamespace()).split  # a release without context parallelism


def test_a_call_of_a_parallel_run_gets_its_mesh_or_the_reason_why_not() -> None:
    args, mesh = random_args(8), object()
    found = compat.split_args(args, parallel(ring_degree=1, ulysses_degree=2, _ulysses_mesh=mesh))
    assert (found.mesh, found.unsupported, found.split) == (mesh, None, True)
    assert isinstance(found, SDPAArgs) and found.q is args.q and args.mesh is None
    found = compat.split_args(args, parallel(ring_degree=None, ulysses_degree=2, _ulysses_mesh=mesh))
    assert found.mesh is mesh
    for given, words in (
        ({"ring_degree": 2}, "ring attention"),
        ({"ring_degree": 1, "ulysses_anything": True}, "uneven"),
    ):
        found = compat.split_args(args, parallel(**given, _ulysses_mesh=mesh))
        assert found.mesh is None and found.split and found.unsupported is not None and words in found.unsupported
