"""NAG, normalized attention guidance (arXiv 2505.21179): a negative prompt inside attention.

The image rows attend to the text of the prompt and to that of a negative prompt; the first result Z+ is moved away
from the second one Z-, token by token over all heads together, with a limit on its L1 norm::

    Z~ = Z+ + scale (Z+ - Z-)    r = |Z~| / |Z+|    Z^ = Z~ min(r, tau) / r    Z = alpha Z^ + (1 - alpha) Z+

The conditional rows of a call run once more with the negative prompt, as rows of the branch ``"negative"``. At every
layer with text these have the image of their conditional row, so that in joint attention the negative text goes its own
way through the layers while there is one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.guidance.perturbation import wide
from dit_attn.processors.methods.base import Method, in_steps, resolve_count, setting


@dataclass(frozen=True, kw_only=True)
class NAG(Method):
    """Move attention to the text away from that to a negative prompt, in the image rows of conditional branches.

    Attributes:
        negative_prompt: what to avoid; without it, the negative prompt of the pipeline's call.
        scale: length of the step away from the negative prompt, in differences; 0 is bit-equal to the stock run. Public
            code counts from 1: its ``nag_scale`` is this plus 1.
        tau: largest L1 norm of a guided token, in norms of the stock one.
        alpha: how far a token goes from the stock result to the guided one; 0 is bit-equal to the stock run.
        start, stop: first and last + 1 guided step, fractions of the run or counts.
        first_layer, last_layer: first and last + 1 guided layer, likewise.

    Raises:
        DitAttnError: a value out of range.
    """

    slug: ClassVar[str] = "nag"
    role: ClassVar[str] = "negative"
    sites: ClassVar[tuple[str, ...]] = ("text",)

    negative_prompt: str | None = setting(None, "what to avoid; without it that of the call", example="blurry")
    scale: float = setting(4.0, "length of the step, in differences", low=0.0, high=100.0)
    tau: float = setting(2.5, "largest norm of a token, in stock norms", low=0.0)
    alpha: float = setting(0.25, "from the stock result (0) to the guided one (1)", low=0.0, high=1.0)
    start: float | int = setting(0.0, "first guided step (fraction or count)", low=0)
    stop: float | int = setting(1.0, "last guided step + 1 (fraction or count)", low=0)
    first_layer: float | int = setting(0.0, "first layer (fraction or count)", low=0)
    last_layer: float | int = setting(1.0, "last layer + 1 (fraction or count)", low=0)

    def runs_negative(self, clock: Clock) -> bool:
        """See the base class."""
        return bool(self.scale and self.alpha) and in_steps(clock, self.start, self.stop)

    def request(self, call: AttentionCall, request: Request) -> None:
        """Give negative rows the image of their conditional row, and ask for the guided result of the latter."""
        if "negative" not in call.branches or not call.attends_to_text:
            return
        if call.shard[1] > 1:
            request.decline("guidance of a sequence that is split over devices")
            return
        at = {pair: row for row, pair in enumerate(zip(call.branches, call.samples))}
        pairs = [(at["cond", sample], row) for (branch, sample), row in at.items() if branch == "negative"]
        device = call.q.device
        plus, minus = (torch.tensor(rows, device=device)[:, None] for rows in zip(*pairs))
        image = _image_rows(call)
        changed = [call.q, call.k, call.v] if call.kind == "self" else [call.q]
        shared = [x.index_put((minus, image), x[plus, image]) for x in changed]
        request.replace_inputs(call, *shared, *(call.k, call.v)[len(shared) - 1 :])
        layers = range(
            resolve_count(self.first_layer, call.layer_count), resolve_count(self.last_layer, call.layer_count)
        )
        if call.layer.index in layers:
            request.change_output(partial(self._guided, plus, minus, image))

    def _guided(self, plus: torch.Tensor, minus: torch.Tensor, image: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """(B, S, H, Dv): the result of the call, guided in the image of the rows ``plus``."""
        stock = wide(out[plus, image])
        found = normalized(stock.flatten(2), wide(out[minus, image]).flatten(2), self.scale, self.tau, self.alpha)
        return out.index_put((plus, image), found.view_as(stock).to(out.dtype))


def normalized(positive: torch.Tensor, negative: torch.Tensor, scale: float, tau: float, alpha: float) -> torch.Tensor:
    """Return the guided result of some tokens, (..., C).

    Args:
        positive, negative: (..., C), what the tokens get from the text of the prompt and of the negative prompt.
        scale, tau, alpha: as for :class:`NAG`.
    """
    far = positive + scale * (positive - negative)
    longest = tau * positive.norm(p=1, dim=-1, keepdim=True)
    size = far.norm(p=1, dim=-1, keepdim=True)
    limited = far * (longest / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1.0)
    return torch.lerp(positive, limited, alpha)


def _image_rows(call: AttentionCall) -> torch.Tensor:
    """Indices of the rows that are not text."""
    if call.kind != "self":
        return torch.arange(call.q.shape[1], device=call.q.device)
    assert call.tokens is not None
    spans = [span for span in call.tokens.spans if span.kind != "text"]
    return torch.cat([torch.arange(span.start, span.stop, device=call.q.device) for span in spans])
