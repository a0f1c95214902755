"""NAG against its definition in cross and joint attention and in full models, what it leaves alone, and full runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dit_attn
from dit_attn import NAG, BlockSparse, DitAttnError, models
from dit_attn.processors.core.call import Request, SDPAArgs
from dit_attn.processors.core.tokens import TokenLayout, visual_span
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.nag import normalized
from tests._support import nag_reference
from tests._support.core_calls import GRID, JOINT, TEXT, VISUAL, Dispatched, host_run, stock_attention
from tests._support.recorded_calls import reference
from tests.families.test_pixart import TestPixArt as PixArt
from tests.families.test_sd3 import TestSD3 as SD3

PROMPT, NEGATIVE = "a large red circle at the left on white", "a large blue circle at the left on white"
METHODS = [NAG(), NAG(alpha=1.0, tau=1.1), NAG(scale=0.5, alpha=0.7), NAG(tau=0.0)]


def arguments(joint: bool) -> SDPAArgs:
    """Rows of the branches uncond, cond and negative; the text of the last is shorter."""
    draw = torch.Generator().manual_seed(0)
    rows, keys = (TEXT + VISUAL,) * 2 if joint else (VISUAL, TEXT)
    q = torch.randn(3, rows, 4, 16, generator=draw, dtype=torch.float64)
    k, v = (torch.randn(3, keys, 2, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    there = torch.ones(3, keys, dtype=torch.bool)
    there[2, TEXT - 5 : TEXT] = False
    return SDPAArgs(q, k, v, mask=there)


def dispatched(method: NAG, args: SDPAArgs, *others: Method) -> Dispatched:
    """A call of the second of four steps."""
    joint = args.q.shape[1] == args.k.shape[1]
    layout = JOINT if joint else TokenLayout((visual_span("video", GRID),))
    run, layer = host_run([method, *others], layout, text_kind="self" if joint else "cross")
    if not joint:
        run.remove_layers([layer])
        layer = run.add_layer("blocks.0.cross", ("cross",))
        run.begin_call(2)
    run.append_negative(1)
    run.branches = lambda batch, first=0: ("uncond", "cond", "negative")  # type: ignore[method-assign]
    run.samples = lambda batch, first=0: (0, 0, 0)  # type: ignore[method-assign]
    run.clock.total, run.clock.step = 4, 1
    return Dispatched(run, layer, args)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "cross"])
def test_a_call_is_the_definition_in_image_rows_of_the_conditional_branch_alone(method: NAG, joint: bool) -> None:
    args = arguments(joint)
    done, stock = dispatched(method, args), stock_attention(args)
    expected = nag_reference.guided(done.call, reference(done.call, Request()), method)
    torch.testing.assert_close(done.out, expected, atol=1e-9, rtol=1e-7)
    assert torch.equal(done.out[0], stock[0]) and not torch.equal(done.out[1], stock[1])
    text = slice(0, TEXT) if joint else slice(0)
    assert torch.equal(done.out[1, text], stock[1, text])


def test_negative_rows_attend_with_the_image_of_their_conditional_row_and_their_own_text() -> None:
    args = arguments(True)
    call = dispatched(NAG(), args).call
    assert call is not None
    for seen, given in ((call.q, args.q), (call.k, args.k), (call.v, args.v)):
        assert torch.equal(seen[2, TEXT:], given[1, TEXT:]) and torch.equal(seen[2, :TEXT], given[2, :TEXT])
        assert torch.equal(seen[:2], given[:2])


def test_it_goes_on_from_whatever_computed_the_call() -> None:
    args, sparse = arguments(True), BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0)
    done = dispatched(NAG(), args, sparse)
    shared = args.with_inputs((done.call.q, done.call.k, done.call.v))  # type: ignore[union-attr]
    alone = dispatched(NAG(last_layer=0), shared, sparse).out
    assert not torch.equal(alone, stock_attention(shared))
    torch.testing.assert_close(done.out, nag_reference.guided(done.call, alone, NAG()), atol=1e-9, rtol=1e-7)


def test_layers_that_are_not_guided_are_stock_with_the_image_of_the_conditional_row() -> None:
    args = arguments(True)
    done = dispatched(NAG(first_layer=1), args)
    assert torch.equal(done.out[:2], stock_attention(args)[:2])
    assert torch.equal(done.out, stock_attention(args.with_inputs((done.call.q, done.call.k, done.call.v))))  # type: ignore[union-attr]


def test_a_token_of_no_length_stays_finite() -> None:
    zero, other = torch.zeros(1, 8), torch.ones(1, 8)
    assert torch.equal(normalized(zero, other, 4.0, 2.5, 0.25), zero)
    assert torch.isfinite(normalized(other, other * 1.25, 4.0, 2.5, 0.25)).all()  # Z~ is 0


class Plain:
    """Stands in for torch's attention: a plain softmax, and NAG where a call attends to a text."""

    def __init__(self, method: NAG, image: slice, joint: bool) -> None:
        self.method, self.image, self.joint = method, image, joint

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, **_: Any) -> Any:
        text = self.joint or q.shape[2] != k.shape[2]
        half = q.shape[0] // 2
        if text:
            q, k, v = q.clone(), k.clone(), v.clone()
            for x in (q, k, v) if self.joint else (q,):
                x[half:, :, self.image] = x[:half, :, self.image]
        logits = q @ k.mT * q.shape[-1] ** -0.5
        out = (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v
        if not text:
            return out
        positive, negative = (part[:, :, self.image].transpose(1, 2).flatten(2) for part in out.chunk(2))
        far = positive + self.method.scale * (positive - negative)
        ratio = far.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
        far = torch.where(ratio > self.method.tau, far * self.method.tau / ratio, far)
        guided = self.method.alpha * far + (1.0 - self.method.alpha) * positive
        out = out.clone()
        out[:half, :, self.image] = guided.unflatten(2, (q.shape[1], -1)).transpose(1, 2)
        return out


@pytest.mark.parametrize("case", [PixArt, SD3])
def test_a_full_model_is_the_plain_definition_with_one_image_and_two_texts(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = case().model().eval().double()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    args = {name: x.double() if _real(x) else x for name, x in case().inputs().items()}
    text = nag_reference.other_text(args)
    method = NAG(alpha=0.6)
    dit_attn.enable(net, method).given["nag"] = text
    with torch.no_grad():
        found = net(**args, return_dict=False)[0]
    dit_attn.disable(net)
    double = {name: torch.cat([x, text.get(name, x)]) if _batched(x) else x for name, x in args.items()}
    image = slice(0, 99999) if case is PixArt else slice(0, -args["encoder_hidden_states"].shape[1])
    monkeypatch.setattr(F, "scaled_dot_product_attention", Plain(method, image, case is not PixArt))
    with torch.no_grad():
        expected = net(**double, return_dict=False)[0][:2]
        stock = net(**args, return_dict=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)
    assert (found - stock).abs().max() > 1e-4


def _real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _batched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == 2


class Runs:
    """Runs of two steps of an embedded model."""

    def __init__(self, name: str) -> None:
        self.pipe = models.load(name)
        self.pipe.set_progress_bar_config(disable=True)
        self.call: dict[str, Any] = {**models.call_defaults(name), "num_inference_steps": 2, "output_type": "latent"}
        self.call |= {"height": 64, "width": 64}

    def __call__(self, scale: float = 1.0, **more: Any) -> torch.Tensor:
        """Latents from one seed."""
        call = {**self.call, "guidance_scale": scale, **more}
        return self.pipe(PROMPT, generator=torch.manual_seed(0), **call).images


@pytest.mark.parametrize("name", ["tiny-image", "tiny-joint"])
def test_full_runs_with_and_without_plain_guidance(name: str) -> None:
    run = Runs(name)
    for scale, offs in ((1.0, (NAG(scale=0.0), NAG(alpha=0.0))), (3.0, (NAG(stop=0),))):
        stock = run(scale)
        for off in offs:
            dit_attn.enable(run.pipe, off)
            assert torch.equal(run(scale), stock)
        dit_attn.enable(run.pipe, NAG(negative_prompt=PROMPT))
        torch.testing.assert_close(run(scale), stock, atol=1e-4, rtol=1e-4)  # nothing lies between the two
        dit_attn.enable(run.pipe, "nag", negative_prompt=NEGATIVE)
        assert not torch.allclose(run(scale), stock, atol=1e-2)
        dit_attn.disable(run.pipe)
        assert torch.equal(run(scale), stock)


def test_the_negative_prompt_of_the_call_counts_where_the_method_has_none() -> None:
    run = Runs("tiny-image")
    dit_attn.enable(run.pipe, NAG(negative_prompt=NEGATIVE))
    expected = run()
    dit_attn.enable(run.pipe, NAG())
    with pytest.raises(DitAttnError, match="nag: there is no negative prompt; give NAG"):
        run()
    assert torch.equal(run(negative_prompt=NEGATIVE), expected)
    dit_attn.enable(run.pipe, NAG(negative_prompt=NEGATIVE, stop=1))
    assert not torch.equal(run(), expected)


def test_samples_of_a_batch_are_guided_as_if_alone_and_with_a_sparse_method() -> None:
    run = Runs("tiny-joint")
    sparse = BlockSparse(density=0.5, q_block=16, kv_block=16, dense_steps=0, dense_layers=())
    dit_attn.enable(run.pipe, NAG(negative_prompt=NEGATIVE), sparse)
    noise = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = run.pipe([PROMPT, NEGATIVE], generator=noise, **{**run.call, "guidance_scale": 2.0}).images
    torch.testing.assert_close(both[:1], run(2.0), atol=1e-3, rtol=1e-3)
    dit_attn.enable(run.pipe, sparse)
    assert not torch.allclose(both[:1], run(2.0), atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "said"), [({"scale": -1.0}, "scale"), ({"alpha": 1.5}, "alpha"), ({"tau": -1.0}, "tau")]
)
def test_values_out_of_range_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(DitAttnError, match=f"nag.{said}"):
        NAG(**settings)


def test_it_is_refused_with_a_perturbed_pass() -> None:
    with pytest.raises(DitAttnError, match="nag and softpag cannot run together: both add rows to a step"):
        dit_attn.enable(models.load("tiny-image"), NAG(), dit_attn.SoftPAG(heads="0:0"))
