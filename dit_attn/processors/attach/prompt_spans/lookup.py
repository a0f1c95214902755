"""Find the tokens of a piece of the prompt in an attention call of the pipeline that is running."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dit_attn.errors import DitAttnError, shorten
from dit_attn.processors.attach.pipeline_call import running_call
from dit_attn.processors.attach.prompt_spans.encode import EncodedText, encode
from dit_attn.processors.attach.prompt_spans.pieces import Piece
from dit_attn.processors.attach.prompt_spans.text_parts import text_part_of
from dit_attn.processors.attach.run_context import declared_prompts
from dit_attn.processors.core.call import AttentionCall
from dit_attn.processors.core.run_state import RunState

_PROMPTS = {"cond": False, "perturbed": False, "uncond": True}  # branch: whether it has the negative prompt


class PromptLookup:
    """Tokens of pieces of the prompts of one transformer's run; each piece is encoded once per run."""

    def __init__(self) -> None:
        self._run: tuple[Any, ...] = ()
        self._arguments: Mapping[str, Any] = {}
        self._pipe: Any = None
        self._found: dict[tuple[bool, Piece], EncodedText | None] = {}
        self._masks: dict[tuple[Any, ...], torch.Tensor] = {}

    def forget(self) -> None:
        """Drop what was encoded."""
        self.__init__()  # type: ignore[misc]

    def find(
        self, run: RunState, model: torch.nn.Module, pipe: Any, owner: Any, call: AttentionCall, piece: Piece
    ) -> torch.Tensor:
        """Return which keys of a call are tokens of a piece, (B, Sk) bool.

        Args:
            run: the run of the call.
            model: its transformer.
            pipe: the pipeline that is running, or ``None``.
            owner: the pipeline that was given to ``enable``, or ``None``; it encodes the prompts of a loop.
            call: the attention call.
            piece: as for :meth:`AttentionCall.prompt_tokens`.

        Raises:
            DitAttnError: as for :meth:`AttentionCall.prompt_tokens`.
        """
        piece = tuple(piece) if isinstance(piece, list) else piece
        self._begin(run, model, pipe, owner)
        names, rows = _rows(run, call)
        key = (piece, names, rows, call.kind, call.k.shape[1], call.tokens, call.k.device)
        if key not in self._masks:
            self._masks[key] = self._mask(names, rows, call, piece).to(call.k.device)
        return self._masks[key]

    def prompts(
        self, run: RunState, model: torch.nn.Module, pipe: Any, owner: Any, call: AttentionCall
    ) -> tuple[str, ...]:
        """Return the prompt of every row of a call, empty for branches without the prompt; arguments as :meth:`find`.

        Raises:
            DitAttnError: as for :meth:`AttentionCall.prompts`.
        """
        self._begin(run, model, pipe, owner)
        given = self._arguments.get("prompt")
        texts = [given] if isinstance(given, str) else list(given or ())
        if not texts:
            raise DitAttnError("the pipeline was given no prompt; its words are not known from embeddings")
        names, rows = _rows(run, call)
        found = []
        for row in rows:
            group = [at for at, name in enumerate(names) if name == names[row]]
            conditional = _PROMPTS.get(names[row], True) is False
            found.append(texts[group.index(row) * len(texts) // len(group)] if conditional else "")
        return tuple(found)

    def _mask(self, names: tuple[str, ...], rows: tuple[int, ...], call: AttentionCall, piece: Piece) -> torch.Tensor:
        out = torch.zeros(len(rows), call.k.shape[1], dtype=torch.bool)
        encoded = {negative: self._encoded(piece, negative) for negative in (False, True)}
        if not any(encoded.values()):
            raise DitAttnError(f"the piece {shorten(piece)} is in no prompt of this run")
        for branch in dict.fromkeys(names):
            text = encoded.get(_PROMPTS[branch]) if branch in _PROMPTS else None
            if text is None:
                continue
            group = [row for row, name in enumerate(names) if name == branch]
            kept = [(at, group.index(row)) for at, row in enumerate(rows) if row in group]
            if kept:
                at, own = (torch.tensor(index) for index in zip(*kept))
                out[at] = self._placed(call, text, len(group))[own]
        return out

    def _begin(self, run: RunState, model: torch.nn.Module, pipe: Any, owner: Any) -> None:
        declared = declared_prompts(model)
        key = (run.clock.run, id(pipe), repr(declared))
        if key == self._run:
            return
        arguments = declared if declared is not None else _running_arguments(pipe)
        self.forget()
        self._run, self._arguments, self._pipe = key, arguments, pipe if pipe is not None else owner
        if self._pipe is None:
            raise DitAttnError("the prompts cannot be encoded without the pipeline: give the pipeline to enable")

    def _encoded(self, piece: Piece, negative: bool) -> EncodedText | None:
        """Where the tokens of a piece stand in the text part, ``None`` where no prompt of the branch has it."""
        key = (negative, piece)
        if key not in self._found:
            ours = self._arguments.get("negative_prompt" if negative else "prompt")
            lacking = negative and (ours is None or not isinstance(piece, str))
            self._found[key] = None if lacking else encode(self._pipe, self._arguments, [piece], negative)
        found = self._found[key]
        if found is not None and not any(mark in found.marks for each in found.pieces for mark in each.marks):
            raise DitAttnError(f"the prompt is cut off before the piece {shorten(piece)}; shorten it")
        return found

    def _placed(self, call: AttentionCall, text: EncodedText, rows: int) -> torch.Tensor:
        """Which keys the piece is in the rows of a branch, (rows, Sk) bool."""
        out = torch.zeros(rows, call.k.shape[1], dtype=torch.bool)
        start, length = _text_span(call)
        if not length:
            return out
        if rows % len(text.marks):
            raise DitAttnError(f"{rows} rows of a branch do not divide into {len(text.marks)} encoded prompts")
        repeats = rows // len(text.marks)
        wanted = [mark for each in text.pieces for mark in each.marks]
        chosen, used = (x.repeat_interleave(repeats, 0) for x in (text.places(wanted), text.marks.any(-1)))
        lead = text.part.lead(self._pipe, self._arguments, used, length)
        room = length - lead
        if (room > chosen.shape[1] and not text.part.tail) or bool(used[:, max(room, 0) :].any()) or lead < 0:
            raise DitAttnError(
                f"{call.layer.name} has {length} tokens of text, and the pipeline encodes {chosen.shape[1]}: something "
                "else, such as an adapter, adds some"
            )
        width = min(room, chosen.shape[1])
        out[:, start + lead : start + lead + width] = chosen[:, :width]
        return out


def _rows(run: RunState, call: AttentionCall) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The branch of every row of the model's batch, and the rows of the call among them."""
    names = run.rows_by_branch()
    return names, tuple((call.layer.rows[0] + row) % len(names) for row in range(call.q.shape[0]))


def _running_arguments(pipe: Any) -> Mapping[str, Any]:
    """The arguments of the pipeline's call that is running, as ``encode_prompt`` got them."""
    part = text_part_of(pipe)
    call = running_call(pipe, tuple(part.variables.values()))
    if not call:
        raise DitAttnError(
            "no pipeline is running, so the prompts are not known; in a loop of your own give "
            "run_context(..., prompt=...)"
        )
    if part.overwrites_lists and isinstance(call.get("prompt"), list):
        raise DitAttnError(
            f"{type(pipe).__name__} changes the list of prompts that it is given; give one prompt a call"
        )
    return {**call, **{name: call.get(variable) for name, variable in part.variables.items()}}


def _text_span(call: AttentionCall) -> tuple[int, int]:
    """Start and number of the keys that are text: all of cross attention to the text, none of that to an image."""
    if call.kind != "self":
        return 0, call.k.shape[1] if call.kind == "cross" else 0
    if call.tokens is None:
        raise DitAttnError(f"the parts of the sequence of {call.layer.name} are not known")
    text = [span for span in call.tokens.spans if span.kind == "text"]
    return (text[0].start, text[0].length or 0) if text else (0, 0)
