"""Run the twin pass that a method asks for: one more pass through the transformer, before the plain one of a step.

The method tells the passes apart by ``call.pass_name``; what it stores in the twin pass waits for the plain one in
``call.layer.state_of("twin")``. The pass gets the arguments of the plain call, and its result is dropped.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from dit_attn.processors.attach import batch, compat, key_cache, perturbed_pass, step_cache
from dit_attn.processors.attach.step_cache import ModuleState

if TYPE_CHECKING:
    from dit_attn.processors.attach.transformer_run import TransformerRun
    from dit_attn.processors.methods.base import Method


class TwinRunner:
    """Runs the twin passes of a method on one transformer.

    Args:
        method: the method that asks for them.
        session: the run.

    Attributes:
        evaluations: twin passes of the run.
        reused_blocks: blocks of plain passes that were not computed again.
    """

    def __init__(self, method: Method, session: TransformerRun) -> None:
        self.method, self.session = method, session
        layers = session.stack_layers
        self.blocks = perturbed_pass.block_order(session.model, layers) if layers else []
        self._layers = layers
        every = [layer for layer in session.layers if layer.kind == "self"]
        self._reusable = len(every) == len(layers)  # a side branch adds to the blocks, and may differ
        self._run = 0
        self.evaluations = self.reused_blocks = 0
        self._reuse = ExitStack()  # what replaces blocks of the plain pass

    def copy_for(self, session: TransformerRun) -> TwinRunner:
        """Return the runner of a copied transformer, whose blocks need not be there yet."""
        runner = copy.copy(self)
        runner.session, runner._run, runner._reuse = session, 0, ExitStack()
        return runner

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the twin pass of a call of the transformer that is about to start, where the method asks for one."""
        session, clock = self.session, self.session.clock
        if self._run != clock.run:
            self._run, self.evaluations, self.reused_blocks = clock.run, 0, 0
        self.release()
        branches = session.rows_by_branch()
        spans = session.layout.spans if session.layout else ()
        grids = [span.grid for span in spans if span.visual and span.length is not None] or [None]
        twin = self.method.twin(clock, branches) if len(grids) == 1 and self.method.twin_at(grids[0]) else None
        if twin is None:
            return
        index = [row for row, name in enumerate(branches) if not twin.branches or name in twin.branches]
        if not index:
            return
        model, given = session.model, (args, kwargs)
        prefix = None
        if len(index) < len(branches):
            given = ((), batch.take_call(model, args, kwargs, index, len(branches), session.family.batch_axes))
        elif self._reusable:
            prefix = perturbed_pass.shareable_prefix(session, self.blocks, self._first_block(twin.first_layer), kwargs)
        if prefix is not None:
            prefix.record()
        if key_cache.is_used(named := batch.by_name(model, *given)):
            given = (), key_cache.with_copies(named)
        foreign = not step_cache.is_cached(model) and step_cache.has_foreign_forward(model)
        try:
            with ExitStack() as stack:
                stack.enter_context(session.in_pass("twin", [branches[row] for row in index]))
                stack.enter_context(compat.without_caches(model))
                state = ModuleState(model) if foreign else None
                forward = stack.enter_context(step_cache.uncached_forward(model, module.forward, state))
                forward(*given[0], **given[1])
            self.evaluations += 1
            if prefix is not None and prefix.inputs is not None:
                replaced = prefix.replacements(index, len(branches), {})
                self._reuse.enter_context(perturbed_pass.replaced_forwards(replaced))
                self.reused_blocks += prefix.saved
        finally:
            if prefix is not None:
                prefix.clear()

    def release(self) -> None:
        """Let the blocks of the transformer run again; called after every plain pass, also one that failed."""
        self._reuse.close()

    def _first_block(self, layer: int) -> int:
        """Position of the block with a layer, by its index among the self-attention layers."""
        if not 0 < layer < len(self._layers):
            return 0
        return self.blocks.index(perturbed_pass.block_of(self._layers[layer]))
