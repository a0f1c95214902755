"""``dit-attn compare``: one model, the same prompts and noise, dense beside methods; files, figures and a page."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.cli import options as flags
from dit_attn.errors import DitAttnError, unknown

if TYPE_CHECKING:
    from dit_attn.cli.commands.compare.config import Setting
    from dit_attn.cli.jobs import Job
    from dit_attn.cli.method_options import Wanted
    from dit_attn.cli.model_source import Source
    from dit_attn.pipelines.compare.records import Variant

CALL = "call"  # stands among the methods for arguments of the pipeline's call
ALWAYS = ("psnr", "ssim", "none")  # need no network
_OWN = (
    flags.Flag("seeds", "seeds of every prompt, e.g. 0,1 (default: item i gets 42 + i)", metavar="N,N"),
    flags.Flag("held-out", "so many held-out captions of the shapes world, for embedded models", int, low=1),
    flags.Flag(
        "metrics",
        "scores besides PSNR and SSIM, e.g. fid-world,clip-world,lpips (default: fid-world,clip-world for "
        "embedded models, else none; none turns them off)",
        metavar="NAME,NAME",
    ),
    flags.Flag("inception", "weights of the Inception network, for fid and kid", metavar="FILE"),
    flags.Flag("clip", "folder or Hub name of a CLIP model, for clip", metavar="MODEL"),
    flags.Flag("lpips", "backbone of LPIPS (default: alex)", choices=("alex", "vgg", "squeeze")),
    flags.Flag("lpips-weights", "torchvision's weights of that backbone", metavar="FILE"),
    flags.Flag(
        "match-strength",
        "beside every guidance method, also the guidance scale that pushes as far along c - u as it does",
        bool,
    ),
    flags.Flag("maps", "map density and error of every layer and step on the first item (default: yes)", "on-or-off"),
    flags.Flag("show", "items on the page (default: 24); all of them are in the folder", int, low=1),
)
_GROUPS = {
    "model": flags.MODEL,
    "prompts": flags.PROMPT,
    "comparison": _OWN,
    "size": flags.SIZE,
    "sampling": flags.without(flags.SAMPLING, "seed", "num-images-per-prompt"),
    "machine": flags.without(flags.MACHINE, "compile"),
    "output": flags.without(flags.OUTPUT, "contact-sheet"),
    "settings": flags.METHOD,
}
_EXAMPLES = """examples:
  dit-attn compare --model tiny-image --held-out 32 --method block-sparse:density=0.5 \\
      --method block-sparse:density=0.25 --output outputs/compare
  dit-attn compare --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --seeds 0,1 \\
      --method block-sparse:density=0.25,dense_steps=0.1 --output outputs/wan --resume
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``compare`` and return its parser."""
    parser = subparsers.add_parser(
        "compare",
        help="measure what methods cost and keep on your prompts, beside dense, and make a page of it",
        description="Make every prompt dense and with every method, from the same noise and in turns, and write the "
        "files, results.json and report.html. Dense always takes part.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, group in _GROUPS.items():
        flags.add_flags(parser, title, group)
    parser.add_argument_group("methods").add_argument(
        "--method",
        action="append",
        default=argparse.SUPPRESS,
        metavar="NAME[:KEY=VALUE,...]",
        help="competitor: a method (or a file of settings) and its settings; NAME:... + NAME:... puts several on "
        "at once; repeatable. call:KEY=VALUE changes an argument of the pipeline's call for this competitor, e.g. "
        "call:guidance_scale=1 + softpag:heads=3",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Check everything, load once, make what is missing, write the figures and the page.

    Returns:
        0, 1 when items failed, 130 after Ctrl-C.

    Raises:
        DitAttnError: bad input, before anything is loaded where that can be known.
    """
    setting = _setting(args)
    from dit_attn.cli import runner
    from dit_attn.cli.commands.compare import run as compare_run

    as_json = setting.options.get("json", False)
    if setting.options.get("dry_run"):
        print(json.dumps(compare_run.plan(setting), indent=1) if as_json else _plan_text(setting))
        return 0
    try:
        results = compare_run.run_all(setting)
    except KeyboardInterrupt:
        print(
            f"dit-attn: interrupted; finished items are in {setting.folder}; "
            "run the same command with --resume to go on",
            file=sys.stderr,
        )
        return 130
    if as_json:
        print(json.dumps(results, indent=1, default=str))
    else:
        print(
            f"{table(results)}\n\nfigures  {setting.folder / 'results.json'}\npage     {setting.folder / 'report.html'}"
        )
    runner.warn((text for take in results["takes"] for text in take["warnings"]), len(results["takes"]))
    failed = [take for take in results["takes"] if take["error"]]
    if failed:
        print(f"dit-attn: {len(failed)} of {len(results['takes'])} items failed:", file=sys.stderr)
        for take in failed:
            print(f"  {take['variant']}, {take['prompt']!r}, seed {take['seed']}: {take['error']}", file=sys.stderr)
    return 1 if failed else 0


