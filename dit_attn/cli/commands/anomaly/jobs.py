"""Training and generation of ``dit-attn anomaly``: everything is checked before the model is loaded."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn import files
from dit_attn.cli import workers
from dit_attn.cli.commands.anomaly import estimate, timings
from dit_attn.cli.model_source import check_reachable, locate
from dit_attn.cli.options import Options
from dit_attn.cli.progress import loading_libraries, progress_bar
from dit_attn.errors import DitAttnError
from dit_attn.hub import check_repository
from dit_attn.pipelines.anomaly.exports import Pair, check_formats, export
from dit_attn.pipelines.anomaly.masks import MaskSource, foreground
from dit_attn.pipelines.anomaly.pixels import read_image, read_mask
from dit_attn.pipelines.anomaly.sources import Source, from_folders, from_tree, images_in


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
            print(_plan(source, options.get("train_steps", 200)))
            if options.get("learn_masks"):
                print(f"{options.get('mask_steps', 600)} optimizer steps for masks")
        return 0
    if (output / "checkpoint.pt").exists() and not options.get("resume"):
        raise DitAttnError(f"{output} already holds a training; add --resume, or choose another --output")
    from dit_attn.pipelines.anomaly import training

    config, resume = train_config(options), bool(options.get("resume"))
    training.check_batch(config.batch, processes)
    if _speaks(options):
        estimate.before(options, expected)
    backbone = load_backbone(options)
    watch = timings.Watch(options, "train", backbone.resolution, config.batch)
    try:
        with progress_bar(config.steps, "learn", "step", _speaks(options)) as bar:
            concept = training.train(
                backbone, source, config, output, model=options["model"], resume=resume, free_text=True,
                checkpointing=bool(options.get("gradient_checkpointing")),
                on_progress=lambda done, total, loss: (bar.update(done - bar.n), watch.update(done)),
            )  # fmt: skip
        if rank:
            return 0
        watch.note()
        if options.get("learn_masks"):
            _learn_masks(options, backbone, concept, output)
    except KeyboardInterrupt:
        _say(f"stopped; continue with the same command and --resume; see {output}")
        return 130
    path = output / "concept.safetensors"
    if "push_to_hub" in options:
        print(concept.push_to_hub(path, options["push_to_hub"]), file=sys.stderr)
    gates = {name: {"threshold": g["low"], "shots": g["shots"], "normal_under_mask": g["controls"]}
             for name, g in concept.settings.gate.items()}  # fmt: skip
    masks = concept.settings.mask_model
    if options.get("json"):
        usable = {"usable_masks": masks.usable} if masks else {}
        report = {"concept": str(path), "pairs": list(concept.settings.pairs), "gate": gates, **usable}
        print(json.dumps(report, indent=1))
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
    with progress_bar(config.steps, "learn masks", "step", not options.get("json")) as bar:
        learn_masks(
            backbone, concept, config, output, resume=bool(options.get("resume")),
            on_progress=lambda done, total, loss: bar.update(done - bar.n),
        )  # fmt: skip


def generate(options: Options) -> int:
    """Make pairs; returns 0, 1 where some are missing, or 130 after Ctrl-C."""
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
        from dit_attn.pipelines.anomaly.concept import Concept
        from dit_attn.pipelines.anomaly.generator import AnomalyGenerator
        from dit_attn.pipelines.anomaly.manifest import read_rows
        from dit_attn.pipelines.anomaly.mask_drawer import MaskDrawer, check_mask_model
        from dit_attn.pipelines.anomaly.orders import check_counts
    concept = Concept.load(options["concept"])
    counts = _counts(options, [tuple(name.split("+", 1)) for name in concept.settings.pairs])
    check_counts(counts)
    source = find_source(options, shots=False, products=[product for product, _ in counts])
    for product, _ in counts:
        if not source.normals.get(product):
            raise DitAttnError(f"there are no normal images of {product!r}; give --normal DIR and --product {product}")
    masks = {pair: _masks(options, concept, pair) for pair in counts}
    if options.get("mask_source") == "learned":
        for pair in counts:
            check_mask_model(concept, "+".join(pair))
    roi = _roi(options.get("roi", "auto"))
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
    config = generate_config(options)
    if _speaks(options):
        estimate.before(options, expected)
    files.user_path(output, "--output").mkdir(parents=True, exist_ok=True)
    backbone = load_backbone(options, concept.settings.resolution)
    watch = timings.Watch(options, "generate", backbone.resolution, config.batch)
    generator = AnomalyGenerator(backbone.pipe, concept, config, resolution=backbone.resolution)
    if options.get("mask_source") == "learned":
        drawer = MaskDrawer(generator.backbone, concept)
        for pair, learned in masks.items():
            learned.draw = drawer.of("+".join(pair))
    generator.encode_prompts(list(counts), free=True)
    _, worker = workers.join_workers(backbone.device, True)
    with progress_bar(total, "pairs", "pair", _speaks(options)) as bar:

        def step(done: int, wanted: int, rejected: int) -> None:
            bar.set_postfix(rejected=rejected, refresh=False)
            bar.update(done - bar.n)
            watch.update(done)

        try:
            summary = generator.run(
                output, source.normals, counts, masks, roi=roi, controls=options.get("controls", 4), on_progress=step,
                worker=worker,
            )  # fmt: skip
        except KeyboardInterrupt:
            _say(f"stopped; what is done is in {output}; continue with --resume")
            return 130
    if worker.rank:
        return 1 if _missing(summary) else 0
    watch.note()
    rows = read_rows(output / "manifest.jsonl")
    _export(output, rows, formats, source.normals if options.get("with_normals", True) else {})
    _pages(output, rows, summary, shlex.join(["dit-attn", *options.argv]))
    return _report(options, output, summary, formats)


def _speaks(options: Options) -> bool:
    """Whether this process prints: the first, unless it is to print JSON alone."""
    return not options.get("json") and workers.process_rank()[0] == 0


def _say(text: str) -> None:
    """Print on standard error, in the first process."""
    if workers.process_rank()[0] == 0:
        print(text, file=sys.stderr)


# -- what the flags name -----------------------------------------------------------------------------------------------


def check_model(options: Options) -> None:
    """Refuse a model that is not there; for an estimate a built-in shape will do."""
    if options.get("estimate"):
        return estimate.check_model(options)
    kind, path, _ = locate(options["model"], options.get("revision"), options.get("variant"))
    if kind == "hub":
        check_reachable(path, options.get("revision"))


def reject(options: Options, job: str, *names: str) -> None:
    """Refuse flags of other jobs."""
    for name in names:
        if name in options:
            raise DitAttnError(f"--{name.replace('_', '-')} is not for `anomaly {job}`; leave it out")


def find_source(options: Options, shots: bool, products: Sequence[str] = ()) -> Source:
    """Find the images that the flags name."""
    path = {name: files.user_path(options[name], f"--{name}") for name in ("normal", "defects", "masks", "data")
            if name in options}  # fmt: skip
    if ("data" in path) == ("normal" in path):
        raise DitAttnError("give either --data DIR, a known layout, or --normal DIR" + (" with --defects" * shots))
    if "data" in path:
        given = options.get("product", list(products))
        return from_tree(path["data"], options.get("shots"), given, options.get("defect", ()))
    names = options.get("product", list(dict.fromkeys(products)) or ["product"])
    if len(names) > 1:
        raise DitAttnError(f"--normal is of one product, and there are {', '.join(names)}; give --product NAME")
    if shots and "defects" not in path:
        raise DitAttnError("no defect images; give --defects DIR")
    defect = options.get("defect", ["defect"])
    if len(defect) > 1:
        raise DitAttnError("--defect names one type here; put the images of each type into a folder of its own")
    return from_folders(
        path["normal"], path.get("defects") if shots else None, path.get("masks"), names[0], defect[0]
    )


def _counts(options: Options, pairs: Sequence[Any]) -> dict[tuple[str, str], int]:
    """Quota of every pair: --per-defect of each, or --count in all."""
    wanted = [
        pair for pair in pairs
        if pair[0] in options.get("product", [pair[0]]) and pair[1] in options.get("defect", [pair[1]])
    ]  # fmt: skip
    if not wanted:
        raise DitAttnError(f"the concept has no such defect; it has {', '.join('+'.join(pair) for pair in pairs)}")
    if ("count" in options) == ("per_defect" in options):
        raise DitAttnError("give either --count N, pairs in all, or --per-defect N")
    if "per_defect" in options:
        return dict.fromkeys(wanted, options["per_defect"])
    share, rest = divmod(options["count"], len(wanted))
    return {pair: share + (i < rest) for i, pair in enumerate(wanted)}


def _masks(options: Options, concept: Any, pair: tuple[str, str]) -> MaskSource:
    kind = options.get("mask_source", "given" if "masks" in options else "real")
    if kind != "given":
        shapes = concept.shapes.get("+".join(pair), [])
        if not shapes:
            raise DitAttnError(f"the concept holds no masks of {'+'.join(pair)}; give --masks DIR")
        return MaskSource(kind, shapes)
    folder = files.user_path(options["masks"], "--masks")
    inside = folder / pair[1] if (folder / pair[1]).is_dir() else folder
    found = [read_mask(path, path) for path in images_in(inside)]
    if not found:
        raise DitAttnError(f"{inside} has no masks; check --masks")
    return MaskSource("given", found)


def _roi(text: str) -> Callable[[Path, np.ndarray], np.ndarray] | None:
    """The region of interest of an image, ``None`` for its foreground."""
    if text == "auto":
        return None
    if text == "none":
        return lambda path, pixels: np.ones(pixels.shape[:2], bool)
    place = files.user_path(text, "--roi")
    if not place.exists():
        raise DitAttnError(f"--roi {text}: there is no such file or folder; give auto, none, an image or a folder")
    regions = {path.stem: path for path in (images_in(place) if place.is_dir() else [place])}

    def region(path: Path, pixels: np.ndarray) -> np.ndarray:
        file = place if place.is_file() else regions.get(path.stem)
        if file is None:
            return foreground(pixels)
        found = read_image(file).max(-1)
        if found.shape != pixels.shape[:2]:
            raise DitAttnError(f"--roi {file} is of another size than {path.name}; they must be equal")
        return found > int(found.max()) / 2

    return region


def output_folder(options: Options, job: str) -> Path:
    """Return the folder of the run's files."""
    output = files.user_path(options.get("output", f"outputs/anomaly-{job}"), "--output")
    if output.is_file():
        raise DitAttnError(f"--output {output} is a file; give a folder")
    return output


