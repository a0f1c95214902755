"""``dit-attn anomaly benchmark``: is a segmenter better with the pairs, and better than with what costs nothing?"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.cli import engines
from dit_attn.cli.commands.anomaly import inputs
from dit_attn.cli.commands.anomaly.benchmark_plan import BenchmarkPlan, describe, plan_of
from dit_attn.cli.model_source import fingerprint, locate
from dit_attn.cli.options import Options
from dit_attn.cli.progress import loading_libraries, progress_bar
from dit_attn.cli.table import Table, show
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.run import JobFailed

LOG = "measurements.jsonl"


def benchmark(options: Options) -> int:
    """Measure; returns 0, 1 where workers failed, or 130 after Ctrl-C.

    Raises:
        DitAttnError: a flag, an image, a mask or the model cannot be used.
    """
    plan = plan_of(options)
    if options.get("dry_run"):
        print(describe(plan))
        return 0
    log_file = plan.output / LOG
    if log_file.exists() and not options.get("resume"):
        raise DitAttnError(f"{plan.output} already holds a benchmark; add --resume, or choose another --output")
    return _run(options, plan)


def _run(options: Options, plan: BenchmarkPlan) -> int:
    with loading_libraries(not options.get("json")):
        from dit_attn.cli.commands.anomaly import on_workers
        from dit_attn.pipelines.anomaly.benchmark.benchmark import Benchmark, setup_of
        from dit_attn.pipelines.measurement_log import MeasurementLog
    config, tasks, output = plan.config(options), plan.tasks, plan.output
    kind, path, _ = locate(options["model"], options.get("revision"), options.get("variant"))
    model = {
        "name": options["model"],
        "fingerprint": options.get("revision", "main") if kind == "hub" else fingerprint(Path(path)),
    }
    files.user_path(output, "--output").mkdir(parents=True, exist_ok=True)
    cells = list(config.cells(tasks))
    trials = {(task.name, seed) for task, seed, _, _ in cells}
    with progress_bar(len(cells), "segmenters", "segmenter", not options.get("json")) as bar:
        log = MeasurementLog(
            output / LOG, setup_of(tasks, config, model), bool(options.get("resume")),
            on_result=lambda key: bar.update(),
        )  # fmt: skip
        bar.update(len(log.rows))
        engine, _ = engines.from_options(options)
        backbone = inputs.load_backbone(options) if engine is None else None

        def stage(text: str) -> None:
            bar.set_postfix_str(text)
            print(text, file=sys.stderr) if bar.disable and not options.get("json") else None

        saved = f"what is measured is in {output}; continue with --resume"
        try:
            with on_workers.answering(options, engine, "make_trials", output, len(trials)) as answers:
                found = Benchmark(
                    backbone, tasks, config, output, log, model=options["model"], on_stage=stage, answers=answers
                )
                rows = found.run()
        except KeyboardInterrupt:
            print(f"stopped; {saved}", file=sys.stderr)
            return 130
        except JobFailed as error:
            print(f"dit-attn: a measurement failed: {error}; {saved}", file=sys.stderr)
            return 1
    return _report(options, output, rows, {**log_facts(model, options), "tasks": [task.text for task in tasks]})


def log_facts(model: dict[str, Any], options: Options) -> dict[str, Any]:
    """Return what a record says besides its figures."""
    from dit_attn.cli.run_record import versions
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment

    command = shlex.join(["dit-attn", *options.argv])
    return {"model": model, "command": command, "commit": current_commit(), "environment": environment(),
            "versions": versions()}  # fmt: skip


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
