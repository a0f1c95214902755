"""``dit-attn generate``: images and videos from prompts, with or without methods on the pipeline."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.cli import options as flags
from dit_attn.errors import DitAttnError, RunStopped

if TYPE_CHECKING:
    from dit_attn.cli.jobs import Job
    from dit_attn.cli.model_source import Source
    from dit_attn.cli.runner import Run
    from dit_attn.processors.methods.base import Method

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
        description="Make images or videos from prompts with a stock diffusers pipeline.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, group in _GROUPS.items():
        flags.add_flags(parser, title, group)
    flags.add_method_flags(parser)
    parser.set_defaults(run=run)
    return parser


def merged_options(
    args: argparse.Namespace, more: Sequence[flags.Flag] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flags over the configuration file: (options, the file's ``method`` and ``set``).

    One file serves every command: flags that the command does not have are ignored, unknown ones are not. ``more`` are
    flags that only the command itself has.

    Raises:
        DitAttnError: no model, or a bad configuration file.
    """
    given = {key: value for key, value in vars(args).items() if key not in ("command", "run", "argv", "words")}
    known = [flag for group in (*_GROUPS.values(), flags.METHOD, more) for flag in group]
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
    options, config = merged_options(args)
    from dit_attn.cli import jobs as job_files
    from dit_attn.cli import load_pipeline, method_options, model_source, outputs, runner

    wanted = method_options.wanted_methods(getattr(args, "words", []), config)
    device = load_pipeline.pick_device(options.get("device", "auto"))
    load_pipeline.check_machine(options, device)
    load_pipeline.parse_loras(options.get("lora", []))
    load_pipeline.quiet(sys.stderr.isatty())
    model = model_source.describe(options["model"], options.get("revision"), options.get("variant"))
    load_pipeline.check_adapters(options, model)
    chosen = _methods(wanted, model, options.get("preset"))
    jobs = job_files.make_jobs(options, model.defaults)
    job_files.check_calls(jobs, model.pipeline)
    _check_without_weights(jobs, model)
    dtype = load_pipeline.pick_dtype(options.get("dtype", "auto"), model, device)
    folder = outputs.folder_of(options.get("output"), _default_folder(model, chosen))
    live = runner.new_run(None, model, chosen, options, dtype, device, folder, args.argv)
    if options.get("dry_run"):
        return _print_plan(live, jobs, options.get("json", False))
    outputs.prepare_folder(folder)
    done = runner.find_finished(jobs, folder, live.setup) if options.get("resume") else {}
    if len(done) < len(jobs):
        _load(live, model, options, device, dtype)
        job_files.check_inputs(jobs, live.pipe)
    return _make(live, jobs, done, options)


def _make(live: Run, jobs: list[Job], done: dict[int, Path], options: dict[str, Any]) -> int:
    from dit_attn import contact_sheet
    from dit_attn.cli import outputs, runner

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
    unwritten = None
    try:
        if with_sheet and live.tiles:
            outputs.write_image(contact_sheet.flow(live.tiles, _heading(live)), live.folder / "sheet.png")
            say(f"contact sheet: {live.folder / 'sheet.png'}")
        result = runner.report(live, time.perf_counter() - started)
        outputs.write_json(result, live.folder / "run.json")
    except RunStopped as error:  # the items are whole all the same: say what became of them first
        unwritten = error
        result = runner.report(live, time.perf_counter() - started)
    if options.get("json"):
        print(json.dumps(result, indent=1, default=str))
    elif live.methods and any(item.status == "done" for item in live.results):
        import dit_attn

        print(dit_attn.summary(live.pipe))
    runner.warn((text for item in live.results for text in item.warnings), len(jobs))
    failed = [item for item in live.results if item.status == "failed"]
    if failed:
        print(f"dit-attn: {len(failed)} of {len(jobs)} items failed:", file=sys.stderr)
        for item in failed:
            print(f"  {runner.describe_item(item, len(jobs))}", file=sys.stderr)
    if unwritten is not None:
        raise unwritten
    return 1 if failed else 0


def _check_without_weights(jobs: list[Job], model: Source) -> None:
    """Sizes and the like, by the pipeline's own rules, before anything is downloaded or loaded."""
    from dit_attn.cli import jobs as job_files
    from dit_attn.cli import model_source

    try:
        pipe = model_source.skeleton(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return  # loading says what is damaged
    job_files.check_inputs(jobs, pipe)


def _methods(wanted: list[Any], model: Source, preset: str | None) -> tuple[Method, ...]:
    from dit_attn.cli import method_options

    if wanted and model.transformer is None:
        raise DitAttnError(
            f"{model.pipeline.__name__} of {model.name} has no diffusion transformer, which methods need; "
            "leave out --method"
        )
    return method_options.resolve(wanted, model.transformer, preset)


def _load(live: Run, model: Source, options: dict[str, Any], device: Any, dtype: Any) -> None:
    """Give the run its pipeline, with the methods on it."""
    import dit_attn
    from dit_attn.cli import load_pipeline

    started = time.perf_counter()
    live.pipe = load_pipeline.load_pipeline(model, options, device, dtype)
    if live.methods:
        dit_attn.enable(live.pipe, *live.methods)
    else:
        with suppress(DitAttnError):  # a family that cannot be watched is generated with all the same
            dit_attn.watch(live.pipe)
            live.watched = True
    load_pipeline.compile_pipeline(live.pipe, options.get("compile"))
    live.facts["commit"] = load_pipeline.commit_of(model)
    live.facts["load_seconds"] = round(time.perf_counter() - started, 3)


def _default_folder(model: Source, chosen: tuple[Method, ...]) -> Path:
    """``outputs/MODEL-METHOD``: the same command finds its own outputs again."""
    parts = [Path(model.path).name or "model", *([method.slug for method in chosen] or ["dense"])]
    return Path("outputs") / "-".join(parts)


def _print_plan(live: Run, jobs: list[Job], as_json: bool) -> int:
    from dit_attn.cli import outputs

    items = [{"name": job.stem, "prompt": job.prompt, "seed": job.seed, "call": job.call} for job in jobs]
    if as_json:
        print(json.dumps({"folder": str(live.folder), **live.setup, **live.facts, "items": items}, indent=1))
        return 0
    setup = live.setup
    rows = {
        "model": f"{setup['model']} ({setup['pipeline']}, {setup['dtype']}, {live.facts['device']})",
        "methods": "; ".join(outputs.to_json(method) for method in setup["methods"]) or "none (stock attention)",
        "folder": str(live.folder),
        "items": str(len(jobs)),
    }
    print("\n".join(f"{key:<10}{value}" for key, value in rows.items()))
    for item in items:
        print(f"  {item['name']}  {item['prompt']!r}  {outputs.to_json(item['call'])}")
    return 0


def _heading(live: Run) -> str:
    names = ", ".join(method.slug for method in live.methods) or "dense"
    return f"{live.setup['model']}   {names}"


def _silent(line: str) -> None:
    """Print nothing: ``--json`` owns standard output."""
