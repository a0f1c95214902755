"""The recipes: what each embedded model is trained on, in which order, and with which optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dit_attn.errors import DitAttnError, unknown

VIDEO_FRAMES = 9


@dataclass(frozen=True)
class NetSize:
    """Size of a transformer and of its text encoders.

    Args:
        hidden: width of the transformer.
        layers: its blocks.
        heads: of each block, `hidden / heads` wide.
        text_width: of the T5; the two CLIP encoders of family "joint" have half of it each.
        text_layers: of the T5.
        text_length: tokens of a prompt, end token and padding counted.
    """

    hidden: int = 128
    layers: int = 6
    heads: int = 2
    text_width: int = 64
    text_layers: int = 2
    text_length: int = 16


@dataclass(frozen=True)
class Stage:
    """A part of training at one size.

    Args:
        share: fraction of all steps.
        size: height and width in pixels.
        frames: 1 for images; for videos, how many of the `VIDEO_FRAMES` frames are shown, from the first one.
        batch: samples per step.
        shift: timestep shift of the noise level, larger for larger inputs (Esser et al. 2024, eq. 23).
        single: one-object scenes only.
        objects: least and most objects of a scene, for kinds "multi" and "edit".
        pieces: least and most pieces of an instruction, for kind "edit".
        filled: share of scenes whose objects have fill words, for kind "multi".
        defective: share of pieces with a defect, for kind "inspect".
    """

    share: float
    size: int
    frames: int
    batch: int
    shift: float
    single: bool = False
    objects: tuple[int, int] = (1, 4)
    pieces: tuple[int, int] = (1, 4)
    filled: float = 0.0
    defective: float = 0.8


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out of training, except the seed and the number of steps."""

    name: str
    family: str  # "image" (PixArt), "video" (Wan), "joint" (SD3) or "edit" (OmniGen)
    kind: str  # "image", "video", "multi" (several different objects), "edit" (of those), "inspect" (defects)
    steps: int
    stages: tuple[Stage, ...]
    net: NetSize = NetSize()
    lr: float = 1e-3
    muon_lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 50
    decay_share: float = 0.25
    ema: float = 0.998
    caption_drop: float = 0.1
    image_drop: float = 0.0  # of input images, and the instruction with each
    min_level: float = 0.05
    clip: float = 1.0
    precision: str = "bf16"  # fp32 on a CPU that multiplies bf16 slowly
    warm_start: str = ""  # embedded model whose trained weights are copied where they fit
    mask_weight: float = 0.0  # of the mean error inside a defect's mask, beside 1 for the mean error of the image

    @property
    def is_tail(self) -> bool:
        """Tell whether the recipe goes on from the shipped weights of the model itself."""
        return self.warm_start == self.name

    def stage_at(self, step: int) -> Stage:
        """Return the stage of `step` (0-based) in a run of `steps` steps."""
        passed = 0.0
        for stage in self.stages:
            passed += stage.share
            if step < round(passed * self.steps):
                return stage
        return self.stages[-1]

    def lr_scale(self, step: int) -> float:
        """Return the learning-rate factor of `step`: linear warm-up, constant, linear decay to 2 % in `decay_share`."""
        left = (self.steps - step) / max(1.0, self.decay_share * self.steps)
        return min(1.0, (step + 1) / self.warmup, max(0.02, left))

    def stretched(self, steps: int, rate: float = 1.0) -> Recipe:
        """Return the same recipe over another number of steps, its learning rates times ``rate``."""
        return replace(self, steps=steps, lr=self.lr * rate, muon_lr=self.muon_lr * rate)