def train_config(options: Options) -> Any:
    """Return how a concept is learned."""
    from dit_attn.pipelines.anomaly.training import TrainConfig

    names = {"train_steps": "steps", "train_batch": "batch", "prompt_template": "prompt",
             "normal_template": "normal_prompt"}  # fmt: skip
    given = options.pick("tokens", "mask_tokens", "lora_rank", "flips", "seed", "licence")
    given |= {field: options[name] for name, field in names.items() if name in options}
    return TrainConfig(**given)


def generate_config(options: Options) -> Any:
    """Return how pairs are made."""
    from dit_attn.pipelines.anomaly.orders import GenerateConfig

    given = {"guidance": options["guidance_scale"]} if "guidance_scale" in options else {}
    return GenerateConfig(**options.pick("steps", "batch", "retries", "crop", "reweighting", "seed"), **given)


def load_backbone(options: Options, resolution: int | None = None) -> Any:
    """Load the model."""
    from dit_attn.cli.load_pipeline import LoadConfig, load_pipeline
    from dit_attn.pipelines.anomaly.backbone import FAMILIES, Backbone

    config = LoadConfig.from_options(options)
    device, _ = workers.join_workers(config.device, "device" in options)
    config = replace(config, device=device)
    name = config.source.pipeline.__name__
    if name not in FAMILIES:
        raise DitAttnError(f"anomalies are not there yet for {name}; they are for {', '.join(sorted(FAMILIES))}")
    size = options.get("resolution", resolution or config.source.defaults.get("height"))
    with loading_libraries(_speaks(options)):
        pipe = load_pipeline(config)
    return Backbone(pipe, size)


