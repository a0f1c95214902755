"""Run the conditional rows of a transformer call once more with the text of a negative prompt, in the same call.

A hook before the transformer's forward appends the rows, which are of the branch ``"negative"``; one behind it drops
their predictions. What the method makes of them, it does in the attention calls.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach import batch, key_cache, step_cache
from dit_attn.processors.attach.families import Axis
from dit_attn.processors.attach.negative_prompt import negative_arguments

if TYPE_CHECKING:
    from dit_attn.processors.attach.transformer_run import TransformerRun
    from dit_attn.processors.methods.base import Method

_STATES = (
    "encoder_hidden_states",
    "encoder_hidden_states_2",
    "encoder_hidden_states_t5",
    "encoder_hidden_states_llama3",
    "text_encoder_layers",
    "audio_encoder_hidden_states",
    "text_bth",
    "cap_feats",
)
_TEXT_MASKS = (
    "encoder_attention_mask",
    "encoder_attention_mask_2",
    "encoder_hidden_states_mask",
    "encoder_mask",
    "text_embedding_mask",
    "text_embedding_mask_t5",
    "audio_encoder_attention_mask",
)
_MASKS = (*_TEXT_MASKS, "attention_mask", "text_lens")
_OTHERS = ("pooled_projections", "pooled_embeds", "txt_ids", "text_rope_pos")
TEXT_ARGUMENTS = (*_STATES, *_MASKS, *_OTHERS)
"""Forward arguments of all families that depend on the prompt alone."""


class NegativeText:
    """Appends the rows with a negative prompt to the calls of one transformer.

    Args:
        method: the method that asks for them.
        session: the run.
    """

    def __init__(self, method: Method, session: TransformerRun) -> None:
        self.method, self.session = method, session
        taken = inspect.signature(type(session.model).forward).parameters
        self._mask = next((mask for mask in _TEXT_MASKS if mask in taken), None)
        self._key: Hashable = None
        self._text: Mapping[str, Any] = {}
        self._runs = (0, False)  # run, and whether its last call had the rows

    def copy_for(self, session: TransformerRun) -> NegativeText:
        """Return that of a copied transformer."""
        new = copy.copy(self)
        new.session, new._key, new._text = session, None, {}
        return new

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Append the rows to a call of the transformer; return its other arguments, or ``None``."""
        session, model = self.session, self.session.model
        branches = session.rows_by_branch()
        index = [row for row, name in enumerate(branches) if name == "cond"]
        loss = model.training and torch.is_grad_enabled()  # is on the plain predictions
        if loss or not index or session.branch_doubt is not None:
            return None
        runs, before = self.method.runs_negative(session.clock), self._runs
        self._runs = (session.clock.run, runs)
        cached = step_cache.is_cached(model) or step_cache.has_foreign_forward(module)
        if cached and before == (session.clock.run, not runs):
            raise DitAttnError(f"{self.method.slug} with a step cache must guide every step; leave out start and stop")
        if not runs:
            return None
        if torch.is_grad_enabled() and getattr(model, "gradient_checkpointing", False):
            raise DitAttnError(
                f"{self.method.slug} cannot be combined with gradient checkpointing; call "
                "disable_gradient_checkpointing(), or run under torch.no_grad()"
            )
        if key_cache.is_used(kwargs):
            raise DitAttnError(
                f"{self.method.slug}: {type(model).__name__} attends to keys of an earlier step, of which the negative "
                "prompt has none; use a pipeline or a call without the cache of keys"
            )
        rows, axes = len(branches), session.family.batch_axes
        text = self._find_text(rows, index)
        plain = batch.by_name(model, args, kwargs)
        wanted = batch.take_call(model, args, kwargs, [*range(rows), *index], rows, axes)
        new = wanted | self._joined(plain, text, rows, index)
        session.append_negative(len(index))
        try:
            values = session.family.shown({**dict.fromkeys(session.family.forward_args), **new})
            session.set_layout(session.family.layout(model.config, values))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DitAttnError(
                f"{self.method.slug}: {type(model).__name__} cannot run the prompt and the negative prompt in one "
                f"batch: {error}; give them the same number of tokens"
            ) from error
        return (), new

    def after(self, output: Any) -> Any:
        """Return the output of a call of the transformer without the appended rows."""
        session = self.session
        if not session.negative_rows:
            return output
        session.drop_negative()
        rows = len(session.rows_by_branch())
        return batch.replace_leaves(output, [leaf[:rows] for leaf in batch.leaves(output)])

    def _find_text(self, rows: int, index: list[int]) -> Mapping[str, Any]:
        """The text arguments of the negative prompt, for as many rows as the call has conditional ones."""
        session = self.session
        given = session.given.get(self.method.slug)
        key = (session.clock.run, rows, id(given))
        if key == self._key:
            return self._text
        if given is not None:
            found = batch.take_call(session.model, (), given, index, rows, session.family.batch_axes)
        elif session.pipe is None:
            raise DitAttnError(
                f"{self.method.slug}: no pipeline is running that encodes the negative prompt; give its embeddings: "
                f"session.given['{self.method.slug}'] = {{'encoder_hidden_states': ...}}"
            )
        else:
            found = negative_arguments(session.pipe, self.method.negative_prompt, session.cfg, len(index))
        self._key, self._text = key, {name: found[name] for name in TEXT_ARGUMENTS if found.get(name) is not None}
        return self._text

    def _joined(self, plain: dict[str, Any], text: Mapping[str, Any], rows: int, index: list[int]) -> dict[str, Any]:
        """The text arguments of a call with the negative rows behind its own, padded to one length."""
        axes, new = self.session.family.batch_axes, {}
        lengths: set[tuple[int, int]] = set()
        plain, text = _with_masks(plain, text), _with_masks(text, plain)
        for name, negative in text.items():
            if plain.get(name) is not None:
                new[name] = _join(plain[name], negative, rows, len(index), axes.get(name, 0), lengths)
        masked = any(name in new for name in _MASKS)
        if lengths and not masked and self._mask is not None:
            new[self._mask] = self._new_mask(lengths, rows, len(index), new)
        elif lengths and not masked:
            (own, other), *_ = lengths
            raise DitAttnError(
                f"{self.method.slug}: {type(self.session.model).__name__} takes no mask of its text; the prompt has "
                f"{own} tokens and the negative prompt {other}; give them the same number"
            )
        return new

    def _new_mask(self, lengths: set[tuple[int, int]], rows: int, more: int, new: dict[str, Any]) -> torch.Tensor:
        """(rows + more, S) bool: the tokens that are no padding, where no mask was given."""
        (own, other), *_ = lengths
        device = next(x.device for x in new.values() if isinstance(x, torch.Tensor))
        place = torch.arange(max(own, other), device=device)
        return place < torch.tensor([own] * rows + [other] * more, device=device)[:, None]


