"""One attention call, and what the enabled methods request of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, Compensation, Epilogue, LogitBias
from dit_attn.kernels.two_level import FineLevel
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import PLAIN, Layer, PassStates
from dit_attn.processors.core.logit_bias import RowBias, TokenSet, factor_bias, merged_bias, span_bias, token_mask
from dit_attn.processors.core.observation import Observation, Probe
from dit_attn.processors.core.token_permute import Grid, PermutedTokens, permute_tokens
from dit_attn.processors.core.tokens import Tokens


@dataclass(frozen=True)
class SDPAArgs:
    """Arguments of one scaled-dot-product attention call, as the model passed them.

    Attributes:
        q: (B, S, H, D).
        k: (B, Sk, Hk, D); ``H % Hk == 0``.
        v: (B, Sk, Hk, Dv).
        mask: ``None``, (B, Sk) or broadcastable to (B, H, S, Sk); boolean (True = attend) or additive.
        scale: softmax scale, ``None`` for ``D ** -0.5``.
        causal: whether attention is causal.
        dropout: dropout probability of the attention weights.
        gqa: whether the model asked torch for grouped-query attention.
        mesh: device mesh over which the sequence is split (Ulysses); q, k and v are this rank's shard then.
        full_keys: with a mesh, whether every rank has all keys and heads of k and v, as some cross attention has.
        unsupported: reason why no method can handle the way this call is split over devices, or ``None``.
        turn: position among the attention calls of one call of the processor, from 0: some attend to the text and to
            an image one after the other.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float | None = None
    causal: bool = False
    dropout: float = 0.0
    gqa: bool = False
    mesh: Any = None
    full_keys: bool = False
    unsupported: str | None = None
    turn: int = 0

    @property
    def split(self) -> bool:
        """Whether the sequence is split over devices."""
        return self.mesh is not None or self.unsupported is not None

    def of_heads(self, kept: Sequence[int]) -> SDPAArgs:
        """Return the call of some of the query heads, with their keys and values."""
        heads = torch.tensor(kept, device=self.q.device)
        groups = heads // (self.q.shape[2] // self.k.shape[2])
        mask = self.mask
        if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[1] == self.q.shape[2] > 1:
            mask = mask[:, heads.to(mask.device)]
        k, v = self.k[:, :, groups], self.v[:, :, groups]
        return replace(self, q=self.q[:, :, heads], k=k, v=v, mask=mask, gqa=False)

    def with_inputs(self, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None) -> SDPAArgs:
        """Return the call with other q, k and v; itself for ``None``."""
        return self if inputs is None else replace(self, q=inputs[0], k=inputs[1], v=inputs[2])

    def rescaled(self, factor: float) -> SDPAArgs:
        """Return the call with another softmax scale; itself where the factor is 1."""
        if factor == 1.0:
            return self
        return replace(self, scale=(self.q.shape[-1] ** -0.5 if self.scale is None else self.scale) * factor)