def _plan(source: Source, steps: int) -> str:
    lines = []
    for product, defect in source.pairs:
        count = sum((shot.product, shot.defect) == (product, defect) for shot in source.shots)
        held = sum((shot.product, shot.defect) == (product, defect) for shot in source.held_out)
        lines.append(
            f"{product}+{defect}: {count} shots, {held} left alone, {len(source.normals[product])} normal images"
        )
    return "\n".join([*lines, f"{steps} optimizer steps"])


# -- what is written ---------------------------------------------------------------------------------------------------


def _export(
    output: Path, rows: list[dict[str, Any]], formats: Sequence[str], normals: Mapping[str, Sequence[Path]]
) -> None:
    pairs = []
    for row in rows:
        if row["decision"] == "accepted":
            image, mask = output / row["generated"], output / row["mask_file"]
            kept = {key: row[key] for key in ("product", "defect", "number", "seed", "concept", "source_image",
                                              "scores", "model", "licence")}  # fmt: skip
            pairs.append(Pair(image, read_mask(mask, image), row["product"], row["defect"], kept))
    pairs.sort(key=lambda pair: (pair.product, pair.defect, pair.row["number"]))
    for name in formats:
        export(output, name, pairs, normals)


def _pages(output: Path, rows: list[dict[str, Any]], summary: dict[str, Any], command: str) -> None:
    from dit_attn.cli import outputs
    from dit_attn.eval.report.anomaly_page import page
    from dit_attn.pipelines.anomaly.sheet import contact_sheet

    shown = [row for row in rows if row["decision"] == "accepted"][:48]
    if shown:
        outputs.write_image(contact_sheet(output, shown), output / "sheet.png")
    files.write_text(output / "index.html", page(output, rows, summary, command))


def _missing(summary: dict[str, Any]) -> int:
    return sum(one["missing"] for one in summary["pairs"].values())


def _report(options: Options, output: Path, summary: dict[str, Any], formats: Sequence[str]) -> int:
    missing = _missing(summary)
    if options.get("json"):
        print(json.dumps({"output": str(output), "formats": list(formats), **summary}, indent=1))
        return 1 if missing else 0
    for name, one in summary["pairs"].items():
        found = ", ".join(f"{key} {one[key]:.2f}" for key in ("ratio", "fill", "leak") if key in one)
        figures = f"; {found}" if found else ""
        print(f"{name}: {one['accepted']} of {one['wanted']} pairs, {one['rejected']} rejected{figures}")
        control = summary["controls"].get(name)
        if control:
            print(f"  control, prompt of the normal product: {control['accepted']} of {control['count']} accepted, "
                  f"ratio {control['ratio']:.2f}, fill {control['fill']:.2f}")  # fmt: skip
    print(f"written to {output}: {', '.join(formats)}, index.html")
    if missing:
        print(f"{missing} pairs are missing after their retries; give more --retries or another --guidance-scale")
    return 1 if missing else 0
