"""``dit-attn compare``: the same prompts and noise by dense and by methods; files, figures and a page."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.commands.compare import early
from dit_attn.cli.commands.compare.same_work import same_work
from dit_attn.cli.progress import loading_libraries
from dit_attn.cli.table import Table, fields, show

if TYPE_CHECKING:
    from dit_attn.cli.commands.compare.config import CompareConfig
    from dit_attn.pipelines.run import Shard
    from dit_attn.remote import Place

_OWN = (
    flags.Flag("seeds", "seeds of every prompt, e.g. 0,1", default="item i gets 42 + i", metavar="N,N"),
    flags.Flag("held-out", "so many held-out captions of the shapes world, for embedded models", int, low=1),
    flags.Flag("metrics", "scores besides PSNR and SSIM, e.g. fid-world,clip-world,lpips; none turns them off",
               default="fid-world,clip-world for embedded models, else none", metavar="NAME,NAME"),
    flags.Flag("inception", "weights of the Inception network, for fid and kid", metavar="FILE", exists=True),
    flags.Flag("clip", "folder or Hub name of a CLIP model, for clip", default="openai/clip-vit-large-patch14",
               metavar="MODEL"),
    flags.Flag("lpips", "backbone of LPIPS", default="alex", choices=("alex", "vgg", "squeeze")),
    flags.Flag("lpips-weights", "torchvision's weights of that backbone", default="its cache", metavar="FILE",
               exists=True),
    flags.Flag("match-strength", "for every guidance method, also the guidance scale that moves the prediction as far "
               "along c - u", bool),
    flags.Flag("maps", "map density and error of every layer and step on the first item", "on-or-off", "on"),
    flags.Flag("show", "items on the page; all of them are in the folder", int, "24", low=1),
)  # fmt: skip
GROUPS = {
    "model": (*flags.MODEL, *flags.WEIGHTS),
    "methods": flags.PRESET,
    "prompts": flags.PROMPT,
    "comparison": _OWN,
    "size": flags.SIZE,
    "sampling": flags.without(flags.SAMPLING, "seed", "num-images-per-prompt"),
    "output": flags.without(flags.ADDRESS_OUTPUT, "contact-sheet"),
    "run": flags.without(flags.RUN, "compile"),
    "workers": flags.ENGINE,
}
_METHOD = f"{parsers.VARIANTS}. call:KEY=VALUE changes an argument of the pipeline's call for this variant (required)"
_EXAMPLES = """examples:
  dit-attn compare --model tiny-image --held-out 32 \\
      --method block-sparse:density=0.5 --method block-sparse:density=0.25
  dit-attn compare --model tiny-image --held-out 8 \\
      --method "call:guidance_scale=1 + softpag:heads=3" --match-strength
  dit-attn compare --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --seeds 0,1 \\
      --prompts prompts.txt --method block-sparse:density=0.25,dense_steps=0.1 \\
      --output outputs/wan --resume
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``compare``."""
    parsers.describe(
        parser,
        "compare --model NAME --prompts FILE --method NAME [options]",
        "Make every prompt dense and with every method, from the same noise and in turns, and write the files, "
        "results.json and report.html. Dense is always included.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS, _METHOD)


def run(args: argparse.Namespace) -> int:
    """Check everything, load once, make what is missing, write the figures and the page.

    Returns:
        0, 1 when items failed, 130 after Ctrl-C.

    Raises:
        DitAttnError: bad input, before anything is loaded where that can be known.
    """
    options = flags.merge(args, GROUPS, replaced=("prompt", "prompts", "held_out"))
    early.check(options)
    with loading_libraries(not options.get("json")):
        from dit_attn.cli.commands.compare import run as compare_run
        from dit_attn.cli.commands.compare.config import CompareConfig
        from dit_attn.cli.commands.compare.run_all import run_all

    config = CompareConfig.from_options(options)
    if config.dry_run:
        if config.json:
            print(json.dumps(compare_run.plan(config), indent=1))
        else:
            _show_plan(config)
        return 0
    try:
        results = run_all(config)
    except KeyboardInterrupt:
        print(
            f"dit-attn: interrupted; finished items are in {config.folder}; "
            "run the same command with --resume to go on",
            file=sys.stderr,
        )
        return 130
    return report(results, config.folder, config.json, config.shard)


def report(results: dict[str, Any], folder: Place, as_json: bool, shard: Shard | None = None) -> int:
    """Print what a comparison, or a part of one, has found. Returns 0, 1 when items failed."""
    from dit_attn.cli import runner

    if as_json:
        print(json.dumps(results, indent=1, default=str))
    elif shard is not None:
        print(f"part {shard} is in {folder}; `dit-attn merge {folder}` writes the results when all parts are there")
    else:
        places = {"figures": folder / "results.json", "page": folder / "report.html"}
        show(summary_table(results), *same_work(results), "", verdict_table(results), "", fields(places))
    runner.warn((text for item in results["takes"] for text in item["warnings"]), len(results["takes"]))
    failed = [item for item in results["takes"] if item["error"]]
    if failed:
        print(f"dit-attn: {len(failed)} of {len(results['takes'])} items failed:", file=sys.stderr)
        for item in failed:
            print(f"  {item['variant']}, {item['prompt']!r}, seed {item['seed']}: {item['error']}", file=sys.stderr)
    return 1 if failed else 0


def _show_plan(config: CompareConfig) -> None:
    from dit_attn.cli import run_record

    setup = {key: value for key, value in run_record.describe_setup(config.dense).items() if key != "methods"}
    items = f"{len(config.jobs)}, each made {len(config.variants)} times"
    planned = [(job.stem, repr(job.prompt)) for job in config.jobs]
    show(
        fields({**setup, "folder": config.folder, "items": items}),
        "",
        Table(("variant",), [(variant.label,) for variant in config.variants]),
        "",
        Table(("item", "prompt"), planned, folded=("prompt",)),
    )


def summary_table(results: dict[str, Any]) -> Table:
    """Return one row per variant: time, speed-up, fidelity and metrics."""
    from dit_attn.eval.report.metric_labels import COLUMNS

    metrics = results["metrics"]
    columns = ("variant", ">s/item", ">speed-up [95 %]", ">attention", ">PSNR dB", ">SSIM", ">prompt met [95 %]")
    rows = []
    for row in results["headline"]:
        verifier = row["verifier"] or {}
        rows.append(
            (
                row["label"],
                _figure(row["seconds"], 2),
                _figure(row["speedup"], 2, interval=True),
                _figure(row["attention_flops"], 0, 100.0, "%"),
                _figure(row["psnr"], 1),
                _figure(row["ssim"], 3),
                _figure(verifier.get("whole"), 0, 100.0, "%", interval=True),
                *(_figure(row["metrics"].get(name), COLUMNS[name].digits) for name in metrics),
            )
        )
    return Table((*columns, *(f">{name}" for name in metrics)), rows, folded=("variant",))


def verdict_table(results: dict[str, Any]) -> Table:
    """Return what each method is worth, best first, under the headline; the words are those of the page."""
    from dit_attn.eval.report.verdict import headline, verdicts

    found = verdicts(results["headline"], results["prompts"])
    rows = [(one.chip, one.label, one.sentence) for one in found]
    title = headline(found, results["prompts"], results["attention_share"])
    return Table(("verdict", "variant", "why"), rows, title, folded=("variant", "why"))


def _figure(
    data: dict[str, Any] | None, digits: int, scale: float = 1.0, unit: str = "", interval: bool = False
) -> str:
    """Return a figure of the results as text, "-" when there is none."""
    if data is None or data["value"] is None:
        return "-"
    text = f"{scale * data['value']:.{digits}f}{unit}"
    if interval and data["ci95"] and data["ci95"][0] < data["ci95"][1]:
        low, high = data["ci95"]
        text += f" [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
    return text
