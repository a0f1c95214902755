"""The work behind ``dit-attn search``: the plan and its cost, processes, the files, the table."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn.cli import load_pipeline, outputs, runner
from dit_attn.cli.commands.search.config import PAGE, reference_frames
from dit_attn.cli.model_source import Source
from dit_attn.errors import DitAttnError
from dit_attn.eval.report.search_page import page
from dit_attn.pipelines.head_search.evaluation import Arm, Pair, Share, layers_of
from dit_attn.pipelines.head_search.head_hunter import HeadHunter
from dit_attn.pipelines.head_search.head_set import FILE_NAME, HeadSet
from dit_attn.pipelines.head_search.objectives import Objective, Weights, objective
from dit_attn.pipelines.head_search.strategies import Plan, Round, expected, images, undifferentiable
from dit_attn.pipelines.measurement_log import Store

STORE = "evaluations"
PICTURES = 4  # pairs in the grid of the page, at most
_PLAIN = ("seed", "batch", "controls", "layers", "tune", "held_out", "scale", "u", "target", "joint", "guidance_scale")


@dataclass
class Setting:
    """Everything the command knows before it starts.

    Attributes:
        options: flags over the configuration file.
        model: the model.
        pairs: all of them, those held out last.
        call: arguments of every call.
        device, dtype: of the weights.
        folder: where everything goes.
        live: setup and facts of the run.
    """

    options: dict[str, Any]
    model: Source
    pairs: list[Pair]
    call: dict[str, Any]
    device: Any
    dtype: Any
    folder: Path
    live: runner.Run

    @property
    def objective(self) -> str:
        """Name of the objective."""
        return str(self.options.get("objective", "clip-world" if self.model.kind == "embedded" else "clip"))

    @property
    def plan(self) -> Plan:
        """How the candidates are searched."""
        asked, plain = self.options, Plan()
        count, steps = len(self.pairs) - asked.get("held_out", 0), self.call.get("num_inference_steps")
        return Plan(
            asked.get("rounds", plain.rounds), asked.get("per_round", plain.per_round),
            asked.get("strategy", plain.strategy), asked.get("u", plain.u), count, asked.get("search_steps"),
            steps if isinstance(steps, int) else None, asked.get("keep", plain.keep), asked.get("screen", plain.screen),
        )  # fmt: skip


def new_setting(
    options: dict[str, Any], model: Source, pairs: list[Pair], call: dict[str, Any], device: Any, argv: list[str]
) -> Setting:
    """A setting; arguments as the attributes of :class:`Setting`.

    Raises:
        DitAttnError: more steps for candidates than the run has.
    """
    dtype = load_pipeline.pick_dtype(options.get("dtype", "auto"), model, device)
    name = Path(model.path).name or "model"
    folder = Path(options.get("output") or Path("outputs") / f"search-{name}").expanduser()
    live = runner.new_run(None, model, (), options, dtype, device, folder, argv)
    setting = Setting(options, model, pairs, call, device, dtype, folder, live)
    plan = setting.plan
    if plan.steps and plan.full_steps and plan.steps > plan.full_steps:
        raise DitAttnError(f"--search-steps {plan.steps} is more than the {plan.full_steps} --steps of the run")
    return setting


def plan(setting: Setting) -> dict[str, Any]:
    """What would be done and what it costs, as JSON values. The weights are not loaded."""
    from dit_attn.cli.model_source import skeleton

    layers = layers_of(skeleton(setting.model))
    wanted, heads = setting.plan, sum(layers.values())
    if wanted.rounds * wanted.per_round > heads:
        raise DitAttnError(
            f"{wanted.rounds} rounds of {wanted.per_round} heads are more than the {heads} heads of the model; give "
            "fewer --rounds or a smaller --per-round"
        )
    share = expected(heads, wanted)
    full = sum((heads - n * wanted.per_round) * wanted.pairs for n in range(wanted.rounds))
    passes = round(share * full * 2 * (wanted.full_steps or 1)) if wanted.full_steps else None
    asked = setting.options
    arms = 1 + wanted.rounds + asked.get("controls", 1) + bool(asked.get("tune", 0))
    arms += len(layers) if asked.get("layers") else 0
    return {
        "folder": str(setting.folder),
        "model": setting.model.name,
        "pipeline": setting.model.pipeline.__name__,
        "objective": setting.objective,
        "strategy": wanted.strategy,
        "layers": len(layers),
        "heads": heads,
        "rounds": wanted.rounds,
        "per_round": wanted.per_round,
        "pairs": [[pair.prompt, pair.seed] for pair in setting.pairs[: wanted.pairs]],
        "held_out": [[pair.prompt, pair.seed] for pair in setting.pairs[wanted.pairs :]],
        "images": images(heads, wanted),
        "images_of_greedy": full,
        "check_images": arms * len(setting.pairs),
        "passes": passes,
        "share_of_greedy": round(share, 4),
        "call": setting.call,
        "command": setting.live.facts["command"],
    }


def plan_text(plan: dict[str, Any]) -> str:
    """The plan for people."""
    passes = f", about {plan['passes']:,} transformer passes of one sample" if plan["passes"] else ""
    lines = {
        "model": f"{plan['model']} ({plan['pipeline']}): {plan['heads']} heads in {plan['layers']} layers",
        "search": f"{plan['strategy']}, {plan['rounds']} rounds of {plan['per_round']} heads by {plan['objective']}",
        "pairs": f"{len(plan['pairs'])} to search on, {len(plan['held_out'])} held out",
        "cost": f"{plan['images']:,} images for candidates{passes}; {plan['share_of_greedy']:.0%} of the steps of a "
        "full greedy search at all steps",
        "checks": f"{plan['check_images']:,} more images" + ("" if plan["strategy"] != "gradient" else
                                                             ", and one backward pass a pair, time and round"),
        "folder": plan["folder"],
    }  # fmt: skip
    return "\n".join(f"{key:<10}{value}" for key, value in lines.items())


def run_all(setting: Setting) -> HeadSet | None:
    """Search, and write ``heads.json`` and the page. ``None`` in processes other than the first.

    Raises:
        DitAttnError: the folder cannot be written, weights that cannot be loaded, an objective that cannot judge.
        KeyboardInterrupt: every outcome is kept.
    """
    share = processes(setting)
    outputs.prepare_folder(setting.folder)
    goal = objective(setting.objective, weights(setting))
    if setting.options.get("strategy") == "gradient" and goal.pixels is None:
        raise undifferentiable(goal.name)
    _try_objective(setting, goal)
    store = open_store(setting, share)
    pipe = load_pipeline.load_pipeline(setting.model, setting.options, setting.device, setting.dtype)
    pipe.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    with ExitStack() as stack:
        talks = share.rank == 0 and not setting.options.get("json")
        progress = stack.enter_context(Progress(setting.plan.rounds, talks))
        options = {name: setting.options[name] for name in _PLAIN if name in setting.options}
        wanted = setting.plan
        hunter = HeadHunter(
            pipe, setting.pairs, goal, rounds=wanted.rounds, per_round=wanted.per_round, strategy=wanted.strategy,
            steps=wanted.steps, keep=wanted.keep, screen=wanted.screen, call=setting.call, model=setting.model.name,
            store=store, share=share, tell=progress.tell, say=progress.say, **{"controls": 1, **options},
        )  # fmt: skip
        found = hunter.search()
        shown = grid(hunter, found) if share.rank == 0 else []
    if share.rank:
        return None
    found.search.update(facts(setting, time.perf_counter() - started, share))
    outputs.write_json(found.to_dict(), setting.folder / FILE_NAME)
    outputs.write_text(page(found.to_dict(), shown, setting.live.fps), setting.folder / PAGE)
    return found


def weights(setting: Setting) -> Weights:
    """What the objective needs, by the flags."""
    asked = setting.options
    return Weights(
        asked.get("clip"), asked.get("weights"), asked.get("weights_head"), asked.get("style"),
        reference_frames(asked), setting.device,
    )  # fmt: skip


def _try_objective(setting: Setting, goal: Objective) -> None:
    """Let the objective see one grey picture of every prompt, so that prompts it cannot judge are refused at once."""
    count = 8 if "num_frames" in setting.call else 1
    if goal.name not in ("verifier", "verifier-whole", "fid-world", "drawn-world"):
        return
    prompts = [pair.prompt for pair in setting.pairs]
    grey = [np.full((count, 32, 32, 3), 128, dtype=np.uint8)] * len(prompts)
    goal.judge(grey, prompts)


def processes(setting: Setting) -> Share:
    """This process's part; several under ``accelerate launch`` or ``torchrun``."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Share()
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=setting.device.type == "cpu")
    if setting.device.type != "cpu" and "device" not in setting.options:
        setting.device = state.device
    return Share(state.process_index, state.num_processes, gather_object)


