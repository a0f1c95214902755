"""The perturbed pass of a guidance method, and how its push gets into a stock pipeline.

A hook behind the transformer's forward runs the model a second time over the conditional rows and adds
``D = w (c - p)`` to the predictions. Guidance rules are affine combinations of the branches whose coefficients add up
to 1, so a push that all branches of a step share comes out of any of them unchanged: no scale has to be known.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach import batch, compat, perturbed_pass
from dit_attn.processors.attach.batch import Leaf
from dit_attn.processors.attach.guidance_delta import GuidanceDelta, StepTap, added, each, flat, scaled, take_rows
from dit_attn.processors.attach.perturbed_pass import Prefix
from dit_attn.processors.guidance.perturbation import wide

if TYPE_CHECKING:
    from dit_attn.processors.attach.transformer_run import TransformerRun
    from dit_attn.processors.methods.perturbed_guidance import PerturbedGuidance

_CONTEXT = "dit_attn_perturbed"
_RESIDUALS = ("controlnet", "control")  # arguments that are added between blocks


@dataclass
class Strength:
    """How strong the guidance of a run was, measured against the direction of classifier-free guidance.

    Attributes:
        steps: guided steps measured.
        parallel: by step, the part of the push along ``c - u``, in units of it: what it adds to the guidance scale.
        sideways: by step, the rest, in units of ``|c - u|``.
        relative: by step, ``|D| / |c|``.
    """

    parallel: list[float] = field(default_factory=list)
    sideways: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.relative)


class PerturbedGuider:
    """Run state of a guidance method on one transformer."""

    def __init__(self, method: PerturbedGuidance, session: TransformerRun) -> None:
        """Raises: DitAttnError: the method names a layer, head or block the transformer does not have."""
        self.method, self.session = method, session
        model = session.model
        layers = {layer.name: head_count(model.get_submodule(layer.name)) for layer in session.layers}
        self.blocks = perturbed_pass.block_order(model, list(layers))
        self.plan = method.perturbation(layers, self.blocks)
        for name in self.plan.skipped:
            perturbed_pass.passing(model.get_submodule(name))
        self.handle: Any = None  # of the hook behind the transformer
        self.prefix: Prefix | None = None
        self.forget()

    def forget(self) -> None:
        """A new run begins, perhaps after one that was broken off in the middle of a step."""
        self._unwatch()
        self._untap()
        self.push: GuidanceDelta | None = None
        self.evaluations = 0
        self.saved_blocks = 0
        self.run = self.session.clock.run
        self._measured: list[tuple[torch.Tensor, ...]] = []
        self._appended = 0

    @property
    def first_block(self) -> int:
        """Position of the first block whose result differs in the perturbed pass; 0 where none can be taken over."""
        if self.plan.empty or not self.session.family.block_chain:
            return 0
        return perturbed_pass.first_block(self.blocks, list(self.plan.strengths), self.plan.skipped)

    @property
    def strength(self) -> Strength:
        """What the guided steps of the run measured (reads back from the device)."""
        result = Strength()
        for push, cond, *against in self._measured:
            result.relative.append(float((push / cond.clamp(min=1e-30)).sqrt()))
            if against:
                along, guide = (float(value) for value in against)
                if guide > 0:
                    result.parallel.append(along / guide)
                    result.sideways.append((max(0.0, float(push) - along**2 / guide) / guide) ** 0.5)
        return result

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ahead of a call of the transformer: other arguments for it, or ``None``."""
        if self.session.perturbed is not None:
            return None
        if self.run != self.session.clock.run:
            self.forget()
        if getattr(self.session.pipe, "do_perturbed_attention_guidance", False):
            raise DitAttnError(
                f"{type(self.session.pipe).__name__} runs a perturbed branch of its own; call it with pag_scale=0, or "
                "use the pipeline without PAG"
            )
        branches = self.session.rows_by_branch()
        self._appended = 0
        self._unwatch()
        if "cond" not in branches or not self._due():
            return None
        if self.method.batched and not _cached(module):
            return self._append(module, args, kwargs, branches)
        self.prefix = self._shareable(kwargs)
        if self.prefix is not None:
            self.prefix.watch()
        return None

    def after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Behind a call of the transformer: the output the pipeline gets."""
        session = self.session
        if session.perturbed is not None and not self._appended:
            return output
        if self.run != session.clock.run:
            self.forget()
        branches = session.rows_by_branch()
        if self._appended:
            output = self._split(output, branches)
            branches = branches[: -self._appended]
            session.drop_perturbed()
            self._appended = 0
        elif "cond" in branches and self._due():
            self._evaluate(module, args, kwargs, output, branches)
        push, clock = self.push, session.clock
        weight = self.method.weight(clock.progress)
        if push is None or push.run != clock.run or not weight or self.plan.empty:
            return output
        if "cond" not in branches and push.step != clock.step:
            return output  # the branch came before its conditional one
        if "cond" in branches:
            push.step, push.weight = clock.step, weight
            push.cond = [take_rows(leaf, _index(branches)) for leaf in batch.leaves(output)]
        self._measure(push, output, branches)
        return self._inject(push, output, branches)

    def release(self) -> None:
        """Drop what is held of the run; the scheduler gets its own step back."""
        self._unwatch()
        self._untap()
        if self.handle is not None:
            self.handle.remove()
        self.push = self.handle = None

    def _unwatch(self) -> None:
        """Take away what watches the blocks; a pass that failed leaves it there."""
        if self.prefix is not None:
            self.prefix.forget()
        self.prefix = None

    def _untap(self) -> None:
        """Take away what waits for the scheduler; a run that failed leaves it there."""
        step = getattr(getattr(self.session.pipe, "scheduler", None), "__dict__", {}).get("step")
        if isinstance(step, StepTap):
            step.remove()

    def _due(self) -> bool:
        """Whether this step needs a perturbed pass."""
        clock = self.session.clock
        if self.plan.empty or not self.method.weight(clock.progress):
            return False
        last = self.push
        return last is None or last.run != clock.run or (clock.step - self._evaluated) % self.method.interval == 0

    def _evaluate(
        self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any, branches: Sequence[str]
    ) -> None:
        """Run the perturbed pass and keep ``c - p``."""
        session, index = self.session, _index(branches)
        model: Any = session.model
        rows = len(branches)
        if len(index) < rows:
            args, kwargs = (), batch.take_call(model, args, kwargs, index, rows, session.family.batch_axes)
        skipped = [model.get_submodule(name) for name in self.plan.skipped]
        replaced = {block: perturbed_pass.passing(block) for block in skipped}
        if self.prefix is not None and self.prefix.given is not None:
            replaced.update(self.prefix.replacements(index, rows, replaced))
            self.saved_blocks += self.prefix.saved
            self.prefix.forget()
        with ExitStack() as stack:
            stack.enter_context(session.perturbing(self.plan, len(index)))
            stack.enter_context(perturbed_pass.forwards(replaced))
            if _cached(model):
                stack.enter_context(compat.without_shared_caches(model))
                stack.enter_context(type(model).cache_context(model, _CONTEXT))
            perturbed = module.forward(*args, **kwargs)
        self._keep([take_rows(leaf, index) for leaf in batch.leaves(output)], batch.leaves(perturbed))

    def _keep(self, cond: list[Leaf], perturbed: list[Leaf]) -> None:
        clock = self.session.clock
        delta = [each(lambda c, p: wide(c) - wide(p), c, p) for c, p in zip(cond, perturbed, strict=True)]
        self.push = GuidanceDelta(clock.run, clock.step, 0.0, delta, cond)
        self._evaluated = clock.step
        self.evaluations += 1

    def _append(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], branches: Sequence[str]) -> Any:
        """Arguments with the conditional rows once more at the end."""
        session, index, rows = self.session, _index(branches), len(branches)
        self._appended = len(index)
        session.append_perturbed(self.plan, len(index))
        wanted = [*range(rows), *index]
        return (), batch.take_call(session.model, args, kwargs, wanted, rows, session.family.batch_axes)

    def _split(self, output: Any, branches: Sequence[str]) -> Any:
        """The output without the appended rows, which become the push."""
        rows = len(branches) - self._appended
        plain: list[Leaf] = [leaf[:rows] for leaf in batch.leaves(output)]
        perturbed: list[Leaf] = [leaf[rows:] for leaf in batch.leaves(output)]
        self._keep([take_rows(leaf, _index(branches[:rows])) for leaf in plain], perturbed)
        return batch.rebuilt(output, plain)

    def _shareable(self, kwargs: dict[str, Any]) -> Prefix | None:
        """The blocks before the first perturbed one, where the pass can do without them."""
        session = self.session
        model: Any = session.model
        if not self.method.share_prefix or not self.first_block or _cached(model):
            return None
        if any(value is not None and any(word in name for word in _RESIDUALS) for name, value in kwargs.items()):
            return None
        blocks = self.blocks[: self.first_block + 1]
        modules = [model, *(model.get_submodule(block) for block in blocks)]
        hooked = any(getattr(module, "_diffusers_hook", None) is not None for module in modules[1:])
        if hooked or any(module._compiled_call_impl is not None for module in modules):
            return None
        return Prefix(model, blocks, session.family.batch_axes)

    def _inject(self, push: GuidanceDelta, output: Any, branches: Sequence[str]) -> Any:
        way = self._way()
        if way == "shift":
            return added(output, push, push.weight, range(len(branches)))
        if "cond" not in branches:
            return output
        if way == "cond":
            return added(output, push, push.weight / _guidance_scale(self.session, branches), _index(branches))
        scheduler = getattr(self.session.pipe, "scheduler", None)
        if scheduler is None:
            raise DitAttnError("inject='step' needs the pipeline: enable the method on it, not on its transformer")
        self._untap()
        sign = -1.0 if self.session.cfg.negated else 1.0
        scheduler.__dict__["step"] = StepTap(scheduler, scaled(push.delta[0], sign * push.weight))
        return output

    def _way(self) -> str:
        if self.method.inject != "auto":
            return self.method.inject
        guider = getattr(self.session.pipe, "guider", None)
        session = self.session
        rescales = session.cfg.rescaled or session.pipeline_call.rescaled
        rescales = rescales or type(guider).__name__ not in _LINEAR_GUIDERS
        return "step" if rescales and session.pipe is not None else "shift"

    def _measure(self, push: GuidanceDelta, output: Any, branches: Sequence[str]) -> None:
        """Products of the push with itself, with c and with ``c - u``, where u is at hand."""
        delta, cond = self._predicted(scaled(push.delta[0], push.weight)), self._predicted(push.cond[0])
        if "cond" in branches:
            self._measured.append((delta @ delta, cond @ cond))
        if "uncond" not in branches or len(self._measured[-1]) != 2:
            return
        uncond = take_rows(batch.leaves(output)[0], [i for i, name in enumerate(branches) if name == "uncond"])
        direction = cond - self._predicted(uncond)
        self._measured[-1] = (*self._measured[-1], delta @ direction, direction @ direction)

    def _predicted(self, leaf: Leaf) -> torch.Tensor:
        """A prediction as one vector, without the variance that some models learn and pipelines cut off."""
        channels = getattr(self.session.model.config, "in_channels", None)
        if isinstance(leaf, torch.Tensor) and leaf.ndim == 4 and leaf.shape[1] == 2 * (channels or 0):
            leaf = leaf[:, :channels]
        return flat(leaf)


# Guider objects of pipelines that hold one, as far as their rule is affine.
_LINEAR_GUIDERS = ("NoneType", "ClassifierFreeGuidance", "AutoGuidance", "SkipLayerGuidance")


def _index(branches: Sequence[str]) -> list[int]:
    return [row for row, name in enumerate(branches) if name == "cond"]


def _cached(model: Any) -> bool:
    """Whether a step cache (FirstBlockCache and its kin) is on."""
    return bool(getattr(model, "is_cache_enabled", False))


def head_count(layer: Any) -> int | None:
    """Number of heads of an attention module, ``None`` where it does not say."""
    for name in ("heads", "num_heads", "n_heads"):
        if isinstance(getattr(layer, name, None), int):
            return getattr(layer, name)
    return None


def _guidance_scale(session: TransformerRun, branches: Sequence[str]) -> float:
    """The scale of classifier-free guidance the pipeline was called with, 1 where it runs without.

    Raises:
        DitAttnError: it does not say.
    """
    rule, scale = session.cfg, session.guidance_scale()
    dropped = bool(rule.argument) and not session.pipeline_call.given  # asked for, and no negative prompt to run
    if "uncond" not in branches and (rule.style == "batched" or dropped):
        return 1.0
    if session.pipeline_call.bent_by:
        raise DitAttnError(
            f"inject='cond' divides by the guidance scale, and with {session.pipeline_call.bent_by} a step has another one "
            f"than {type(session.pipe).__name__} tells; use inject='shift'"
        )
    if scale is None:
        raise DitAttnError(
            f"{type(session.pipe).__name__} does not say its guidance scale, which inject='cond' divides by; "
            "use inject='shift'"
        )
    return scale
