"""``dit-attn anomaly benchmark``: is a segmenter better with the pairs, and better than with what costs nothing?"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.cli.commands.anomaly import inputs
from dit_attn.cli.method_index import known_methods
from dit_attn.cli.model_source import fingerprint, locate
from dit_attn.cli.options import Options
from dit_attn.cli.progress import loading_libraries, progress_bar
from dit_attn.cli.table import Table, show
from dit_attn.errors import DitAttnError, unknown
from dit_attn.eval.inspection_world.defects import DEFECTS
from dit_attn.eval.inspection_world.products import PRODUCTS
from dit_attn.pipelines.anomaly.benchmark.arms import GENERATED, check_arms
from dit_attn.pipelines.anomaly.benchmark.tasks import NEW, OWN, SEEN, Task, check_images, given_tasks, world_tasks

QUICK: dict[str, Any] = {
    "k": [1, 5], "seeds": 3, "pairs": 24, "segmenter_steps": 150, "segmenter_width": 8, "normals": 40, "tests": 24,
    "traces": 8,
}  # fmt: skip
FULL: dict[str, Any] = {
    "k": [1, 3, 5, 10], "seeds": 5, "pairs": 200, "segmenter_steps": 1000, "segmenter_width": 16, "normals": 100,
    "tests": 60, "traces": 16,
}  # fmt: skip
SEEN_PAIRS = (("metal", "scratch"), ("granite", "crack"), ("nut", "stain"))
_ELSEWHERE = ("concept", "count", "per_defect", "mask_source", "roi", "controls", "format", "with_normals", "shots",
              "push_to_hub", "learn_masks", "mask_steps", "reweighting", "estimate",
              "gradient_checkpointing")  # fmt: skip


def benchmark(options: Options) -> int:
    """Measure; returns 0, or 130 after Ctrl-C.

    Raises:
        DitAttnError: a flag, an image, a mask or the model cannot be used.
    """
    inputs.check_model(options)
    inputs.reject(options, "benchmark", *_ELSEWHERE)
    arms = check_arms(options.get("arms", ()), tuple(known_methods()))
    chosen = {**(QUICK if options.get("quick") else FULL), **options.values}
    shots = tuple(sorted(set(chosen["k"])))
    given = "data" in options or "normal" in options
    size = chosen.get("segmenter_size", 256 if given else 64)
    if size % 8:
        raise DitAttnError(f"--segmenter-size {size} is no multiple of 8; give one")
    if importlib.util.find_spec("torchmetrics") is None:
        raise DitAttnError("the benchmark needs torchmetrics, which is not there: `pip install 'dit-attn[eval]'`")
    output = inputs.output_folder(options, "benchmark")
    tasks = _given(options, shots[-1]) if given else _world(options, output, shots[-1], chosen)
    if options.get("dry_run"):
        print(_plan(tasks, arms, shots, chosen))
        return 0
    log_file = output / "measurements.jsonl"
    if log_file.exists() and not options.get("resume"):
        raise DitAttnError(f"{output} already holds a benchmark; add --resume, or choose another --output")
    return _run(options, tasks, arms, shots, size, chosen, output)


def _run(
    options: Options, tasks: list[Task], arms: tuple[str, ...], shots: tuple[int, ...], size: int,
    chosen: dict[str, Any], output: Path,
) -> int:  # fmt: skip
    with loading_libraries(not options.get("json")):
        from dit_attn.pipelines.anomaly.benchmark.benchmark import Benchmark, BenchmarkConfig, setup_of
        from dit_attn.pipelines.anomaly.benchmark.segmenter import SegmenterConfig
        from dit_attn.pipelines.measurement_log import MeasurementLog
    train, generate = inputs.train_config(options), inputs.generate_config(options)
    segmenter = SegmenterConfig(
        size=size, width=chosen["segmenter_width"], steps=chosen["segmenter_steps"], flips=train.flips
    )
    config = BenchmarkConfig(
        arms, shots, chosen["seeds"], chosen["pairs"], chosen["traces"] if set(arms) & set(GENERATED) else 0, segmenter,
        train, generate,
    )  # fmt: skip
    kind, path, _ = locate(options["model"], options.get("revision"), options.get("variant"))
    model = {
        "name": options["model"],
        "fingerprint": options.get("revision", "main") if kind == "hub" else fingerprint(Path(path)),
    }
    files.user_path(output, "--output").mkdir(parents=True, exist_ok=True)
    cells = list(config.cells(tasks))
    with progress_bar(len(cells), "segmenters", "segmenter", not options.get("json")) as bar:
        log = MeasurementLog(
            output / "measurements.jsonl", setup_of(tasks, config, model), bool(options.get("resume")),
            on_result=lambda key: bar.update(),
        )  # fmt: skip
        bar.update(len(log.rows))
        backbone = inputs.load_backbone(options)

        def stage(text: str) -> None:
            bar.set_postfix_str(text)
            print(text, file=sys.stderr) if bar.disable and not options.get("json") else None

        found = Benchmark(backbone, tasks, config, output, log, model=options["model"], on_stage=stage)
        try:
            rows = found.run()
        except KeyboardInterrupt:
            print(f"stopped; what is measured is in {output}; continue with --resume", file=sys.stderr)
            return 130
    return _report(options, output, rows, {**log_facts(model, options), "tasks": [task.text for task in tasks]})


def log_facts(model: dict[str, Any], options: Options) -> dict[str, Any]:
    """Return what a record says besides its figures."""
    from dit_attn.cli.run_record import versions
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment

    command = shlex.join(["dit-attn", *options.argv])
    return {"model": model, "command": command, "commit": current_commit(), "environment": environment(),
            "versions": versions()}  # fmt: skip


def _given(options: Options, most: int) -> list[Task]:
    tasks = given_tasks(inputs.find_source(options, shots=True), most)
    check_images(tasks)
    return tasks


def _world(options: Options, output: Path, most: int, chosen: dict[str, Any]) -> list[Task]:
    """Tasks of the inspection world: the chosen products and defects, else three pairs of each kind, quick: one."""
    for flag, known in (("product", PRODUCTS), ("defect", DEFECTS)):
        for name in options.get(flag, ()):
            if name not in known:
                raise unknown(flag, name, known)
    for flag in ("defects", "masks"):
        if flag in options:
            raise DitAttnError(f"--{flag} without --normal; give --normal DIR too")
    from dit_attn.eval.inspection_world.world import HELD_OUT_PAIRS, pairs

    if "product" in options or "defect" in options:
        wanted = [
            (p, d) for p, d in (*pairs(), *HELD_OUT_PAIRS)
            if p in options.get("product", [p]) and d in options.get("defect", [d])
        ]  # fmt: skip
    else:
        few = 1 if options.get("quick") else None
        wanted = [*SEEN_PAIRS[:few], *HELD_OUT_PAIRS[:few]]
    trained = _is_tiny_inspect(options)
    named = [(p, d, (NEW if (p, d) in HELD_OUT_PAIRS else SEEN) if trained else OWN) for p, d in wanted]
    size = chosen.get("segmenter_size", 64)
    return world_tasks(
        output / "data", named, shots=most, size=size, normals=chosen["normals"], tests=chosen["tests"]
    )


def _is_tiny_inspect(options: Options) -> bool:
    """Whether the model was trained on the inspection world but for its held-out pairs."""
    _, path, _ = locate(options["model"], options.get("revision"), options.get("variant"))
    record = Path(path) / "training.json"
    try:
        return bool(files.parse_json(record.read_bytes())["name"] == "tiny-inspect")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _plan(tasks: list[Task], arms: tuple[str, ...], shots: tuple[int, ...], chosen: dict[str, Any]) -> str:
    lines = [f"{task.name}, {task.group}: {task.text}" for task in tasks]
    for task in tasks:
        if left := [str(k) for k in shots if k > task.most]:
            lines.append(f"{task.name}: k {', '.join(left)} is left out, there are {task.most} shots")
    used = sum(sum(k <= task.most for k in shots) for task in tasks) * chosen["seeds"]
    concepts = used if set(arms) & set(GENERATED) else 0
    painted = used * len(set(arms) & set(GENERATED)) * chosen["pairs"]
    return "\n".join([
        *lines, f"arms: {', '.join(arms)}",
        f"{used * len(arms)} segmenters of {chosen['segmenter_steps']} steps, {concepts} concepts, {painted} generated "
        "pairs",
    ])  # fmt: skip


def _report(options: Options, output: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> int:
    from dit_attn.eval.report.anomaly_benchmark_page import page
    from dit_attn.pipelines.anomaly.benchmark import benchmark as measuring
    from dit_attn.pipelines.anomaly.benchmark import figures

    table = figures.tabulate(rows)
    found = figures.verdicts(table)
    said = [*figures.sentences(found), *figures.trace_sentences(table)]
    record = {
        "what": "a segmenter trained on real shots and an arm's pairs, tested on real defects; equal steps, batches "
        "and numbers of pairs", **facts, "rule": figures.RULE, "seconds": measuring.mean_seconds(rows),
        "said": said, "table": table, "verdicts": found, "measurements": rows,
    }  # fmt: skip
    with files.report_os_error(f"write {output}", "free some space and go on with --resume"):
        files.write_json(output / "results.json", record)
        files.write_text(output / "index.html", page(record))
    if options.get("json"):
        print(json.dumps({"output": str(output), "said": said, "table": table}, indent=1))
        return 0
    for group in dict.fromkeys(row["group"] for row in table):
        show(_text_table(group, [row for row in table if row["group"] == group]))
    show(*said, f"written to {output}: results.json, index.html")
    return 0


def _text_table(group: str, rows: list[dict[str, Any]]) -> Table:
    from dit_attn.eval.report.anomaly_benchmark_page import METRICS, change
    from dit_attn.eval.report.digits import write_figure

    columns = ("arm", ">shots", *(f">{label}" for label in METRICS.values()), ">pixel AP over the shots alone")
    cells = [
        (row["arm"], str(row["shots"]), *(write_figure(row["scores"][name])[0] for name in METRICS),
         change(row, "none"))
        for row in rows
    ]  # fmt: skip
    return Table(columns, cells, title=group)
