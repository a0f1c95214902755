"""Training and generation of ``dit-attn anomaly``: everything is checked before the model is loaded."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn import files
from dit_attn.cli import engines, workers
from dit_attn.cli.commands.anomaly import estimate, timings
from dit_attn.cli.commands.anomaly.inputs import (
    check_model,
    find_source,
    generate_config,
    load_backbone,
    output_folder,
    plan_of,
    reject,
    say,
    speaks,
    train_config,
)
from dit_attn.cli.commands.anomaly.written import count_missing, export_pairs, report, write_pages
from dit_attn.cli.options import Options
from dit_attn.cli.progress import loading_libraries, progress_bar
from dit_attn.errors import DitAttnError
from dit_attn.hub import check_repository
from dit_attn.pipelines.anomaly.exports import check_formats
from dit_attn.pipelines.run import JobFailed


def train(options: Options) -> int:
    """Learn the defects; returns 0, or 130 after Ctrl-C."""
    check_model(options)
    reject(options, "train", "concept", "count", "per_defect")
    if "mask_steps" in options and not options.get("learn_masks"):
        raise DitAttnError("--mask-steps without --learn-masks; add --learn-masks, or leave it out")
    if "push_to_hub" in options:
        check_repository(options["push_to_hub"])

    def expected(shape: Any) -> Any:
        return estimate.of_training(shape, options, train_config(options), len(source.pairs) if source else 1)

    without_data = options.get("estimate") and "data" not in options and "normal" not in options
    source = None if without_data else find_source(options, shots=True)
    if source is None:
        return estimate.show(options, expected)
    source.check()
    output = output_folder(options, "train")
    rank, processes = workers.process_rank()
    if options.get("estimate"):
        return estimate.show(options, expected)
    if options.get("dry_run"):
        if rank == 0:
            print(plan_of(source, options.get("train_steps", 200)))
            if options.get("learn_masks"):
                print(f"{options.get('mask_steps', 600)} optimizer steps for masks")
        return 0
    if (output / "checkpoint.pt").exists() and not options.get("resume"):
        raise DitAttnError(f"{output} already holds a training; add --resume, or choose another --output")
    from dit_attn.pipelines.anomaly import training

    config, resume = train_config(options), bool(options.get("resume"))
    training.check_batch(config.batch, processes)
    if speaks(options):
        estimate.before(options, expected)
    backbone = load_backbone(options)
    watch = timings.Watch(options, "train", backbone.resolution, config.batch)
    try:
        with progress_bar(config.steps, "learn", "step", speaks(options)) as bar:

            def step(done: int, total: int, loss: float) -> None:
                bar.update(done - bar.n)
                watch.update(done)

            concept = training.train(
                backbone, source, config, output, model=options["model"], resume=resume, free_text=True,
                checkpointing=bool(options.get("gradient_checkpointing")), on_progress=step,
            )  # fmt: skip
        if rank:
            return 0
        watch.note()
        if options.get("learn_masks"):
            _learn_masks(options, backbone, concept, output)
    except KeyboardInterrupt:
        say(f"stopped; continue with the same command and --resume; see {output}")
        return 130
    path = output / "concept.safetensors"
    if "push_to_hub" in options:
        print(concept.push_to_hub(path, options["push_to_hub"]), file=sys.stderr)
    gates = {name: {"threshold": g["low"], "shots": g["shots"], "normal_under_mask": g["controls"]}
             for name, g in concept.settings.gate.items()}  # fmt: skip
    masks = concept.settings.mask_model
    if options.get("json"):
        usable = {"usable_masks": masks.usable} if masks else {}
        learned = {"concept": str(path), "pairs": list(concept.settings.pairs), "gate": gates, **usable}
        print(json.dumps(learned, indent=1))
    else:
        for name, gate in gates.items():
            control, ratios = gate["normal_under_mask"], gate["shots"]
            count = f"{len(ratios)} shot{'' if len(ratios) == 1 else 's'}"
            print(
                f"{name}: {count}, ratio {np.mean(ratios):.2f}; normal images under the same "
                f"masks {control['mean']:.2f}, 95 % below {control['q95']:.2f}; accepted from {gate['threshold']:.2f}"
            )
        for name, share in masks.usable.items() if masks else ():
            print(f"{name}: {share:.0%} of the masks drawn for a trial can be used")
        print(f"concept written to {path}")
    return 0


def _learn_masks(options: Options, backbone: Any, concept: Any, output: Path) -> None:
    from dit_attn.pipelines.anomaly.mask_training import MaskTrainConfig, learn_masks

    names = {"mask_steps": "steps", "lora_rank": "lora_rank", "flips": "flips", "seed": "seed"}
    config = MaskTrainConfig(**{field: options[name] for name, field in names.items() if name in options})
    with progress_bar(config.steps, "learn masks", "step", speaks(options)) as bar:
        learn_masks(
            backbone, concept, config, output, resume=bool(options.get("resume")),
            on_progress=lambda done, total, loss: bar.update(done - bar.n),
        )  # fmt: skip


def generate(options: Options) -> int:
    """Make pairs; returns 0, 1 where some are missing or workers failed a batch, or 130 after Ctrl-C."""
    check_model(options)
    reject(options, "generate", "defects", "learn_masks", "mask_steps", "push_to_hub")
    if "concept" not in options and options.get("estimate"):
        total = options.get("count", options.get("per_defect", 1))
        return estimate.show(options, lambda shape: estimate.of_pairs(shape, options, generate_config(options), total))
    if "concept" not in options:
        raise DitAttnError("no concept; give --concept FILE, which `dit-attn anomaly train` writes")
    formats = options.get("format", ["mvtec"])
    check_formats(formats)
    if options.get("mask_source") == "given" and "masks" not in options:
        raise DitAttnError("--mask-source given needs the masks; give --masks DIR")
    with loading_libraries(not options.get("json")):
        from dit_attn.cli.commands.anomaly import on_workers
        from dit_attn.cli.commands.anomaly.ingredients import ingredients_of, make_here
        from dit_attn.pipelines.anomaly.manifest import read_rows
    given = ingredients_of(options)
    concept, counts, source = given.concept, given.counts, given.source
    output = output_folder(options, "generate")
    if any(output.glob("manifest*.jsonl")) and not options.get("resume"):
        raise DitAttnError(f"{output} already holds pairs; add --resume, or choose another --output")
    total = sum(counts.values())

    def expected(shape: Any) -> Any:
        return estimate.of_pairs(shape, options, generate_config(options), total, concept.settings)

    if options.get("estimate"):
        return estimate.show(options, expected)
    if options.get("dry_run"):
        if workers.process_rank()[0] == 0:
            for (product, defect), count in counts.items():
                print(f"{product}+{defect}: {count} pairs on {len(source.normals[product])} normal images")
        return 0
    if speaks(options):
        estimate.before(options, expected)
    files.user_path(output, "--output").mkdir(parents=True, exist_ok=True)
    saved = f"what is done is in {output}; continue with --resume"
    engine, _ = engines.from_options(options)
    with progress_bar(total, "pairs", "pair", speaks(options)) as bar:

        def step(done: int, wanted: int, rejected: int) -> None:
            bar.set_postfix(rejected=rejected, refresh=False)
            bar.update(done - bar.n)

        try:
            if engine is not None:
                summary = on_workers.make_pairs(options, engine, output, given, step)
            else:
                summary = make_here(options, output, given, step)
        except KeyboardInterrupt:
            say(f"stopped; {saved}")
            return 130
        except JobFailed as error:
            print(f"dit-attn: a batch failed: {error}; {saved}", file=sys.stderr)
            return 1
    if workers.process_rank()[0]:
        return 1 if count_missing(summary) else 0
    rows = read_rows(output / "manifest.jsonl")
    export_pairs(output, rows, formats, source.normals if options.get("with_normals", True) else {})
    write_pages(output, rows, summary, shlex.join(["dit-attn", *options.argv]))
    return report(options, output, summary, formats)