RECIPES: dict[str, Recipe] = {
    "tiny-image": Recipe(
        name="tiny-image",
        family="image",
        kind="image",
        steps=6700,
        stages=(
            Stage(share=0.6478, size=32, frames=1, batch=16, shift=1.0),
            Stage(share=0.1731, size=64, frames=1, batch=16, shift=1.7),
            Stage(share=0.1791, size=128, frames=1, batch=4, shift=3.0),
        ),
        decay_share=0.2,
    ),
    "tiny-video": Recipe(
        name="tiny-video",
        family="video",
        kind="video",
        steps=10600,
        stages=(
            Stage(share=0.1792, size=48, frames=1, batch=16, shift=1.3),
            Stage(share=0.0519, size=48, frames=4, batch=5, shift=2.0),
            Stage(share=0.0811, size=48, frames=9, batch=3, shift=3.0),
            Stage(share=0.0934, size=48, frames=1, batch=16, shift=1.3),
            Stage(share=0.0377, size=48, frames=4, batch=5, shift=2.0),
            Stage(share=0.0276, size=48, frames=9, batch=3, shift=3.0),
            Stage(share=0.1799, size=48, frames=1, batch=16, shift=1.3),
            Stage(share=0.1321, size=48, frames=4, batch=5, shift=2.0),
            Stage(share=0.2171, size=48, frames=9, batch=3, shift=3.0),
        ),
        decay_share=0.15,
    ),
    "tiny-joint": Recipe(
        name="tiny-joint",
        family="joint",
        kind="image",
        steps=5150,
        stages=(
            Stage(share=0.0777, size=32, frames=1, batch=16, shift=2.0, single=True),
            Stage(share=0.5825, size=32, frames=1, batch=16, shift=2.0),
            Stage(share=0.2524, size=64, frames=1, batch=8, shift=2.0),
            Stage(share=0.0874, size=128, frames=1, batch=4, shift=3.0),
        ),
        net=NetSize(heads=8),  # more and narrower heads, so that single heads can be addressed
        decay_share=0.15,
        precision="no",
        warm_start="tiny-image",
    ),
    "tiny-multi": Recipe(
        name="tiny-multi",
        family="joint",
        kind="multi",
        steps=3000,
        stages=(
            Stage(share=0.088, size=64, frames=1, batch=16, shift=3.0, objects=(1, 1)),
            Stage(share=0.432, size=64, frames=1, batch=16, shift=3.0, objects=(2, 2)),
            Stage(share=0.35, size=64, frames=1, batch=16, shift=2.0, filled=0.1),
            Stage(share=0.13, size=128, frames=1, batch=4, shift=3.0, filled=0.1),
        ),
        net=NetSize(hidden=192, heads=3, text_layers=3, text_length=40),
        decay_share=0.25,
    ),
    "tiny-edit": Recipe(
        name="tiny-edit",
        family="edit",
        kind="edit",
        steps=7000,
        stages=(
            Stage(share=0.12, size=64, frames=1, batch=32, shift=24.0, objects=(1, 3), pieces=(1, 1)),
            Stage(share=0.33, size=64, frames=1, batch=32, shift=12.0),
            Stage(share=0.55, size=128, frames=1, batch=16, shift=24.0),
        ),
        net=NetSize(hidden=192, heads=3, text_length=128),
        image_drop=0.05,
    ),
    "tiny-inspect": Recipe(
        name="tiny-inspect",
        family="image",
        kind="inspect",
        steps=4600,
        stages=(
            Stage(share=0.35, size=32, frames=1, batch=16, shift=1.0),
            Stage(share=0.65, size=64, frames=1, batch=8, shift=1.7),
        ),
        decay_share=0.4,
        mask_weight=1.0,
    ),
}

# Outlines are ragged where a model is underfitted at middle noise levels. Steps at full size whose rate falls nearly
# from the first on smooth them; the rates of a whole training make them worse.
_TAIL_RATES: dict[str, Any] = {"lr": 5e-4, "muon_lr": 1e-3, "decay_share": 0.9, "ema": 0.99}
TAILS: dict[str, Recipe] = {
    name: replace(RECIPES[name], steps=steps, stages=(stage,), warm_start=name, **_TAIL_RATES)
    for name, steps, stage in (
        ("tiny-image", 4000, Stage(share=1.0, size=128, frames=1, batch=4, shift=3.0)),
        ("tiny-video", 4000, Stage(share=1.0, size=48, frames=9, batch=3, shift=3.0)),
        ("tiny-joint", 4000, Stage(share=1.0, size=128, frames=1, batch=4, shift=3.0)),
        ("tiny-multi", 4000, Stage(share=1.0, size=128, frames=1, batch=4, shift=3.0, filled=0.1)),
    )
}


def recipe(name: str, *, tail: bool = False) -> Recipe:
    """Return the recipe of the embedded model `name`, or the one that goes on from its shipped weights.

    Raises:
        DitAttnError: no such model, or one without a tail.
    """
    if name not in RECIPES:
        raise unknown("model", name, RECIPES)
    if tail and name not in TAILS:
        raise DitAttnError(f"{name!r} has no tail, {', '.join(TAILS)} do; leave out --tail")
    return TAILS[name] if tail else RECIPES[name]