def split_method(text: str) -> list[Wanted]:
    """``block-sparse:density=0.25,keep=text,diagonal + other`` as methods with settings.

    A comma separates settings where a ``KEY=`` follows it; elsewhere it belongs to a list.

    Raises:
        DitAttnError: no name, or a setting that is not KEY=VALUE.
    """
    from dit_attn.cli.method_options import Wanted

    wanted = []
    for part in re.split(r"\s\+\s|\+(?=[A-Za-z/.~])", text):
        name, colon, rest = part.strip().partition(":")
        if not name:
            raise DitAttnError(f"--method {text!r} names no method; write for instance block-sparse:density=0.25")
        item = Wanted(name)
        for piece in re.split(r",(?=\s*[A-Za-z_]\w*=)", rest) if colon else []:
            key, sign, value = piece.partition("=")
            if not sign or not key.strip():
                raise DitAttnError(f"--method {text!r}: {piece!r} is not KEY=VALUE; write {name}:density=0.25")
            item.settings[key.strip()] = value.strip()
        wanted.append(item)
    return wanted


def parse_seeds(text: str) -> tuple[int, ...]:
    """``"0,1"`` as seeds.

    Raises:
        DitAttnError: not whole numbers in range, or one twice.
    """
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise DitAttnError(f"--seeds must be whole numbers with commas between, such as 0,1, got {text!r}") from error
    if any(not 0 <= seed <= flags.MAX_SEED for seed in seeds):
        raise DitAttnError(f"--seeds must be between 0 and {flags.MAX_SEED}, got {text!r}")
    if len(set(seeds)) < len(seeds):
        raise DitAttnError(f"--seeds names a seed twice: {text!r}; every seed makes one item a prompt")
    return seeds


def wanted_metrics(options: dict[str, Any], embedded: bool) -> tuple[str, ...]:
    """The scores to compute besides PSNR and SSIM.

    Raises:
        DitAttnError: an unknown one.
    """
    from dit_attn.pipelines.compare.metrics import METRICS, WORLD

    if "metrics" not in options:
        return WORLD if embedded else ()
    names = [name.strip() for name in options["metrics"].split(",")]
    for name in names:
        if name not in (*METRICS, *ALWAYS):
            raise unknown("--metrics", name, (*METRICS, *ALWAYS))
    return tuple(dict.fromkeys(name for name in names if name in METRICS))


