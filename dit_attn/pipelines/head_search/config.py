"""Settings of a search for heads, and the plan that follows from them for given pairs and steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_attn.errors import DitAttnError
from dit_attn.processors.guidance.perturbation import JOINTS, TARGETS
from dit_attn.settings import check_fields, setting

STRATEGY_NAMES = ("greedy", "halving", "gradient")


@dataclass(frozen=True)
class SearchConfig:
    """Settings of a search for attention heads.

    Attributes:
        rounds: R, number of rounds.
        per_round: k, heads that join the selection in a round.
        strategy: ``greedy`` scores every head on every pair (HeadHunter, Ahn et al. 2025, 2506.10978, algorithm 1),
            ``halving`` by successive halving, ``gradient`` screens the heads with one backward pass.
        u: strength of a candidate head, in (0, 1].
        scale: guidance scale w of the perturbed pass, above 0.
        target, joint: of the perturbation, see :class:`~dit_attn.processors.methods.softpag.SoftPAG`.
        steps: denoising steps of a candidate's run; ``None`` for those of the call. Fewer are a cheaper proxy.
        guidance_scale: s of classifier-free guidance ``u + s (c - u)`` during the search; 1 is none (the paper).
        held_out: number of pairs, the last ones, that are not searched on; the result is checked on them.
        controls: random sets of as many heads to check as a baseline.
        layers: also check every layer with all its heads (layer-level PAG) as a baseline.
        tune: sweeps over the strengths after the search.
        batch: pairs per call of the pipeline.
        seed: of pairs without one, and of the random sets.
        keep: ``halving``: a rung keeps one head of so many, above 1.
        screen: ``gradient``: fraction of the heads that is scored after the screening, in (0, 1].

    Raises:
        DitAttnError: a value of another type or out of range.
    """

    slug: ClassVar[str] = "search"

    rounds: int = setting(3, "number of rounds", low=1)
    per_round: int = setting(3, "heads that join in a round", low=1)
    strategy: str = setting("greedy", "how candidates are chosen", choices=STRATEGY_NAMES)
    u: float = setting(1.0, "strength of a candidate head", low=0.0, high=1.0)
    scale: float = setting(3.0, "guidance scale w", low=0.0)
    target: str = setting("identity", "replacement for the attention matrix", choices=TARGETS[:3])
    joint: str = setting("joint", "what the identity means on a joint sequence", choices=JOINTS)
    steps: int | None = setting(None, "denoising steps of a candidate's run", low=1)
    guidance_scale: float = setting(1.0, "classifier-free guidance during the search", low=0.0)
    held_out: int = setting(0, "pairs that are not searched on", low=0)
    controls: int = setting(0, "random sets of heads to check", low=0)
    layers: bool = setting(False, "also check every layer with all its heads")
    tune: int = setting(0, "sweeps over the strengths after the search", low=0)
    batch: int = setting(4, "pairs per call of the pipeline", low=1)
    seed: int = setting(42, "seed of pairs without one, and of the random sets")
    keep: float = setting(4.0, "halving: a rung keeps one head of so many", low=1.0)
    screen: float = setting(0.15, "gradient: fraction of the heads that is scored", low=0.0, high=1.0)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.u <= 0.0:
            raise DitAttnError(f"search.u must be above 0: a head of strength 0 is not perturbed, got {self.u:g}")
        if not self.scale > 0.0:
            raise DitAttnError(
                f"search.scale must be above 0: without a guidance update all heads score the same, got {self.scale:g}"
            )
        if self.keep <= 1.0:
            raise DitAttnError(f"search.keep must be above 1: a rung has to drop heads, got {self.keep:g}")
        if self.screen <= 0.0:
            raise DitAttnError(f"search.screen must be above 0: no head would be scored, got {self.screen:g}")


@dataclass(frozen=True)
class SearchPlan:
    """How the candidates of a search are scored.

    Attributes:
        config: the settings.
        pairs: M, number of pairs that candidates are scored on.
        full_steps: denoising steps of the call; ``None`` where unknown: the rungs of ``halving`` then save no steps.

    Raises:
        DitAttnError: no pair, or more steps for candidates than the run has.
    """

    config: SearchConfig = SearchConfig()
    pairs: int = 1
    full_steps: int | None = None

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise DitAttnError(f"a search needs at least 1 pair of prompt and seed, got {self.pairs}")
        steps = self.config.steps
        if steps is not None and self.full_steps is not None and steps > self.full_steps:
            raise DitAttnError(f"search.steps lies in 1 to {self.full_steps}, the steps of the run, got {steps}")

    @property
    def finalists(self) -> int:
        """Heads that ``halving`` and ``gradient`` score on all pairs and steps, at least."""
        return 2 * self.config.per_round

    def check_heads(self, heads: int) -> None:
        """Check that a model has enough heads.

        Args:
            heads: number of heads of the model.

        Raises:
            DitAttnError: the rounds need more.
        """
        wanted = self.config.rounds * self.config.per_round
        if wanted > heads:
            raise DitAttnError(
                f"{self.config.rounds} rounds of {self.config.per_round} heads are {wanted}, and the model has {heads} "
                "heads; give fewer rounds or fewer heads per round"
            )
