"""Run the perturbed pass of a guidance method and add its update to the predictions of a stock pipeline.

A hook behind the transformer's forward runs the model a second time over the conditional rows and adds
``D = w (c - p)`` to the predictions. Guidance rules are affine combinations of the branches whose coefficients add up
to 1, so an update that is added to all branches of a step passes through any of them unchanged: no scale is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach import batch, compat, key_cache, perturbed_pass, step_cache
from dit_attn.processors.attach.batch import Leaf
from dit_attn.processors.attach.guidance_delta import GuidanceDelta, StepHook, added, each, scaled, take_rows
from dit_attn.processors.attach.guidance_strength import GuidanceStrength, StrengthLog
from dit_attn.processors.attach.guider_context import guider_scale
from dit_attn.processors.attach.perturbed_pass import Prefix
from dit_attn.processors.attach.step_cache import LayerCalls, ModuleState
from dit_attn.processors.guidance.perturbation import wide

if TYPE_CHECKING:
    from dit_attn.processors.attach.transformer_run import TransformerRun
    from dit_attn.processors.methods.perturbed_guidance import PerturbedGuidance

_CONTEXT = "dit_attn_perturbed"


class HasForward(Protocol):
    """What a guider needs of the object whose call it stands behind: a transformer, or its compiled call."""

    forward: Callable[..., Any]


class PerturbedGuider:
    """Run state of a guidance method on one transformer.

    Args:
        method: the guidance method.
        session: the run it guides.

    Raises:
        DitAttnError: the method names a layer, head or block the transformer does not have.
    """

    def __init__(self, method: PerturbedGuidance, session: TransformerRun) -> None:
        self.method, self.session = method, session
        model = session.model
        layers = {name: session.heads_of(name) for name in session.stack_layers}
        self.blocks = perturbed_pass.block_order(model, list(layers))
        self.plan = method.perturbation(layers, self.blocks)
        for name in self.plan.skipped:
            perturbed_pass.skip_forward(model.get_submodule(name))
        self.handle: Any = None  # of the hook behind the transformer
        self.outside = False  # whether the transformer is compiled in place, and the guider runs behind its graph
        self.prefix: Prefix | None = None
        self._step_hook: StepHook | None = None
        self._plain = LayerCalls(session.layers)  # of the pass that runs, or ran last
        self._state: ModuleState | None = None  # before the plain pass of a step that needs a perturbed one
        self.begin_run()

    def copy_for(self, session: TransformerRun) -> PerturbedGuider:
        """Return the guider of a copied transformer, whose blocks need not be there yet."""
        guider = copy.copy(self)
        guider.session, guider.handle, guider.prefix, guider._step_hook = session, None, None, None
        guider.outside = False  # copies of a compiled model are not compiled
        guider.begin_run()
        return guider

    def begin_run(self) -> None:
        """Drop the state of the last run, which may have been interrupted in the middle of a step."""
        self._updates: dict[Hashable, GuidanceDelta] = {}  # by window
        self.drop_state()
        self.evaluations = 0
        self.reused_blocks = 0
        self.training_calls = 0  # forward calls with gradients in training mode, which are not guided
        self.run = self.session.clock.run
        self.cached_passes = 0  # plain passes of guided steps that a step cache answered
        self._log = StrengthLog()
        self._appended = 0

    @property
    def update(self) -> GuidanceDelta | None:
        """Last update of the window that the current call is for, ``None`` before the first."""
        return self._updates.get(self.session.window)

    @property
    def first_block(self) -> int:
        """Position of the first block whose result differs in the perturbed pass; 0 where no block can be reused."""
        if self.plan.empty or not self.session.family.block_chain:
            return 0
        return perturbed_pass.first_block(self.blocks, list(self.plan.strengths), self.plan.skipped)

    @property
    def strength(self) -> GuidanceStrength:
        """Strength measured over the guided steps of the run (reads back from the device)."""
        return self._log.strength

    @property
    def unmoved_steps(self) -> int:
        """Guided steps of the run whose update was exactly 0 (reads back from the device)."""
        return self._log.unmoved

    def begin_pass(self) -> None:
        """Note that a plain pass begins, also inside a compiled transformer."""
        self._plain, self._state = LayerCalls(self.session.layers), None

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prepare a call of the transformer; return other arguments for it, or ``None``."""
        if self.session.perturbed is not None:
            return None
        if self.run != self.session.clock.run:
            self.begin_run()
        if self._training:
            return None
        if torch.is_grad_enabled() and getattr(self.session.model, "gradient_checkpointing", False):
            raise DitAttnError(
                f"{self.method.slug} cannot be combined with gradient checkpointing outside training mode; call "
                "disable_gradient_checkpointing(), train(), or run under torch.no_grad()"
            )
        if getattr(self.session.pipe, "do_perturbed_attention_guidance", False):
            raise DitAttnError(
                f"{type(self.session.pipe).__name__} runs a perturbed branch of its own; call it with pag_scale=0, or "
                "use the pipeline without PAG"
            )
        branches = self.session.rows_by_branch()
        self._appended = 0
        self._drop_prefix()
        if "cond" not in branches or not self._needs_pass():
            return None
        foreign = not step_cache.is_cached(module) and step_cache.has_foreign_forward(module)
        apart = foreign or self.session.family.single or step_cache.is_cached(module) or key_cache.is_used(kwargs)
        if self.method.batched and not apart:
            return self._append(module, args, kwargs, branches)
        self._state = ModuleState(module) if foreign else None
        self.prefix = self._shareable(kwargs)
        if self.prefix is not None:
            self.prefix.record()
        return None

    def after(self, module: HasForward, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Guide after a call of the transformer; return the output the pipeline gets."""
        session = self.session
        if (session.perturbed is not None and not self._appended) or not session.is_step:
            return output
        if self.run != session.clock.run:
            self.begin_run()
        if self._training:
            self.training_calls += 1
            return output
        branches = session.rows_by_branch()
        if self._appended:
            output = self._split(output, branches)
            branches = branches[: -self._appended]
            session.drop_perturbed()
            self._appended = 0
        elif "cond" in branches and self._needs_pass():
            if self._plain.answered and not step_cache.is_cached(session.model):
                self.cached_passes += 1  # c of an earlier step: the last update stays
            else:
                self._evaluate(module, args, kwargs, output, branches)
        update, clock = self.update, session.clock
        weight = self.method.weight(clock.progress)
        if update is None or update.run != clock.run or not weight or self.plan.empty or self._stopped:
            return output
        if "cond" not in branches and update.step != clock.step:
            return output  # the branch came before its conditional one
        if "cond" in branches:
            update.step, update.weight = clock.step, weight
            update.cond = [take_rows(leaf, _index(branches)) for leaf in batch.leaves(output)]
        self._log.add(update, output, branches, getattr(session.model.config, "in_channels", None) or 0)
        return self._inject(update, output, branches)

    def drop_state(self) -> None:
        """Free the updates and what the next perturbed pass would reuse, and restore the scheduler's own step."""
        self._drop_prefix()
        self._remove_step_hook()
        self._updates, self._state = {}, None

    def release(self) -> None:
        """Drop the state of the run and the hook behind the transformer."""
        self.drop_state()
        if self.handle is not None:
            self.handle.remove()
        self.handle = None

    @property
    def _training(self) -> bool:
        """Whether a loss may follow, which is on the plain predictions: guidance stands aside."""
        return self.session.model.training and torch.is_grad_enabled()

    def _drop_prefix(self) -> None:
        """Remove the hooks on the blocks; a pass that failed leaves them there."""
        if self.prefix is not None:
            self.prefix.clear()
        self.prefix = None

    def _remove_step_hook(self) -> None:
        """Remove the hook on the scheduler; a run that failed leaves it there."""
        if self._step_hook is not None:
            self._step_hook.remove()
        self._step_hook = None

    @property
    def _stopped(self) -> bool:
        """Whether the branch of a call is not certain; an update on a wrong one would change the result silently."""
        return self.session.doubt is not None or self.session.branch_doubt is not None

    def _needs_pass(self) -> bool:
        """Whether this step needs a perturbed pass."""
        clock = self.session.clock
        if self.plan.empty or self._stopped or not self.method.weight(clock.progress):
            return False
        last = self.update
        return last is None or last.run != clock.run or clock.step - last.evaluated >= self.method.interval

    def _evaluate(
        self, module: HasForward, args: Any, kwargs: dict[str, Any], output: Any, branches: Sequence[str]
    ) -> None:
        """Run the perturbed pass and store ``c - p``."""
        session, index = self.session, _index(branches)
        model: Any = session.model
        rows = len(branches)
        if len(index) < rows:
            args, kwargs = (), batch.take_call(model, args, kwargs, index, rows, session.family.batch_axes)
        if key_cache.is_used(named := batch.by_name(model, args, kwargs)):
            args, kwargs = (), key_cache.with_copies(named)
        replaced = {block: perturbed_pass.skip_forward(block) for block in map(model.get_submodule, self.plan.skipped)}
        left_out = set(self.plan.skipped)
        if self.prefix is not None and self.prefix.inputs is not None:
            replaced.update(self.prefix.replacements(index, rows, replaced))
            self.reused_blocks += self.prefix.saved
            left_out.update(self.blocks[: self.prefix.saved])
            self.prefix.clear()
        expected, calls = self._plain.called, LayerCalls(session.layers)
        with ExitStack() as stack:
            stack.enter_context(session.perturbing(self.plan, len(index)))
            stack.enter_context(perturbed_pass.replaced_forwards(replaced))
            if step_cache.is_cached(model):
                stack.enter_context(compat.without_caches(model, shared_only=True))
                stack.enter_context(compat.inner_cache_context(model, _CONTEXT))
            forward = stack.enter_context(step_cache.uncached_forward(model, module.forward, self._state))
            perturbed = forward(*args, **kwargs)
        expected = {name for name in expected if perturbed_pass.block_of(name) not in left_out}
        if not (expected <= calls.called or step_cache.is_cached(model)):
            raise DitAttnError(
                f"a step cache answered the perturbed pass of {self.method.slug}; it keeps its state where dit_attn "
                "cannot see it: disable the cache, or the method"
            )
        self._store([take_rows(leaf, index) for leaf in batch.leaves(output)], batch.leaves(perturbed))

    def _store(self, cond: list[Leaf], perturbed: list[Leaf]) -> None:
        clock = self.session.clock
        delta = [each(lambda c, p: wide(c) - wide(p), c, p) for c, p in zip(cond, perturbed, strict=True)]
        self._updates[self.session.window] = GuidanceDelta(clock.run, clock.step, 0.0, delta, cond, clock.step)
        self.evaluations += 1

    def _append(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], branches: Sequence[str]) -> Any:
        """Return the arguments with the conditional rows appended once more."""
        session, index, rows = self.session, _index(branches), len(branches)
        self._appended = len(index)
        session.append_perturbed(self.plan, len(index))
        wanted = [*range(rows), *index]
        return (), batch.take_call(session.model, args, kwargs, wanted, rows, session.family.batch_axes)

    def _split(self, output: Any, branches: Sequence[str]) -> Any:
        """Return the output without the appended rows, which become the update."""
        rows = len(branches) - self._appended
        plain: list[Leaf] = [leaf[:rows] for leaf in batch.leaves(output)]
        perturbed: list[Leaf] = [leaf[rows:] for leaf in batch.leaves(output)]
        self._store([take_rows(leaf, _index(branches[:rows])) for leaf in plain], perturbed)
        return batch.replace_leaves(output, plain)

    def _shareable(self, kwargs: dict[str, Any]) -> Prefix | None:
        """Return the blocks before the first perturbed one, where the pass can reuse them."""
        if not self.method.share_prefix:
            return None
        return perturbed_pass.shareable_prefix(self.session, self.blocks, self.first_block, kwargs)

    def _inject(self, update: GuidanceDelta, output: Any, branches: Sequence[str]) -> Any:
        mode = self._injection()
        if mode == "shift":
            return added(output, update, update.weight, range(len(branches)))
        if "cond" not in branches:
            return output
        if mode == "cond":
            return added(output, update, update.weight / _guidance_scale(self.session, branches), _index(branches))
        session = self.session
        scheduler = getattr(session.pipe, "scheduler", None)
        if scheduler is None:
            raise DitAttnError("inject='step' needs a pipeline that runs the transformer; in a loop use inject='shift'")
        self._remove_step_hook()
        sign = -1.0 if session.cfg.negated else 1.0
        delta = update.delta[0]
        first = _first_made(session, delta.shape[1]) if isinstance(delta, torch.Tensor) and delta.ndim == 3 else 0
        self._step_hook = StepHook(scheduler, scaled(delta, sign * update.weight), first)
        scheduler.__dict__["step"] = self._step_hook
        return output

    def _injection(self) -> str:
        if self.method.inject != "auto":
            return self.method.inject
        guider = getattr(self.session.pipe, "guider", None)
        session = self.session
        rescales = session.cfg.rescaled or session.pipeline_call.rescaled
        rescales = rescales or type(guider).__name__ not in _LINEAR_GUIDERS
        return "step" if rescales and session.pipe is not None else "shift"


