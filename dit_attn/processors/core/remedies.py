"""What a user can do about the reasons for which attention calls stay with stock attention."""

from __future__ import annotations

import re

_RETRY = "dit_attn.enable(...) tries the layer again"
_TOKENS = "pass the text and latents that the model's own pipeline passes, or report it with the pipeline's name"
_NAMED = "name the calls: dit_attn.run_context"

REMEDIES: tuple[tuple[str, str], ...] = (
    # As the settings of the method ask for, or because there is nothing to do.
    (r"dense (step|layer)|density 1|nothing requested|only observed|no method .*|stock path: .*|full-field pass", ""),
    (r"target_error needs density 1", ""),
    (r"auto expects no gain", "the row auto says why; dit-attn bench kernels --save measures this machine"),
    (r"dense calls are timed first", ""),
    (r"sparse calls were slower than dense ones", "measure this machine: dit-attn bench kernels --save"),
    (r"sequence under \d+ tokens", "dense attention is as fast there; sample larger images or videos"),
    (r"cross attention|causal attention", "no method computes such a layer; nothing to do"),
    (r"visual tokens are not consecutive", "use methods without a sparse layout on this model"),
    (r"windows need one image or video in the sequence", "leave out reference images, or use another method"),
    (r"subjects need one image or video in the sequence", "the family has no grid of tokens; use it without regions"),
    (r"weights need one image or video in the sequence", "the family has no grid of tokens; run it without weights"),
    (r"no weights are given", "AnomalyGenerator gives them; in code of yours set session.given['reweighting']"),
    (r"(pooled keys|anchors) need tiles that divide the picture", 'take outside="none", or a size with more divisors'),
    (r"no full-field attention to the text is stored", "begin a run at its first step, through the full transformer"),
    (r"the window covers the picture", "nothing is left out: choose a smaller window"),
    # The call's arguments and surroundings.
    (r"the layer's input is hidden .*", "run it without torch.compile"),
    (r"the layer's input has other rows .*", "this model splits or joins its tokens around the layer; nothing to do"),
    (r"only normalized queries are at hand.*", "their norms tell nothing: take moh.route='calibrated'"),
    (r"(routers|guidance) of a sequence that is split .*", "run it on one device"),
    (r"guidance of a joint attention that is differentiated", "sample under torch.no_grad()"),
    (r"unknown token layout .*|layout of .*", _TOKENS),
    (r"attention mask of shape .*", "give a mask of the keys, (B, Sk) or (B, 1, 1, Sk)"),
    (r"square attention mask", "leave out masks that differ from query to query, or methods with a sparse layout"),
    (r"\w+ attention mask", "pass a tensor: transformer.set_attention_backend('native')"),
    (r"its processor names an attention backend .*", "set a stock processor: transformer.set_attn_processor(...)"),
    (r"attention dropout", "call transformer.eval(), or set the dropout to 0"),
    (r"\w+ is active around the attention call", "leave that mode for runs with a method"),
    (r"the (branch|latents|first step) .*", _NAMED),
    # Several devices.
    (r"ring attention .*", "set ring_degree=1 and ulysses_degree to the number of ranks"),
    (r"error control of a sequence that is split .*", "leave target_error out, or run it on one device"),
    (r"ulysses_anything .*", "set ulysses_anything=False"),
    (r"\d+ key heads do not split evenly .*", "set ulysses_degree to a divisor of the key heads"),
    (r"parts of .* do not split evenly .*", "choose a size and a text length that divide by the ranks"),
    # Settings that do not fit together.
    (r"\w+ for \d+ heads, the layer has \d+", "give one number, or one for each head of the layer"),
    (r"it computes its rows itself, .*", "use block-sparse or rectified-spaattn with the other method"),
    (r"compensation .* does not know the logit bias .*", "set compensation='merge'"),
    (r"error .* is above max_error .*", f"raise density or max_error, or list the layer in dense_layers; {_RETRY}"),
    # Faults.
    (r"kernel gave NaN or infinity", f"look for NaN in the inputs and the weights; {_RETRY}"),
    (r"kernel failed: OutOfMemoryError.*", "use a smaller batch or size; the next run tries the layer again"),
    (r"kernel failed: .*", f"run dit-attn doctor, which tests the kernels; {_RETRY}"),
)
"""Patterns of the reasons, and what to do; the first that matches counts. Empty where there is nothing to do."""


def failure_reason(error: Exception) -> str:
    """Return the reason that a kernel's error is counted under."""
    return f"kernel failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"


def remedy(reason: str) -> str | None:
    """Return what to do about a reason, empty for nothing; ``None`` for reasons of methods from elsewhere."""
    return next((text for pattern, text in REMEDIES if re.fullmatch(pattern, reason, re.DOTALL)), None)


def with_remedy(reason: str) -> str:
    """Return the reason and, after a semicolon, what to do about it."""
    text = remedy(reason)
    return f"{reason}; {text}" if text else reason