def _setting(args: argparse.Namespace) -> Setting:
    """Read and check the flags, without loading weights."""
    from dit_attn.cli import jobs as job_files
    from dit_attn.cli import load_pipeline, model_source
    from dit_attn.cli.commands.compare import config
    from dit_attn.cli.commands.compare import run as compare_run
    from dit_attn.pipelines.compare import comparison
    from dit_attn.pipelines.compare import metrics as quality

    options = _options(args)
    device = load_pipeline.pick_device(options.get("device", "auto"))
    load_pipeline.check_machine(options, device)
    load_pipeline.parse_loras(options.get("lora", []))
    load_pipeline.quiet(show_progress=False)
    model = model_source.describe(options["model"], options.get("revision"))
    options["metrics"] = wanted_metrics(options, model.kind == "embedded")
    variants = comparison.with_dense(_variants(options["method"], model, options.get("preset")))
    guided = any(method.role == "guidance" for variant in variants for method in variant.methods)
    if options.get("match_strength") and not guided:
        raise DitAttnError("--match-strength matches guidance methods, and none is compared; add --method softpag")
    jobs = _jobs(options, model)
    for variant in variants:
        job_files.check_calls([replace(job, call={**job.call, **dict(variant.call)}) for job in jobs], model.pipeline)
    quality.check(options["metrics"], compare_run.networks(options))
    dtype = load_pipeline.pick_dtype(options.get("dtype", "auto"), model, device)
    folder = Path(options.get("output") or Path("outputs") / f"compare-{Path(model.path).name}").expanduser()
    return config.new_setting(options, model, jobs, variants, device, dtype, folder, args.argv)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Flags over the configuration file; ``method`` is a list of texts."""
    given = {key: value for key, value in vars(args).items() if key not in ("command", "run", "argv")}
    known = [flag for group in _GROUPS.values() for flag in group]
    config = flags.read_config(given["config"], known) if "config" in given else {}
    if config.pop("set", None) is not None:
        raise DitAttnError("compare reads no `set` from the configuration file; write method: [NAME:KEY=VALUE, ...]")
    if any(key in given for key in ("prompt", "prompts", "held_out")):  # those of the command line replace the file's
        config = {key: value for key, value in config.items() if key not in ("prompt", "prompts", "held_out")}
    options = {**config, **given}
    if "model" not in options:
        raise DitAttnError("no model; give --model NAME (`dit-attn models` lists the embedded ones)")
    texts = options.get("method")
    if texts is None:
        raise DitAttnError("nothing to compare with dense; add --method NAME, e.g. --method block-sparse:density=0.25")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DitAttnError(f"method in the configuration file must be a list of NAME:KEY=VALUE texts, got {texts!r}")
    return {**options, "method": texts}


def _variants(texts: list[str], model: Source, preset: str | None) -> list[Variant]:
    from dit_attn.cli import method_options
    from dit_attn.pipelines.compare.records import Variant

    if model.transformer is None:
        raise DitAttnError(
            f"{model.pipeline.__name__} of {model.name} has no diffusion transformer, which methods need"
        )
    variants = []
    for text in texts:
        parts = split_method(text)
        call = {key: _value(value) for part in parts if part.name == CALL for key, value in part.settings.items()}
        found = method_options.resolve([part for part in parts if part.name != CALL], model.transformer, preset)
        variants.append(Variant(" ".join(text.split()), found, tuple(call.items())))
    return variants


def _value(text: str) -> Any:
    """A number, a truth value or a text, as YAML reads it."""
    import yaml

    return yaml.safe_load(text)


def _jobs(options: dict[str, Any], model: Source) -> list[Job]:
    """Every prompt with every seed, numbered through."""
    from dit_attn.cli import jobs as job_files

    if "held_out" in options:
        if "prompt" in options or "prompts" in options:
            raise DitAttnError("--held-out and prompts together are two sets of items; give one of them")
        if model.kind != "embedded":
            raise DitAttnError(
                f"--held-out {options['held_out']} is for embedded models, which know the shapes world, not for "
                f"{model.name}; give --prompts FILE"
            )
        from dit_attn.eval.shapes_world import world

        kind = "video" if "num_frames" in model.defaults else "image"
        captions = [world.caption(item) for item in world.held_out_sample(kind, options["held_out"])]
        options = {**options, "prompt": captions}
    jobs = job_files.make_jobs(options, model.defaults)
    if "seeds" not in options:
        return jobs
    for line, where in job_files.read_prompts(Path(options["prompts"]).expanduser()) if "prompts" in options else ():
        if "seed" in line:
            raise DitAttnError(
                f"--seeds {options['seeds']} and the seed {line['seed']} in {where} contradict each other; "
                "leave one of them out"
            )
    pairs = [(job, seed) for job in jobs for seed in parse_seeds(options["seeds"])]
    return [replace(job, index=index, seed=seed) for index, (job, seed) in enumerate(pairs)]


def _plan_text(setting: Setting) -> str:
    lines = [
        f"model     {setting.model.name}",
        f"folder    {setting.folder}",
        f"items     {len(setting.jobs)}, each made {len(setting.variants)} times",
        *(f"  {variant.label}" for variant in setting.variants),
    ]
    return "\n".join(lines + [f"  {job.stem}  {job.prompt!r}" for job in setting.jobs])


def table(results: dict[str, Any]) -> str:
    """The headline as text."""
    from dit_attn.eval.report.metric_labels import COLUMNS

    metrics = results["metrics"]
    rows = [("", "s/item", "speed-up [95 %]", "attention", "PSNR dB", "SSIM", "prompt met [95 %]", *metrics)]
    for row in results["headline"]:
        verifier = row["verifier"] or {}
        rows.append(
            (
                row["label"],
                figure(row["seconds"], 2),
                figure(row["speedup"], 2, interval=True),
                figure(row["attention_flops"], 0, 100.0, "%"),
                figure(row["psnr"], 1),
                figure(row["ssim"], 3),
                figure(verifier.get("whole"), 0, 100.0, "%", interval=True),
                *(figure(row["metrics"].get(name), COLUMNS[name].digits) for name in metrics),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def figure(data: dict[str, Any] | None, digits: int, scale: float = 1.0, unit: str = "", interval: bool = False) -> str:
    """A figure of the results as text, "-" when there is none."""
    if data is None or data["value"] is None:
        return "-"
    text = f"{scale * data['value']:.{digits}f}{unit}"
    if interval and data["ci95"]:
        low, high = data["ci95"]
        text += f" [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
    return text
