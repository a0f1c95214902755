"""Blocks and guiders for diffusers' modular pipelines."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam

from dit_attn import api
from dit_attn.errors import DitAttnError
from dit_attn.files import report_os_error, write_text
from dit_attn.processors.attach import attach
from dit_attn.processors.attach.components import unwrap
from dit_attn.processors.core.call import CallPerturbation
from dit_attn.processors.methods.softpag import SoftPAG

_SOURCE = '''"""A block that enables the attention methods of dit_attn; see its class."""

from dit_attn.integrations.modular import EnableDitAttn as EnableDitAttn
'''


class EnableDitAttn(ModularPipelineBlocks):
    """Enable attention methods on the transformers of a modular pipeline, before its denoising block.

    The run's ``attention`` input says which: a slug (settings of the model's preset), a method, or a list of them;
    ``"none"`` disables them.

        blocks.sub_blocks.insert("dit_attn", EnableDitAttn(), index)
        pipe(..., attention="rectified-spaattn")
    """

    _requirements = {"dit-attn": ">=0.1"}  # noqa: RUF012 (declared so in the base)

    @property
    def description(self) -> str:
        """Description of the block."""
        return "Enables attention methods of dit_attn on the transformers. Put it before the denoising block."

    @property
    def inputs(self) -> list[InputParam]:
        """Inputs of a run."""
        text = "methods: a slug, a Method, or a list of them; 'none' disables them"
        return [InputParam("attention", default="auto", description=text)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Enable what the input says.

        Raises:
            DitAttnError: as :func:`dit_attn.enable`; nothing is changed then.
        """
        given: Any = self.get_block_state(state)
        wanted = given.attention
        if getattr(components, "transformer", None) is None:
            raise DitAttnError("the pipeline has no transformer yet; load its components before the block runs")
        if isinstance(wanted, str) and wanted == "none":
            api.disable(components)
        else:
            api.enable(components, *(wanted if isinstance(wanted, (list, tuple)) else (wanted,)))
        return components, state


def save_block(folder: str | Path) -> Path:
    """Write the block so that ``ModularPipelineBlocks.from_pretrained(folder, trust_remote_code=True)`` loads it.

    The folder can be pushed to the Hub; it needs dit_attn where it is loaded.

    Returns:
        The folder.

    Raises:
        DitAttnError: the folder cannot be written.
    """
    folder = Path(folder)
    with report_os_error(f"write the block to {folder}", "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{__name__.rpartition('.')[2]}.py", _SOURCE)
        EnableDitAttn().save_pretrained(str(folder))
    return folder


class SoftPAGGuidance(BaseGuidance):
    """Classifier-free guidance, and guidance by perturbed heads: ``u + s (c - u) + w (c - p)``.

        pipe.update_components(guider=SoftPAGGuidance(guidance_scale=5.0, scale=3.0, heads="14:0,7"))

    Args:
        guidance_scale: s; 1 leaves the unconditional pass out.
        scale: w; 0 leaves the perturbed pass out.
        heads: perturbed heads, as for :class:`~dit_attn.SoftPAG`; empty: every head of the middle layer.
        u: strength of the perturbation.
        target: replacement for the attention matrix.
        joint: meaning of the identity on a joint sequence.
        start, stop: part of the run with perturbed passes.
        enabled: whether there is any guidance.

    Raises:
        DitAttnError: a value out of range, heads that cannot be parsed.
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_perturbed"]  # type: ignore[assignment]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 5.0,
        scale: float = 3.0,
        heads: str = "",
        u: float = 1.0,
        target: str = "identity",
        joint: str = "joint",
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        self.method = SoftPAG(heads=heads, scale=scale, u=u, target=target, joint=joint, start=start, stop=stop)
        super().__init__(start, stop, enabled)
        self.guidance_scale = guidance_scale
        self._pass = ExitStack()  # what is to be undone after the transformer's call
        self._own: Any = None  # transformer that is wrapped for this step alone

    @property
    def passes(self) -> tuple[str, ...]:
        """The predictions of the current step, in the order of the transformer's calls."""
        guided = self._enabled and self.guidance_scale != 1.0
        perturbed = self._enabled and self._weight > 0.0
        return ("pred_cond", *(["pred_uncond"] if guided else []), *(["pred_perturbed"] if perturbed else []))

    @property
    def _weight(self) -> float:
        steps = self._num_inference_steps
        return self.method.weight(0.0 if not steps else (self._step or 0) / steps)

    @property
    def num_conditions(self) -> int:
        """Number of transformer calls in the current step."""
        return len(self.passes)

    @property
    def is_conditional(self) -> bool:
        """Whether the call that was prepared last gets the prompt."""
        return self.passes[max(0, self._count_prepared - 1)] != "pred_uncond"

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Say what the transformer's call that comes next is: its step, its branch, whether it is perturbed."""
        super().prepare_models(denoiser)
        self._pass.close()
        model, name = unwrap(denoiser), self.passes[self._count_prepared - 1]
        if attach.session_of(model) is None and self._count_prepared == 1 and "pred_perturbed" in self.passes:
            self._own = model
            api.enable(model)
        session = attach.session_of(model)
        if session is None:
            return
        branch = "uncond" if name == "pred_uncond" else "cond"
        self._pass.enter_context(
            api.run_context(model, step=self._step or 0, steps=self._num_inference_steps or 1, branch=branch)
        )
        if name == "pred_perturbed":
            perturbed: CallPerturbation = self.method.perturbation(
                {layer: session.heads_of(layer) for layer in session.stack_layers}, []
            )
            self._pass.enter_context(session.perturbing(perturbed, len(session.rows_by_branch())))
        # An error inside the call must not leave the transformer perturbed. (Ctrl-C does, until the next run begins.)
        handle = denoiser.register_forward_hook(lambda *_: self._pass.close(), always_call=True)
        self._pass.callback(handle.remove)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Undo what :meth:`prepare_models` did."""
        self._pass.close()
        if self._own is not None and self._count_prepared == self.num_conditions:
            api.disable(self._own)
            self._own = None

    def prepare_inputs(self, data: Any) -> list[Any]:
        """Return the inputs of every transformer call of the step."""
        return [self._prepare_batch(data, int(name == "pred_uncond"), name) for name in self.passes]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """See :meth:`prepare_inputs`; the inputs are fields of the state of a block."""
        indices = [(int(name == "pred_uncond"), name) for name in self.passes]
        return [self._prepare_batch_from_block_state(input_fields, data, index, name) for index, name in indices]

    def forward(
        self,
        pred_cond: torch.Tensor,
        pred_uncond: torch.Tensor | None = None,
        pred_perturbed: torch.Tensor | None = None,
    ) -> GuiderOutput:
        """Return the guided prediction."""
        pred = pred_cond if pred_uncond is None else pred_uncond + self.guidance_scale * (pred_cond - pred_uncond)
        if pred_perturbed is not None:
            pred = pred + self._weight * (pred_cond - pred_perturbed)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)
