"""The plan of ``dit-attn search`` and what it costs."""

from __future__ import annotations

import shlex
from typing import Any

from dit_attn.cli.commands.search.config import HeadSearchConfig
from dit_attn.cli.table import fields, show
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search.pipeline_runner import searchable_layers
from dit_attn.pipelines.head_search.strategies import count_images, relative_cost


def describe(config: HeadSearchConfig) -> dict[str, Any]:
    """Return what would be done and what it costs, as JSON values. The weights are not loaded.

    Raises:
        DitAttnError: more heads wanted than there are.
    """
    source, search, plan = config.load.source, config.search, config.plan
    layers = searchable_layers(source.without_weights)
    heads, count = sum(layers.values()), plan.pairs
    if search.rounds * search.per_round > heads:
        raise DitAttnError(
            f"{search.rounds} rounds of {search.per_round} heads are more than the {heads} heads of the model; give "
            "fewer --rounds or a smaller --per-round"
        )
    share = relative_cost(heads, plan)
    full = sum((heads - n * search.per_round) * count for n in range(search.rounds))
    passes = round(share * full * 2 * plan.full_steps) if plan.full_steps else None
    arms = 1 + search.rounds + search.controls + bool(search.tune) + (len(layers) if search.layers else 0)
    return {
        "folder": str(config.folder),
        "model": source.name,
        "pipeline": source.pipeline.__name__,
        "objective": config.objective,
        "strategy": search.strategy,
        "layers": len(layers),
        "heads": heads,
        "rounds": search.rounds,
        "per_round": search.per_round,
        "pairs": [[pair.prompt, pair.seed] for pair in config.pairs[:count]],
        "held_out": [[pair.prompt, pair.seed] for pair in config.pairs[count:]],
        "images": count_images(heads, plan),
        "images_of_greedy": full,
        "check_images": arms * len(config.pairs),
        "passes": passes,
        "share_of_greedy": round(share, 4),
        "call": config.call,
        "command": shlex.join(["dit-attn", *config.argv]),
    }


def show_plan(plan: dict[str, Any]) -> None:
    """Print the plan."""
    passes = f", about {plan['passes']:,} transformer passes of one sample" if plan["passes"] else ""
    backward = ", and one backward pass per pair, step and round" if plan["strategy"] == "gradient" else ""
    lines = {
        "model": f"{plan['model']} ({plan['pipeline']}): {plan['heads']} heads in {plan['layers']} layers",
        "search": f"{plan['strategy']}, {plan['rounds']} rounds of {plan['per_round']} heads by {plan['objective']}",
        "pairs": f"{len(plan['pairs'])} to search on, {len(plan['held_out'])} held out",
        "cost": f"{plan['images']:,} images for candidates{passes}; {plan['share_of_greedy']:.0%} of the steps of a "
        "full greedy search at all steps",
        "checks": f"{plan['check_images']:,} more images{backward}",
        "folder": plan["folder"],
    }
    show(fields(lines))