@dataclass
class AttentionCall:
    """One attention call of a wrapped layer, after normalization and rotary embedding.

    Attributes:
        q: (B, S, H, D).
        k: (B, Sk, Hk, D); ``H % Hk == 0``. Of self attention Sk is S; of cross attention, the number of text tokens.
        v: (B, Sk, Hk, Dv).
        mask: what the model passed: ``None``, (B, Sk) or broadcastable to (B, H, S, Sk); boolean (True = attend) or
            additive.
        scale: softmax scale, ``None`` for ``D ** -0.5``; with the factors that earlier methods asked for.
        causal: whether the model asked for causal attention.
        layer: the layer.
        tokens: the parts of the sequence of q, ``None`` when they are unknown. Of those that are keys alone
            (``tokens.keys_alone``) the rows of q are 0, and nobody gets their results.
        clock: position in the run.
        branches: guidance branch of every batch row.
        samples: sample of every batch row, counted within its branch; the branches of a sample have one number.
        layer_count: number of wrapped layers of the transformer that are of the layer's kind.
        mask_rule: form of the model's square masks: ``"key"`` (there are none) or ``"visual-row"`` (all visual rows of
            a square mask are alike).
        kind: of :data:`~dit_attn.processors.core.layer.KINDS`: ``"self"`` (joint attention too), ``"cross"`` (the keys
            are the text) or ``"image"`` (the keys are a conditioning image).
        shard: rank of this device and number of devices where each has some of the heads of a sequence that is split
            over devices.
        pass_name: ``"plain"``; ``"perturbed"``, the second pass of a guidance method; or ``"twin"``, one that a method
            asked for, see :meth:`~dit_attn.processors.methods.base.Method.twin`. ``layer.state`` belongs to the pass,
            ``layer.state_of("twin")`` is that of another.
        shared: what methods store for all layers of the transformer together, for each window and pass, until the run
            ends; a layer's own state is ``layer.state``.
        reports: what methods say of the run, by slug, for :func:`dit_attn.summary`; emptied when a new run begins.
        find_piece: finds the tokens of a piece of the prompt, see :meth:`prompt_tokens`; ``None`` where no host does.
        find_prompts: finds the prompt of every row, see :meth:`prompts`; likewise.
        given: what the code around the run hands to methods, by slug; see
            :attr:`~dit_attn.processors.core.run_state.RunState.given`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    causal: bool
    layer: Layer
    tokens: Tokens | None
    clock: Clock
    branches: tuple[str, ...] = ()
    samples: tuple[int, ...] = ()
    layer_count: int = 1
    mask_rule: str = "key"
    kind: str = "self"
    shard: tuple[int, int] = (0, 1)
    pass_name: str = PLAIN
    shared: PassStates = field(default_factory=PassStates)
    reports: dict[str, Any] = field(default_factory=dict)
    find_piece: Callable[[AttentionCall, str | tuple[int, int]], torch.Tensor] | None = None
    find_prompts: Callable[[AttentionCall], tuple[str, ...]] | None = None
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> slice:
        """The heads of the model that q has: all, or those of this device."""
        count = self.q.shape[2]
        return slice(self.shard[0] * count, (self.shard[0] + 1) * count)

    def prompt_tokens(self, piece: str | tuple[int, int]) -> torch.Tensor:
        """Return which keys a piece of the prompt became, (B, Sk) bool; rows whose prompt lacks it have none.

        Args:
            piece: its text, for every occurrence, or (start, end) in characters of the prompt.

        Raises:
            DitAttnError: the prompts of the run are not known, none has the piece, or all of it is cut off.
        """
        if self.find_piece is None:
            raise DitAttnError("the prompts of this run are not known: nothing that was enabled sees its pipeline")
        return self.find_piece(self, piece)

    def prompts(self) -> tuple[str, ...]:
        """Return the prompt that conditions every batch row, empty for the rows of other branches.

        Raises:
            DitAttnError: the prompts of the run are not known.
        """
        if self.find_prompts is None:
            raise DitAttnError("the prompts of this run are not known: nothing that was enabled sees its pipeline")
        return self.find_prompts(self)

    @property
    def attends_to_text(self) -> bool:
        """Whether some of the keys are the text."""
        joint = self.tokens is not None and any(span.kind == "text" for span in self.tokens.spans)
        return self.kind == "cross" or (self.kind == "self" and joint)

    @property
    def visual(self) -> slice:
        """The visual rows of the sequence. Only asked where the tokens are known and the visual ones consecutive."""
        assert self.tokens is not None and self.tokens.visual_range is not None
        return slice(*self.tokens.visual_range)

    @property
    def softmax_scale(self) -> float:
        """The softmax scale, as a number."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class KeyGain:
    """Factors of what consecutive rows get from some keys, after the softmax.

    Attributes:
        keys: (B|1, Sk) bool.
        factors: (B|1, n) factor of the rows ``first`` to ``first + n - 1``.
        first: the first row.
    """

    keys: torch.Tensor
    factors: torch.Tensor
    first: int


