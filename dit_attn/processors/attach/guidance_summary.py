"""Summarize what a guidance method did in the last run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dit_attn.processors.attach.session import Session
from dit_attn.processors.attach.value_table import percent, text_table


@dataclass(frozen=True)
class GuidanceSummary:
    """What a guidance method did in the last run.

    Attributes:
        evaluations: perturbed passes.
        steps: guided steps.
        reused: fraction of the blocks of these passes that was reused from the plain passes.
        parallel: equivalent guidance scale: what the update adds to the scale of classifier-free guidance, mean over
            the guided steps; ``None`` in runs without an unconditional branch.
        orthogonal: orthogonal component of the update, in units of ``|c - u|``; ``None`` likewise.
        relative: ``|D| / |c|``, mean over the guided steps; ``None`` where no step was guided.
        perturbed: what the perturbed pass changes: the method with its layers and their heads, or the blocks it skips.
    """

    evaluations: int
    steps: int
    reused: float
    parallel: float | None
    orthogonal: float | None
    relative: float | None
    perturbed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return text_table(self.rows())

    def rows(self, steps: int = 0) -> list[tuple[str, str]]:
        """Return the printed lines, with their names.

        Args:
            steps: of the run; 0 where it is unknown, as before the first one.
        """
        guided = [f"{self.steps} of {steps} steps"] if steps else []
        rows = [("guidance", ", ".join(["; ".join(self.perturbed), *guided]))]
        if not self.evaluations:
            return rows
        every_step = self.evaluations == self.steps == steps
        passes = "one extra pass a step" if every_step else f"{self.evaluations} extra passes"
        reused = f"; {percent(self.reused)} of the blocks reused from the plain passes" if self.reused else ""
        rows.append(("cost", passes + reused))
        if self.parallel is not None and self.orthogonal is not None:
            across = f"orthogonal component {self.orthogonal:.2f} |cond - uncond|"
            rows.append(("update", f"equivalent guidance scale {self.parallel:+.2f}; {across}"))
        elif self.relative is not None:
            rows.append(("update", f"{self.relative:.2f} |cond| (no unconditional branch to compare with)"))
        return rows


def summarize_guidance(sessions: Iterable[Session]) -> GuidanceSummary | None:
    """Summarize the guidance of one pipeline's sessions; ``None`` where none of those that ran has any."""
    guided = [session for session in sessions if session.guider is not None and session.ran]
    guiders = [session.guider for session in guided if session.guider is not None]
    if not guiders:
        return None
    strengths = [guider.strength for guider in guiders]
    evaluations = sum(guider.evaluations for guider in guiders)
    blocks = sum(guider.evaluations * len(guider.blocks) for guider in guiders)

    def mean(name: str) -> float | None:
        values = [value for strength in strengths for value in getattr(strength, name)]
        return sum(values) / len(values) if values else None

    return GuidanceSummary(
        evaluations=evaluations,
        steps=sum(strength.steps for strength in strengths),
        reused=sum(guider.reused_blocks for guider in guiders) / blocks if blocks else 0.0,
        parallel=mean("parallel"),
        orthogonal=mean("orthogonal"),
        relative=mean("relative"),
        perturbed=tuple(dict.fromkeys(text for session in guided for text in _perturbed(session))),
    )


def _perturbed(session: Session) -> Iterator[str]:
    """Yield the layers and heads, or the blocks, that a guidance method changes in its pass."""
    assert session.guider is not None
    plan, method = session.guider.plan, session.guider.method
    numbers = {layer.name: layer.index for layer in session.layers if layer.kind == "self"}
    named = any(getattr(method, name, "") for name in ("heads", "layers"))
    default = "" if named else " (the default, none were named)"
    by_heads: dict[str, list[str]] = {}
    for name, strengths in plan.strengths.items():
        count = session.heads_of(name)
        chosen = f"all {count} heads" if len(strengths) == count else _counted("head", sorted(strengths))
        by_heads.setdefault(chosen.replace("all 1 heads", "its one head"), []).append(name)
    for heads, names in by_heads.items():
        path = f" ({names[0]})" if len(names) == 1 else ""
        yield f"{method.slug} on {_counted('layer', [numbers[name] for name in names])}{path}, {heads}{default}"
    if plan.skipped:
        yield f"{method.slug} skips {', '.join(plan.skipped)}{default}"


def _counted(noun: str, numbers: Sequence[int]) -> str:
    """Return ``"layer 3"`` or ``"layers 3-5, 8"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"