def open_store(setting: Setting, share: Share) -> Store:
    """What earlier runs measured: every process writes a file of its own and knows what all of them hold."""
    asked, names = setting.options, ("scale", "target", "joint", "guidance_scale", "clip", "style", "weights")
    setup = {
        **setting.live.setup,
        "objective": setting.objective,
        "scorer": {name: asked.get(name) for name in (*names, "weights_head", "reference")},
        "pairs": [[pair.prompt, pair.seed] for pair in setting.pairs],
        "call": setting.call,
    }
    mine = setting.folder / (f"{STORE}.jsonl" if share.rank == 0 else f"{STORE}-{share.rank}.jsonl")
    resume = bool(asked.get("resume"))
    store = Store(mine, setup, resume)
    others = []
    if share.rank == 0:
        for file in sorted(setting.folder.glob(f"{STORE}-*.jsonl")):
            if int(file.stem.rpartition("-")[2]) >= share.size:  # of a run with more processes
                if resume:
                    others += list(Store(file, setup, True).rows.items())
                else:
                    file.unlink()
    for key, value in share.gather([*store.rows.items(), *others]):
        store.rows.setdefault(key, value)
    return store


class Progress:
    """A bar over the images of the call in progress, with the time left, and a line a round."""

    def __init__(self, rounds: int, show: bool) -> None:
        self.rounds, self.show = rounds, show
        self.bar: Any = None
        self._last = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def tell(self, done: int, total: int) -> None:
        """So many images of the call are done."""
        from tqdm import tqdm

        if not self.show or not sys.stderr.isatty():
            return
        if self.bar is None:
            self.bar = tqdm(total=total, desc="search", unit="image")
            self._last = 0
        self.bar.update(done - self._last)
        self._last = done
        if done >= total:
            self._close()

    def say(self, number: int, found: Round) -> None:
        """A round is over."""
        self._close()
        if self.show:
            heads = ", ".join(f"{layer}:{head} ({found.scores[layer, head]:.4g})" for layer, head in found.chosen)
            print(f"round {number + 1} of {self.rounds}: {heads}", file=sys.stderr)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


