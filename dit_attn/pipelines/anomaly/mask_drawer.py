"""Draw new masks with the mask model of a concept, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly.backbone import Backbone
from dit_attn.pipelines.anomaly.concept import Concept, applied
from dit_attn.pipelines.anomaly.mask_model import mask_of
from dit_attn.pipelines.anomaly.training import filled

ATTEMPTS = 16  # draws of one mask before the run is given up
MIN_USABLE = 0.5  # share of the trial masks of a training, below which the model is not used
_STEPS = 20  # of the scheduler
_SEEDS = 2**62


class MaskDrawer:
    """Draw masks of some pairs.

    One mask is drawn at a time: not a bit of it depends on what else a run makes.

    Args:
        backbone: the pipeline; the prompts are encoded here.
        concept: with a mask model.
        steps: of the scheduler.
    """

    def __init__(self, backbone: Backbone, concept: Concept, steps: int = _STEPS):
        assert concept.mask_model is not None
        self.backbone, self.concept, self.model, self.steps = backbone, concept, concept.mask_model, steps
        concept.to(backbone.device)
        prompts = [filled(concept.settings.prompt, *pair.split("+", 1)) for pair in concept.settings.pairs]
        self._texts = [backbone.text(prompt) for prompt in prompts]
        size = backbone.resolution
        self._shape = backbone.encode(torch.zeros(1, 3, size, size)).shape[1:]
        self._drawn: dict[tuple[str, int], np.ndarray] = {}

    @torch.no_grad()
    def image(self, pair: str, seed: int) -> torch.Tensor:
        """Draw a mask as the model does, (3, size, size) in [0, 1]."""
        backbone, number = self.backbone, self.concept.settings.pairs.index(pair)
        noise = torch.randn(self._shape, generator=torch.Generator().manual_seed(seed))[None].to(backbone.device)
        numbers = torch.tensor([number], device=backbone.device)
        text = self.concept.extend_for_masks(self._texts[number], backbone.family.masked, numbers)
        with applied(self.model, backbone.pipe.transformer):
            return backbone.sample(noise, text, steps=self.steps)[0]

    def attempt(self, pair: str, seed: int) -> tuple[np.ndarray, str]:
        """Draw one mask and say why it cannot be used, see :func:`~dit_attn.pipelines.anomaly.mask_model.mask_of`."""
        return mask_of(self.image(pair, seed), self.model.settings.canvas[pair], self.concept.shapes[pair])

    def draw(self, pair: str, seed: int) -> np.ndarray:
        """Draw a mask, as often as it takes; the same seed gives the same mask.

        Raises:
            DitAttnError: none of many can be used.
        """
        if (pair, seed) not in self._drawn:
            reason = ""
            for number in np.random.default_rng(seed).integers(_SEEDS, size=ATTEMPTS):
                mask, reason = self.attempt(pair, int(number))
                if not reason:
                    self._drawn[pair, seed] = mask
                    break
            else:
                raise DitAttnError(
                    f"{ATTEMPTS} masks drawn for {pair} cannot be used, the last because {reason}; learn them with "
                    "more --mask-steps, or give --mask-source real"
                )
        return self._drawn[pair, seed]

    def of(self, pair: str) -> Callable[[np.random.Generator], np.ndarray]:
        """Return the source of one pair's masks for :class:`~dit_attn.pipelines.anomaly.masks.MaskSource`."""
        return lambda rng: self.draw(pair, int(rng.integers(_SEEDS)))


def check_mask_model(concept: Concept, pair: str) -> None:
    """Refuse to draw masks with a concept that cannot.

    Raises:
        DitAttnError: it has no mask model, or one whose trial masks were no good.
    """
    if concept.settings.mask_model is None:
        raise DitAttnError("the concept did not learn to draw masks; train it with --learn-masks, or choose another "
                           "--mask-source")  # fmt: skip
    usable = concept.settings.mask_model.usable.get(pair, 0.0)
    if usable < MIN_USABLE:
        raise DitAttnError(
            f"of the masks drawn for {pair} after training {usable:.0%} could be used; learn them with more "
            "--mask-steps, or give --mask-source real"
        )
