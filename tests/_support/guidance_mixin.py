"""What guidance by a perturbed pass must do on every family; a part of :mod:`tests._support.family_mixin`."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.attach import attention_processor, intercepted_call, perturbed_pass
from dit_attn.processors.core.call import SDPAArgs
from tests._support.outputs import same, tensors


def materialised(args: SDPAArgs, places: torch.Tensor, u: float) -> torch.Tensor:
    """``((1 - u) A + u I) V`` with the map written out in float64; (B, S, H, D). ``places`` of the queries."""
    mask, scale = args.mask, args.scale
    q, k, v = (x.transpose(1, 2).double() for x in (args.q, args.k, args.v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    weights = torch.softmax(logits, -1).nan_to_num(0.0)  # padded queries may read nothing at all
    return (((1 - u) * weights + u * torch.eye(k.shape[2], dtype=torch.float64)[places]) @ v).transpose(1, 2)


@contextmanager
def by_hand(layer_name: str, head: int, u: float) -> Iterator[None]:
    """Every tapped call of a layer answers with the written-out map of one head."""
    stock = attention_processor.dispatch_attention

    def perturbed(run: Any, layer: Any, args: SDPAArgs, stock_call: Any) -> torch.Tensor:
        out = stock(run, layer, args, stock_call)
        tokens = run.tokens(args.k.shape[1], layer)
        if layer.name == layer_name and tokens is not None and tokens.query_count == args.q.shape[1]:
            out = out.clone()
            places = torch.cat([torch.arange(*place) for place in tokens.queries])
            exact = materialised(args, places, u)
            out[:, :, head] = exact[:, :, head].to(out.dtype)
        return out

    attention_processor.dispatch_attention = intercepted_call.dispatch_attention = perturbed
    try:
        yield
    finally:
        attention_processor.dispatch_attention = intercepted_call.dispatch_attention = stock


def combined(cond: Any, perturbed: Any, weight: float) -> list[torch.Tensor]:
    """``c + w (c - p)`` of two model outputs."""
    return [c + weight * (c - p) for c, p in zip(tensors(cond), tensors(perturbed), strict=True)]


class GuidedMixin:
    """Behaviours of SoftPAG and its kin; needs the fixtures and helpers of ``FamilyMixin``.

    Attributes:
        step_gets_all: whether the pipeline's scheduler gets all that the model predicts.
    """

    step_gets_all: bool = True

    net: Any
    call: Any
    pipeline: Any
    _run: Any

    def test_no_strength_or_no_scale_is_bit_equal(self, net: Any, args: Any) -> None:
        before = self.call(net, args)
        for nothing in (dit_attn.SoftPAG(heads="0", u=0.0), dit_attn.SoftPAG(heads="0", scale=0.0)):
            session = dit_attn.enable(net, nothing)
            assert same(before, self.call(net, args))
            assert session.guider is not None and session.guider.evaluations == 0
        dit_attn.disable(net)
        assert same(before, self.call(net, args))

    def test_a_guided_call_equals_the_written_out_map(self, net: Any, args: Any) -> None:
        session = dit_attn.enable(net)
        layer = session.stack_layers[-1]
        plain = self.call(net, args)
        session.reset()
        with by_hand(layer, 0, 0.6):
            spoiled = self.call(net, args)
        session = dit_attn.enable(net, dit_attn.SoftPAG(heads=f"{layer}:0", u=0.6, scale=2.0))
        guided = self.call(net, args)
        assert session.guider is not None and session.guider.evaluations == 1
        assert session.guider.reused_blocks == self._shared(session, layer, args)
        for expected, found in zip(combined(plain, spoiled, 2.0), tensors(guided), strict=True):
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
        assert any(not torch.equal(a, b) for a, b in zip(tensors(plain), tensors(guided), strict=True))

    def test_taking_blocks_over_changes_no_bit(self, net: Any, args: Any) -> None:
        layer = dit_attn.enable(net).stack_layers[-1]
        results = []
        for share in (True, False):
            dit_attn.enable(net, dit_attn.SoftPAG(heads=layer, share_prefix=share))
            results.append(self.call(net, args))
        assert same(*results)

    def test_other_heads_are_bit_equal_in_the_perturbed_pass(self, net: Any, args: Any) -> None:
        session = dit_attn.enable(net, dit_attn.SoftPAG(heads="0:1"))
        seen: list[torch.Tensor] = []
        with dit_attn.observing(net, lambda call, request, out: call.layer.index == 0 and seen.append(out)):
            self.call(net, args)
        half = len(seen) // 2  # some models attend to their samples one by one
        assert session.guider is not None and half and len(seen) == 2 * half
        for plain, spoiled in zip(seen[:half], seen[half:], strict=True):
            others = [head for head in range(plain.shape[2]) if head != 1]
            assert torch.equal(plain[:, :, others], spoiled[:, :, others])
            assert not torch.equal(plain[:, :, 1], spoiled[:, :, 1])

    def test_skipping_a_block_hands_its_inputs_on(self, net: Any, args: Any) -> None:
        session = dit_attn.enable(net, dit_attn.SLG(layers="0", scale=1.0, start=0.0, stop=1.0))
        assert session.guider is not None
        block = net.get_submodule(session.guider.blocks[0])
        seen: list[tuple[Any, Any]] = []
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        guided = tensors(self.call(net, args))
        assert session.guider.evaluations == 1
        given = seen[0]
        dit_attn.disable(net)
        plain = tensors(self.call(net, args))
        skip = perturbed_pass.skip_forward(block)
        with perturbed_pass.replaced_forwards({block: lambda *_, **__: skip(*given[0], **given[1])}):
            skipped = tensors(self.call(net, args))
        for found, c, p in zip(guided, plain, skipped, strict=True):
            torch.testing.assert_close(found, c + (c - p), atol=1e-5, rtol=1e-4)

    def test_every_way_in_agrees_over_a_whole_run(self) -> None:
        pipe, kwargs = self.made()
        for parameter in pipe.transformer.parameters():  # zero-initialised gates would hide the attention
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        stock = self._latents(pipe, kwargs)
        base = dit_attn.SoftPAG(heads="0:0", scale=1.5)
        session = dit_attn.enable(pipe, dit_attn.SoftPAG(heads="0:0", scale=0.0))
        off = self._latents(pipe, kwargs)
        assert torch.equal(off.latents, stock.latents) and off.calls == stock.calls
        session = dit_attn.enable(pipe, base)
        first = self._latents(pipe, kwargs)
        assert session.guider is not None and session.guider.evaluations == 2
        assert first.calls == stock.calls + 2
        assert not torch.equal(first.latents, stock.latents)
        ways: list[dict[str, Any]] = [{"batched": True}]
        if not session.cfg.rescaled:
            ways += [{"inject": "step"}] * self.step_gets_all
            if session.guidance_scale():
                ways.append({"inject": "cond"})
        for way in ways:
            dit_attn.enable(pipe, dataclasses.replace(base, **way))
            again = self._latents(pipe, kwargs)
            torch.testing.assert_close(again.latents, first.latents, atol=2e-3, rtol=1e-3)
        if not self.step_gets_all:
            dit_attn.enable(pipe, dataclasses.replace(base, inject="step"))
            with pytest.raises(dit_attn.DitAttnError, match="use inject='shift'"):
                self._latents(pipe, kwargs)
        dit_attn.disable(pipe)
        assert torch.equal(self._latents(pipe, kwargs).latents, stock.latents)

    # -- internals ---------------------------------------------------------------------------------------------------

    def _latents(self, pipe: Any, kwargs: dict[str, Any]) -> SimpleNamespace:
        """One run of two steps: its latents, and how often the transformer's forward ran."""
        count = 0
        kind = type(pipe.transformer)
        stock = kind.forward

        def forward(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            return stock(*args, **more)

        kind.forward = forward
        forward.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
        try:
            with torch.no_grad():
                output = pipe(
                    **copy.deepcopy(kwargs),
                    num_inference_steps=2,
                    generator=torch.Generator().manual_seed(0),
                    output_type="latent",
                    return_dict=False,
                )
        finally:
            kind.forward = stock
        return SimpleNamespace(latents=torch.cat([part.flatten() for part in tensors(output[0])]), calls=count)

    @staticmethod
    def _shared(session: Any, layer: str, args: dict[str, Any]) -> int:
        """Blocks that need not run again when ``layer`` is the first to be perturbed."""
        blocks = session.guider.blocks
        first = next(i for i, block in enumerate(blocks) if layer.startswith(f"{block}."))
        between = any("control" in name or "kv_cache" in name for name in args)  # blocks get more than a hidden state
        return first if session.family.block_chain and not between else 0