def grid(hunter: HeadHunter, found: HeadSet) -> list[dict[str, Any]]:
    """Pictures of the first pairs (those held out where there are any): without guidance, and after every set."""
    count, held = hunter.plan.pairs, hunter.held_out
    where = list(range(count, count + held) if held else range(count))[:PICTURES]
    pairs = [hunter.trials.pairs[i] for i in where]
    sets = found.checks["held_out" if held else "searched"]
    arms: dict[str, Arm] = {
        name: tuple((str(a), int(b), float(c)) for a, b, c in one["heads"]) for name, one in sets.items()
    }
    layer = found.search.get("best_layer", {}).get("name")
    names = [name for name in ("none", f"round {hunter.plan.rounds}", "tuned", layer, "random 1") if name in arms]
    made = {name: hunter.make(arms[name], pairs) for name in names}
    return [
        {"prompt": pair.prompt, "seed": pair.seed, "pictures": {name: made[name][i] for name in names}}
        for i, pair in enumerate(pairs)
    ]


def facts(setting: Setting, seconds: float, share: Share) -> dict[str, Any]:
    """What ran, for the file."""
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment

    return {
        "seconds": round(seconds, 2),
        "processes": share.size,
        "setup": setting.live.setup,
        "call": setting.call,
        "environment": environment(),
        "commit": current_commit(),
        **setting.live.facts,
    }


def table(found: HeadSet, setting: Setting) -> str:
    """Scores, cost and files as text."""
    about, lines = found.search, []
    for name, checks in found.checks.items():
        lines.append(f"{about['objective']} on {_on(name)}")
        for label, one in checks.items():
            score, gain = figure(one["score"]), figure(one["gain"])
            lines.append(f"  {label:<10}{score:<28}{'' if one['gain'] is None else 'gain ' + gain}".rstrip())
    if "best_layer" in about:
        for name, lead in about["best_layer"]["lead"].items():
            lines.append(f"heads over {about['best_layer']['name']}, best when searched: {figure(lead)} on {_on(name)}")
    total = sum(about["images"].values())
    cost = ", ".join(f"{count} {name}" for name, count in about["images"].items())
    heads = "; ".join(f"{layer}:{head}@{u:g}" for layer, head, u in found.heads)
    return "\n".join([
        *lines, "", f"heads     {heads or 'none: every strength was tuned to 0'}",
        f"images    {total} ({cost}); {sum(about['passes'].values())} transformer passes",
        f"file      {setting.folder / FILE_NAME}", f"page      {setting.folder / PAGE}",
        f"use       dit-attn generate --model {found.model} --method softpag --set heads={setting.folder / FILE_NAME} "
        f"--set scale={found.scale:g} --prompt ...",
    ])  # fmt: skip


def _on(name: str) -> str:
    return f"{name.replace('_', ' ')} pairs"


def figure(found: dict[str, Any] | None) -> str:
    """A number with its interval."""
    if found is None:
        return "no finite score"
    value = f"{found['value']:.4g}"
    return value if not found["ci95"] else f"{value} ({found['ci95'][0]:.4g} to {found['ci95'][1]:.4g})"


