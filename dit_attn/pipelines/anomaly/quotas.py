"""Fill quotas of pairs, round by round: who makes the pairs is left to the caller, so that it may be workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn import files
from dit_attn.pipelines.anomaly.concept import Concept
from dit_attn.pipelines.anomaly.gate import Gate
from dit_attn.pipelines.anomaly.manifest import Manifest
from dit_attn.pipelines.anomaly.orders import GenerateConfig
from dit_attn.pipelines.anomaly.rounds import Rounds
from dit_attn.pipelines.run import Answers
from dit_attn.pipelines.worker_share import WorkerShare


def fill_quotas(
    output: Path,
    counts: dict[tuple[str, str], int],
    config: GenerateConfig,
    concept: Concept | None,
    answers: Answers,
    *,
    controls: int = 4,
    on_progress: Callable[[int, int, int], None] | None = None,
    worker: WorkerShare | None = None,
) -> dict[str, Any]:
    """Have pairs made until every quota is met or its retries are used up; go on where an earlier run stopped.

    Args:
        output: folder of the run.
        counts: pairs wanted, by (product, defect).
        config: how pairs are made.
        concept: of the defects.
        answers: makes the pairs and writes their images: of ``{"attempt", "pairs", "missing"}`` the batch, whose answer
            is the rows of those that are missing; of ``{"pair", "controls"}`` controls, whose answer is their figures.
        controls: pairs per (product, defect) that are made with the prompt of the normal product, for the report.
        on_progress: callback(finished, wanted, rejected), as far as this process knows.
        worker: the part of the batches that this process has made; all of them where ``None``.

    Returns:
        The summary that is also written to ``summary.json``.

    Raises:
        JobFailed: a batch is parked; the others of its round are made, and no later round is begun.
        DitAttnError: the disk is full, or masks fit nowhere.
    """
    worker = worker or WorkerShare()
    manifest = Manifest(output, worker)
    rounds = Rounds(counts, config.batch, config.retries, manifest.rows)
    for attempt in range(config.retries + 1):
        new: list[dict[str, Any]] = []
        for _, rows in answers([_batch(rounds, pairs, attempt) for pairs in worker.part(rounds.open(attempt))]):
            for row in rows:
                manifest.append(row)
            rounds.add(rows)
            new += rows
            if on_progress is not None:
                on_progress(rounds.finished, len(rounds.wanted), rounds.rejected)
        rounds.add(worker.gather(new))
    scored = [pair for pair in counts if controls and gate_of(concept, *pair) is not None]
    mine = worker.part(scored)
    wanted = [{"pair": list(pair), "controls": controls} for pair in mine]
    figures = [("+".join(mine[position]), found) for position, found in answers(wanted)]
    controlled = dict(worker.gather(figures))
    summary = summarize(rounds.rows(), counts, concept)
    summary["controls"] = {name: controlled.get(name, {}) for name in summary["pairs"]}
    manifest.join(rounds.rows())
    if worker.rank == 0:
        with files.report_os_error(f"write {output}", "free some space and go on with --resume"):
            files.write_json(output / "summary.json", summary)
    return summary


def _batch(rounds: Rounds, pairs: Sequence[tuple[str, str, int]], attempt: int) -> dict[str, Any]:
    missing = [not rounds.has(pair, attempt) for pair in pairs]
    return {"attempt": attempt, "pairs": [list(pair) for pair in pairs], "missing": missing}


def gate_of(concept: Concept | None, product: str, defect: str) -> Gate | None:
    """Return the gate of a pair, ``None`` where the concept has none."""
    found = concept.settings.gate.get(f"{product}+{defect}") if concept is not None else None
    return Gate.from_dict(found) if found else None


def summarize(
    rows: Sequence[dict[str, Any]], counts: dict[tuple[str, str], int], concept: Concept | None
) -> dict[str, Any]:
    """Count and average what a manifest says, by (product, defect)."""
    out: dict[str, Any] = {}
    for (product, defect), wanted in counts.items():
        own = [row for row in rows if (row["product"], row["defect"]) == (product, defect)]
        good = [row for row in own if row["decision"] == "accepted"]
        gate = gate_of(concept, product, defect)
        means = {
            key: float(np.mean([row["scores"][key] for row in good]))
            for key in ("ratio", "fill", "leak")
            if good and good[0]["scores"]
        }
        out[f"{product}+{defect}"] = {
            "wanted": wanted, "accepted": len(good), "rejected": len(own) - len(good),
            "missing": max(0, wanted - len(good)), "retries": sum(row["attempt"] for row in good), **means,
            **({"threshold": gate.low, "normal_under_mask": gate.controls} if gate else {}),
        }  # fmt: skip
    return {"pairs": out}
