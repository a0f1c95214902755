"""Does a negative prompt take away what it names? ``python -m tests._support.nag_benchmark`` counts, with controls.

Every prompt leaves the color open. The color that the model gives it without guidance is then named by the negative
prompt: the same caption with that color. An image counts as rid of it when no object has the color any more, and as
following the prompt when everything else that it says is there. All arms have the same noise.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

import dit_attn
from dit_attn import NAG, files, models
from dit_attn.eval.shapes_world import world
from dit_attn.eval.shapes_world.verify import detect_objects, verify_image
from dit_attn.models.evaluate import current_commit, interval
from dit_attn.models.export import environment

ARMS: dict[str, tuple[NAG | None, float]] = {
    "none": (None, 1.0),
    "NAG, the default": (NAG(), 1.0),
    "NAG, alpha=0.5": (NAG(alpha=0.5), 1.0),
    "NAG, alpha=1": (NAG(alpha=1.0), 1.0),
    "NAG, alpha=0.5, another color": (NAG(alpha=0.5), 1.0),
    "plain guidance 1.5": (None, 1.5),
    "plain guidance 3": (None, 3.0),
}
"""The method and the guidance scale of every arm."""


def measure(model: str, count: int, steps: int, seed: int, device: str = "cpu") -> list[dict[str, Any]]:
    """Return what became of every prompt in every arm."""
    pipe = models.load(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    call = {**models.call_defaults(model), "num_inference_steps": steps}
    rows = []
    for item, scene in enumerate(world.held_out_sample("image", count, seed)):
        assert isinstance(scene, world.Scene)
        prompt = world.caption(scene).replace(f"{scene.color} ", "")
        named = ""
        for arm, (method, scale) in ARMS.items():
            colors = [color for color in world.COLORS if (color == named) is not arm.endswith("another color")]
            negative = world.caption(dataclasses.replace(scene, color=colors[0])) if named else ""
            more: dict[str, Any] = {"guidance_scale": scale}
            if method is not None:
                dit_attn.enable(pipe, dataclasses.replace(method, negative_prompt=negative))
            elif scale > 1.0:
                more["negative_prompt"] = negative
            image = pipe(prompt, generator=torch.Generator().manual_seed(seed + item), **{**call, **more}).images[0]
            dit_attn.disable(pipe)
            found = [thing.color for thing in detect_objects(image)]
            named = named or (found[0] if found else scene.color)
            checks = {name: right for name, right in verify_image(image, scene).items() if name != "color"}
            row = {"prompt": prompt, "arm": arm, "named": named, "colors": found, "checks": checks}
            rows.append(row)
            print(row, flush=True)
    return rows


def rates(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return how often the color was gone, the rest of the prompt followed, and both, with 95 % intervals."""
    found = {}
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        gone = [row["named"] not in row["colors"] for row in mine]
        followed = [all(row["checks"].values()) for row in mine]
        flags = {"gone": gone, "followed": followed, "both": [a and b for a, b in zip(gone, followed)]}
        found[arm] = {
            name: {"right": sum(values), "of": len(values), "ci95": interval(sum(values), len(values))}
            for name, values in flags.items()
        }
    return found


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m tests._support.nag_benchmark", description=__doc__)
    parser.add_argument("--model", choices=("tiny-image", "tiny-joint"), default="tiny-image")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="default: benchmarks/guidance/MODEL_nag.json")
    given = parser.parse_args()
    rows = measure(given.model, given.count, given.steps, given.seed, given.device)
    output = given.output or Path(f"benchmarks/guidance/{given.model}_nag.json")
    command = f"python -m tests._support.nag_benchmark --model {given.model} --count {given.count}"
    command += f" --device {given.device}" if given.device != "cpu" else ""
    record = {
        "what": "prompts that leave the color open; the color of the image without guidance, named by the negative "
        "prompt: how often it was gone, how often the rest of the prompt was followed, and both",
        "command": f"{command} --steps {given.steps} --seed {given.seed}", "commit": current_commit(),
        "environment": environment(), "model": given.model, "steps": given.steps, "rates": rates(rows), "rows": rows,
    }  # fmt: skip
    files.write_json(output, record)
    for arm, found in record["rates"].items():
        print(arm, {name: f"{value['right']} of {value['of']}" for name, value in found.items()})


if __name__ == "__main__":
    main()