def _with_masks(arguments: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of one text with the masks that only the other was given: nothing of it is padding."""
    found = dict(arguments)
    for name in _MASKS:
        mask = others.get(name)
        if found.get(name) is not None or not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            continue
        states = [s for s in _STATES if all(isinstance(side.get(s), torch.Tensor) for side in (found, others))]
        state = next((s for s in states if others[s].shape[:2] == mask.shape), None)
        if state is not None:
            found[name] = mask.new_ones(found[state].shape[:2])
    return found


def _join(plain: Any, negative: Any, rows: int, more: int, axis: Axis, lengths: set[tuple[int, int]]) -> Any:
    """Return an argument with the values of ``more`` negative rows behind those of ``rows`` plain ones."""
    if axis == "list" and isinstance(plain, list):
        return [*plain, *(negative * more if len(negative) == 1 else negative)]
    if isinstance(plain, (list, tuple)):
        return type(plain)(_join(a, b, rows, more, axis, lengths) for a, b in zip(plain, negative, strict=True))
    negative = negative.to(plain.device, plain.dtype)
    if axis is None or plain.shape[0 if axis == "list" else axis] != rows:  # positions that all rows share
        return plain if plain.numel() >= negative.numel() else negative
    at = axis if isinstance(axis, int) else 0
    if negative.shape[at] not in (1, more):
        raise DitAttnError(
            f"nag: the negative text is of {negative.shape[at]} samples, the prompt of {more}; give one or {more}"
        )
    if negative.shape[at] == 1:
        negative = negative.expand(*negative.shape[:at], more, *negative.shape[at + 1 :])
    sizes = {d: (plain.shape[d], negative.shape[d]) for d in range(plain.ndim) if d != at}
    for d, (own, other) in sizes.items():
        if own != other:
            lengths.add((own, other))
            plain, negative = (_padded(x, d, max(own, other)) for x in (plain, negative))
    return torch.cat([plain, negative], at)


def _padded(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, size - x.shape[axis]))
