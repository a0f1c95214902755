"""``dit-attn generate``: images and videos from prompts, with or without methods on the pipeline."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.cli import args as flags
from dit_attn.errors import DitAttnError

if TYPE_CHECKING:
    from dit_attn.cli.jobs import Job
    from dit_attn.cli.runner import Run
    from dit_attn.cli.source import Source
    from dit_attn.processors.method import Method

_GROUPS = {
    "model": flags.MODEL,
    "prompts": flags.PROMPT,
    "size": flags.SIZE,
    "sampling": flags.SAMPLING,
    "machine": flags.MACHINE,
    "output": flags.OUTPUT,
}
_EXAMPLES = """examples:
  dit-attn generate --model tiny-image --prompt "a large red circle at the left on white"
  dit-attn generate --model tiny-video --prompt "a large blue square moving right fast on white" \\
      --method block-sparse --set density=0.2
  dit-attn generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.jsonl --method block-sparse --resume
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``generate`` and return its parser."""
    parser = subparsers.add_parser(
        "generate",
        help="make images or videos from prompts",
        description="Make images or videos from prompts with a stock diffusers pipeline, with or without methods on it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, group in _GROUPS.items():
        flags.add_flags(parser, title, group)
    flags.add_method_flags(parser)
    parser.set_defaults(run=run)
    return parser


def merged_options(args: argparse.Namespace, groups: dict[str, tuple[flags.Flag, ...]]) -> tuple[dict[str, Any], Any]:
    """Flags over the configuration file: (options, the file's ``method`` and ``set``).

    Raises:
        DitAttnError: no model, or a bad configuration file.
    """
    given = {key: value for key, value in vars(args).items() if key not in ("command", "run", "argv", "words")}
    known = [flag for group in (*groups.values(), flags.METHOD) for flag in group]
    config = flags.read_config(given["config"], known) if "config" in given else {}
    options = {**{key: value for key, value in config.items() if key not in ("method", "set")}, **given}
    if ("prompt" in given) != ("prompts" in given):  # prompts of the command line replace those of the file
        options.pop("prompts" if "prompt" in given else "prompt", None)
    if "model" not in options:
        raise DitAttnError("no model; give --model NAME (`dit-attn models` lists the embedded ones)")
    return options, {key: config[key] for key in ("method", "set") if key in config}


def run(args: argparse.Namespace) -> int:
    """Check everything, load once, make every item. Returns 0, 1 when items failed, 130 after Ctrl-C.

    Raises:
        DitAttnError: bad input, before anything is loaded where that can be known.
    """
    options, config = merged_options(args, _GROUPS)
    from dit_attn.cli import jobs as job_files
    from dit_attn.cli import load, methods, outputs, runner, source

    wanted = methods.wanted_methods(getattr(args, "words", []), config)
    device = load.pick_device(options.get("device", "auto"))
    load.check_machine(options, device)
    load.parse_loras(options.get("lora", []))
    load.quiet(sys.stderr.isatty())
    model = source.describe(options["model"], options.get("revision"))
    chosen = _methods(wanted, model, options.get("preset"))
    jobs = job_files.make_jobs(options, model.defaults)
    job_files.check_calls(jobs, model.pipeline)
    dtype = load.pick_dtype(options.get("dtype", "auto"), model, device)
    setup = _setup(options, model, chosen, dtype)
    folder = Path(options.get("output") or _default_folder(model, chosen)).expanduser()
    if options.get("dry_run"):
        return _print_plan(options, jobs, setup, folder, str(device))
    outputs.prepare_folder(folder)
    done = runner.split_finished(jobs, folder, setup) if options.get("resume") else {}
    pipe, seconds = _load(model, options, device, dtype, chosen, needed=len(done) < len(jobs))
    live = runner.Run(
        pipe=pipe,
        methods=chosen,
        folder=folder,
        setup=setup,
        facts=_facts(args, model, pipe, device, seconds),
        fps=options.get("fps") or runner.frames_per_second(model.pipeline, model.kind == "embedded"),
    )
    return _make(live, jobs, done, options)


def _make(live: Run, jobs: list[Job], done: dict[int, Path], options: dict[str, Any]) -> int:
    from dit_attn.cli import outputs, runner, sheet

    with_sheet = options.get("contact_sheet", len(jobs) > 1)
    say = _silent if options.get("json") else print
    started = time.perf_counter()
    try:
        runner.run_jobs(live, jobs, done, with_sheet, say)
    except KeyboardInterrupt:
        kept = sum(result.status != "failed" for result in live.results)
        print(
            f"dit-attn: interrupted; {kept} of {len(jobs)} items are in {live.folder}; "
            "run the same command with --resume to go on",
            file=sys.stderr,
        )
        return 130
    if with_sheet and live.tiles:
        sheet.save(sheet.flow(live.tiles, _heading(live)), live.folder / "sheet.png")
        say(f"contact sheet: {live.folder / 'sheet.png'}")
    result = runner.report(live, time.perf_counter() - started)
    outputs.write_json(result, live.folder / "run.json")
    if options.get("json"):
        print(json.dumps(result, indent=1, default=str))
    elif live.methods and any(item.status == "done" for item in live.results):
        import dit_attn

        print(dit_attn.summary(live.pipe))
    failed = [item for item in live.results if item.status == "failed"]
    if failed:
        print(f"dit-attn: {len(failed)} of {len(jobs)} items failed:", file=sys.stderr)
        for item in failed:
            print(f"  {runner.describe_item(item, len(jobs))}", file=sys.stderr)
    return 1 if failed else 0


def _methods(wanted: list[Any], model: Source, preset: str | None) -> tuple[Method, ...]:
    from dit_attn.cli import methods

    if wanted and model.transformer is None:
        raise DitAttnError(
            f"{model.pipeline.__name__} of {model.name} has no diffusion transformer; methods need one: leave out --method"
        )
    return methods.resolve(wanted, model.transformer, preset)


def _load(
    model: Source, options: dict[str, Any], device: Any, dtype: Any, chosen: tuple[Method, ...], needed: bool
) -> tuple[Any, float]:
    """The pipeline with methods on it and the seconds that took; nothing when every item is there already."""
    import dit_attn
    from dit_attn.cli import load

    if not needed:
        return None, 0.0
    started = time.perf_counter()
    pipe = load.load_pipeline(model, options, device, dtype)
    if chosen:
        dit_attn.enable(pipe, *chosen)
    load.compile_pipeline(pipe, options.get("compile"))
    return pipe, time.perf_counter() - started


def _setup(options: dict[str, Any], model: Source, chosen: tuple[Method, ...], dtype: Any) -> dict[str, Any]:
    """What decides every output of the run besides the jobs."""
    return {
        "model": model.name,
        "revision": model.revision,
        "fingerprint": model.fingerprint,
        "pipeline": model.pipeline.__name__,
        "methods": [method.to_dict() for method in chosen],
        "dtype": str(dtype).removeprefix("torch."),
        "variant": options.get("variant"),
        "lora": options.get("lora", []),
        "attention_backend": options.get("attention_backend"),
    }


def _facts(args: argparse.Namespace, model: Source, pipe: Any, device: Any, seconds: float) -> dict[str, Any]:
    """What a sidecar says besides."""
    from dit_attn.cli import load, runner

    return {
        "commit": load.commit_of(pipe, model),
        "device": _device_name(device),
        "versions": runner.versions(),
        "command": shlex.join(["dit-attn", *args.argv]),
        "load_seconds": round(seconds, 3),
    }


def _device_name(device: Any) -> str:
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _default_folder(model: Source, chosen: tuple[Method, ...]) -> Path:
    name = "-".join([Path(model.name).name or "model", *(method.slug for method in chosen)] if chosen else [Path(model.name).name, "dense"])
    return Path("outputs") / name


def _print_plan(options: dict[str, Any], jobs: list[Job], setup: dict[str, Any], folder: Path, device: str) -> int:
    from dit_attn.cli import outputs

    items = [{"file": str(folder / job.stem), "prompt": job.prompt, "seed": job.seed, "call": job.call} for job in jobs]
    if options.get("json"):
        print(json.dumps({"folder": str(folder), "device": device, **setup, "items": items}, indent=1, default=str))
        return 0
    methods = "; ".join(outputs.to_json(method) for method in setup["methods"]) or "none (stock attention)"
    for key, value in (
        ("model", f"{setup['model']} ({setup['pipeline']}, {setup['dtype']}, {device})"),
        ("methods", methods),
        ("folder", folder),
        ("items", len(jobs)),
    ):
        print(f"{key:<10} {value}")
    for item in items:
        print(f"  {Path(item['file']).name}  {item['prompt']!r}  {outputs.to_json(item['call'])}")
    return 0


def _heading(live: Run) -> str:
    names = ", ".join(method.slug for method in live.methods) or "dense"
    return f"{live.setup['model']}   {names}"


def _silent(line: str) -> None:
    """Print nothing: ``--json`` owns standard output."""