# Guider objects of pipelines that have one, as far as their rule is affine.
_LINEAR_GUIDERS = ("NoneType", "ClassifierFreeGuidance", "AutoGuidance", "SkipLayerGuidance")


def _first_made(session: TransformerRun, length: int) -> int:
    """Return the first token that is made of the ``length`` ones that a model predicts."""
    tokens = session.tokens(length)
    return next((span.start for span in tokens.spans if span.kind in ("video", "image")), 0) if tokens else 0


def _index(branches: Sequence[str]) -> list[int]:
    return [row for row, name in enumerate(branches) if name == "cond"]


def _guidance_scale(session: TransformerRun, branches: Sequence[str]) -> float:
    """Return the scale of classifier-free guidance of the pipeline's call, 1 where it runs without.

    Raises:
        DitAttnError: it does not say.
    """
    told = guider_scale(session.pipe)
    if told is not None:
        return told
    rule, scale = session.cfg, session.guidance_scale()
    dropped = bool(rule.argument) and not session.pipeline_call.given  # requested, but without a negative prompt to run
    off = bool(session.pipeline_call.fixed) and session.branch_count(len(branches)) == 1  # by a callback
    if "uncond" not in branches and (rule.style == "batched" or dropped or off):
        return 1.0
    if session.pipeline_call.bent_by:
        raise DitAttnError(
            f"inject='cond' divides by the guidance scale, and with {session.pipeline_call.bent_by} a step has "
            f"another one than {type(session.pipe).__name__} says; use inject='shift'"
        )
    if scale is None:
        raise DitAttnError(
            f"{type(session.pipe).__name__} does not say its guidance scale, which inject='cond' divides by; "
            "use inject='shift'"
        )
    return scale