@dataclass
class Request:
    """What the enabled methods ask for one call; an empty request means stock attention.

    Attributes:
        layout: key blocks that the visual rows attend to (queries: visual rows, keys: the full sequence); ``None`` for
            all.
        biases: low-rank biases of the logits, see :meth:`add_bias` and :meth:`add_span_bias`.
        scale_factor: factor of the softmax scale, see :meth:`multiply_scale`.
        recorders: called with the output, see :meth:`record_output`.
        gates: factors of the output, see :meth:`multiply_heads`.
        active: rows of heads that are needed, see :meth:`skip_heads`; ``None`` for all.
        key_gains: factors of what rows get from some keys, see :meth:`multiply_keys`.
        changes: functions of the output, see :meth:`change_output`.
        inputs: q, k and v that are computed with, see :meth:`replace_inputs`; ``None`` for those of the call.
        replacement: the output that replaces attention, see :meth:`replace_output`.
        probes: what is to be measured, see :meth:`observe`.
        declined: reasons of the methods that leave this call to stock attention.
        key_mask: (B, S) bool, keys that exist; filled by the executor from the model's mask.
        key_bias: (B|1, H|1, S) fp32 added to the logits, for models whose mask is additive; ``key_mask`` is then
            the part of it that selection needs to know.
        permuted: visual queries, keys and values in the order the layout speaks of; ``None`` for that of the sequence.
        compensation: pooled keys that stand for the skipped blocks.
        fine: with it, finer pooled keys that stand for some of them; without an epilogue.
        epilogue: what the kernel does to the rows before it writes them.
        compute_visual: computes the visual rows instead of the kernel call, (B, Sv, H, Dv) in the order of the
            sequence; called once.
        visual_density: with ``compute_visual``, attention computed for the visual rows, as a fraction of dense.
        selection_cost: what choosing the blocks computed, as a fraction of the visual rows' dense attention.
        max_error: see :class:`~dit_attn.processors.methods.sparse.SparseMethod`.
        density: density, of all heads or of each, that ``max_error`` is measured for, once per run; ``None`` where it
            never changes.
    """

    layout: BlockLayout | None = None
    biases: list[RowBias] = field(default_factory=list)
    scale_factor: float = 1.0
    gates: list[torch.Tensor] = field(default_factory=list)
    active: torch.Tensor | None = None
    key_gains: list[KeyGain] = field(default_factory=list)
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=list)
    recorders: list[Callable[[torch.Tensor], None]] = field(default_factory=list)
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    replacement: torch.Tensor | None = None
    probes: list[Probe] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)
    key_mask: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    permuted: PermutedTokens | None = None
    compensation: Compensation | None = None
    fine: FineLevel | None = None
    epilogue: Epilogue | None = None
    compute_visual: Callable[[], torch.Tensor] | None = None
    visual_density: float | torch.Tensor = 1.0
    selection_cost: float = 0.0
    max_error: float | None = None
    density: float | tuple[float, ...] | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is requested that stock attention does not do."""
        asked = self.sparse or self.biases or self.gates or self.key_gains or self.changes or self.inputs
        return not (asked or self.replacement is not None or self.scale_factor != 1.0)

    @property
    def sparse(self) -> bool:
        """Whether the visual rows are computed by a layout, or by the method itself."""
        return self.layout is not None or self.compute_visual is not None

    def decline(self, reason: str) -> None:
        """Leave the call to dense attention; the reason is counted."""
        self.declined.append(reason)

    def go_dense(self) -> None:
        """Drop what was requested for the visual rows, except biases."""
        self.layout = self.compute_visual = self.permuted = self.compensation = self.fine = self.epilogue = None

    def add_bias(self, call: AttentionCall, rows: torch.Tensor, keys: torch.Tensor, first: int = 0) -> None:
        """Add ``rows @ keys^T`` to the logits of some rows; zero factors add nothing and change nothing.

        Heads are those of the call (``call.heads``); where they are split over devices, every device must add as many
        biases, and zero factors are computed with.

        Args:
            call: the attention call.
            rows: (B|1, H|1, n, r) finite factor of n consecutive rows, visual or not. H is this device's number of
                heads, or the model's where they are split over devices.
            keys: (B|1, H|1 or Hk, Sk, r) finite factor of all keys, natural logarithm. A product of at most -1e4 is
                ``-inf``.
            first: the first of the n rows in the sequence.

        Raises:
            DitAttnError: a factor does not fit the call.
        """
        bias = factor_bias(call.q, call.k, rows, keys, first, call.shard)
        self.biases += [] if bias is None else [bias]

    def add_span_bias(self, call: AttentionCall, rows: TokenSet, keys: TokenSet, value: float | torch.Tensor) -> None:
        """Add a constant to the logits of some rows and some keys; 0, no row or no key changes nothing.

        Heads and devices are as for :meth:`add_bias`; the number 0 changes nothing there either.

        Args:
            call: the attention call.
            rows: tokens of the sequence: a slice, or (S,) or (B, S) bool.
            keys: tokens that are attended to: a slice, or (Sk,) or (B, Sk) bool; text tokens in cross attention.
            value: added, natural logarithm: ``log(c)`` multiplies the weight by c before the softmax is normalized,
                ``-inf`` bars the rows from the keys. A number, or (B|1, H|1), H as for :meth:`add_bias`. A row that is
                barred from every key gives 0.

        Raises:
            DitAttnError: the value is NaN or ``inf``, or something does not fit the call.
        """
        bias = span_bias(call.q, call.k, rows, keys, value, call.shard)
        self.biases += [] if bias is None else [bias]

    def multiply_scale(self, factor: float) -> None:
        """Multiply the softmax scale; factors of several methods multiply, and 1 changes nothing.

        Stock attention computes calls without a layout and a bias, also those that a method declines, at this scale.

        Args:
            factor: finite and above 0.

        Raises:
            DitAttnError: it is not.
        """
        if not 0.0 < factor < math.inf:
            raise DitAttnError(f"a factor of the softmax scale must be finite and above 0, got {factor!r}")
        self.scale_factor *= factor

    def multiply_heads(self, gate: torch.Tensor) -> None:
        """Multiply the output of every head, token by token, whichever way the call is computed; gradients flow.

        Args:
            gate: (B|1, S, H) or (B|1, 1, H), rows and heads as in ``call.q``.
        """
        self.gates.append(gate)

    def skip_heads(self, active: torch.Tensor) -> None:
        """Leave out rows of heads whose output is multiplied by 0; what they give is not defined, but finite.

        Without a layout the rows of each head are gathered, as many as the head with the most of them has. With a
        layout in the order of the sequence, query blocks without an active row have no key block. Where neither is
        possible (square masks, biases, other orders) all rows are computed.

        Args:
            active: (B, S, H) bool, rows and heads as in ``call.q``.
        """
        self.active = active if self.active is None else self.active & active

    def multiply_keys(self, call: AttentionCall, keys: TokenSet, factors: torch.Tensor, first: int = 0) -> None:
        """Multiply the part of the output that some rows get from some keys, after the softmax.

        The weights of a row no longer sum to 1 then. The part is computed in a second pass over the keys, with the
        layout and the biases of the call; rows that a method computes itself (``compute_visual``) get that of dense
        attention. Factors of 1 change nothing.

        Args:
            call: the attention call.
            keys: tokens that are attended to: a slice, or (Sk,) or (B, Sk) bool.
            factors: (B|1, n) of n consecutive rows, finite.
            first: the first of them in the sequence.

        Raises:
            DitAttnError: something does not fit the call.
        """
        batch, seq_len = call.q.shape[:2]
        if factors.ndim != 2 or factors.shape[0] not in (1, batch) or not 0 <= first <= seq_len - factors.shape[1]:
            raise DitAttnError(
                f"factors of keys must be (B|1, n) with B={batch}, for rows of {seq_len} tokens, got "
                f"{tuple(factors.shape)} from row {first} on"
            )
        mask = token_mask(keys, batch, call.k.shape[1])
        if bool(mask.any()) and bool((factors != 1).any()):
            self.key_gains.append(KeyGain(mask, factors, first))

    def record_output(self, callback: Callable[[torch.Tensor], None]) -> None:
        """Call a function with the output of this call, before a guidance method perturbs it. Changes nothing.

        Args:
            callback: gets (B, S, H, Dv), rows and heads as in ``call.q``; not to be written to.
        """
        self.recorders.append(callback)

    def change_output(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Use a function of the output as the output, whichever way the call is computed.

        Functions of several methods are applied one after another. Not to be asked for where heads are split over
        devices (``call.shard``), nor applied where a method replaces the output.

        Args:
            change: gets (B, S, H, Dv), rows and heads as in ``call.q``, not to be written to; returns the same shape.
        """
        self.changes.append(change)

    def replace_inputs(self, call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Compute with other queries, keys and values, whichever way the call is computed; ``call`` has them then too.

        Args:
            call: the attention call.
            q, k, v: of the shapes and types of ``call.q``, ``call.k`` and ``call.v``.
        """
        self.inputs = call.q, call.k, call.v = q, k, v

    def replace_output(self, value: torch.Tensor) -> None:
        """Use ``value`` as the output of this call. Nothing is computed, and other parts of the request have no effect.

        Args:
            value: (B, S, H, Dv), rows and heads as in ``call.q``, on any device and of any floating-point type.

        Raises:
            DitAttnError: another method has replaced it.
        """
        if self.replacement is not None:
            raise DitAttnError("two methods replace the output of the same attention call; enable one of them")
        self.replacement = value

    def observe(
        self,
        callback: Callable[[Observation], None],
        spans: Sequence[TokenSet] = (),
        rows: Sequence[TokenSet] = (slice(None),),
    ) -> None:
        """Measure the attention of this call after it is computed, in a second pass whose values are the spans.

        Nothing about the call changes. Memory is linear in the tokens. A call whose output is replaced is not observed;
        rows that a method computes itself (``compute_visual``) are observed as dense ones, and an epilogue is left out.

        Args:
            callback: gets the observation: log-sum-exp of every row, and its attention to every span.
            spans: spans of keys: each a slice, or (Sk,) or (B, Sk) bool.
            rows: regions of rows to take the mean over: each a slice, or (S,) or (B, S) bool.
        """
        self.probes.append(Probe(callback, tuple(spans), tuple(rows)))

    def bias(self, rows: slice) -> LogitBias | None:
        """Return the sum of the biases for some rows (start and stop given), ``None`` where none reaches them."""
        return merged_bias(self.biases, rows.start, rows.stop)

    def permute(self, call: AttentionCall, order: str, tile: Grid | None = None) -> PermutedTokens:
        """Return the tensors of ``call`` in another token order.

        Args:
            call: the attention call.
            order: one of :data:`~dit_attn.kernels.layouts.token_order.ORDERS`, or ``"none"`` (visual tokens first).
            tile: (t, h, w) tokens of a box of the order ``tiles``.
        """
        assert call.tokens is not None
        return permute_tokens(
            call.tokens, call.q[:, call.visual], call.k, call.v, self.key_mask, self.key_bias, order, tile
        )


class CallMethod(Protocol):
    """What the dispatcher needs of an enabled method; :class:`~dit_attn.processors.methods.base.Method` is one."""

    @property
    def role(self) -> str:
        """``"sparse"``, ``"guidance"``, ``"heads"`` or ``""``."""

    @property
    def min_tokens(self) -> int:
        """Shortest sequence that the method is worth."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Where the method applies, of :data:`~dit_attn.processors.core.layer.SITES`."""

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add this method's part to ``request``, or decline."""


class CallPerturbation(Protocol):
    """What the dispatcher needs of a perturbation; see :mod:`dit_attn.processors.guidance.perturbation`."""

    @property
    def row_wise(self) -> bool:
        """Whether a row's result depends on nothing but that row."""

    def apply(self, call: AttentionCall, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Return the perturbed result of a call whose plain result is ``out``; rows before ``first`` stay."""
