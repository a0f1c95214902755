"""Peak memory of learning a concept and making pairs, measured next to the estimate of the same run.

``python -m tests._support.anomaly_peak`` writes ``benchmarks/anomaly/estimate.json``: tiny-inspect, and a random PixArt
512 wide with 8 blocks, each in a process of its own, whose C library gives freed memory back at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests._support.other_environment import ROOT, versions, write_record

SUBJECTS = {"tiny-inspect": (64, 16), "pixart-512": (96, 4)}  # pixels, samples of a step
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def measure(subject: str, checkpointing: bool) -> dict[str, Any]:
    """Bytes that the process grew by at most, from before the model was there, and the estimate of that.

    Of pairs: the weights and what was added to all that learning had left behind.
    """
    import torch

    from dit_attn import models
    from dit_attn.cli.commands.anomaly.estimate import shape_of
    from dit_attn.models import nets
    from dit_attn.models.recipe import NetSize
    from dit_attn.pipelines.anomaly import (
        AnomalyGenerator,
        Backbone,
        GenerateConfig,
        MaskSource,
        TrainConfig,
        estimate,
        train,
    )
    from dit_attn.pipelines.anomaly.sources import from_folders
    from dit_attn.pipelines.benchmark import peak_memory
    from tests._support.inspection_pipelines import data, tiny_pipeline

    cpu = torch.device("cpu")
    size, batch = SUBJECTS[subject]
    config, pair = TrainConfig(steps=3, batch=batch), ("metal", "hole")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = from_folders(*data(folder / "data", size=size), *pair)
        small = TrainConfig(steps=2, batch=1, tokens=2, mask_tokens=1, lora_rank=2)
        train(Backbone(tiny_pipeline(), 32), source, small, folder / "before")  # libraries are there from now on
        peak_memory.reset(cpu)
        empty = peak_memory.read(cpu) or 0
        if subject == "tiny-inspect":
            pipe = models.load(subject)
        else:
            torch.manual_seed(0)
            net = NetSize(hidden=512, layers=8, heads=8, text_width=64, text_layers=1)
            tokenizer = nets.build_tokenizer("inspect", net.text_length)
            parts = nets.build_parts("image", len(tokenizer), net)
            pipe = nets.build_pipeline("image", {name: part.eval() for name, part in parts.items()}, tokenizer)
        pipe.set_progress_bar_config(disable=True)
        concept = train(Backbone(pipe, size), source, config, folder / "concept", checkpointing=checkpointing)
        learning = (peak_memory.read(cpu) or 0) - empty
        peak_memory.reset(cpu)
        left = (peak_memory.read(cpu) or 0) - sum(
            p.numel() * p.element_size() for part in (pipe.transformer, pipe.vae) for p in part.parameters()
        )
        pairs = GenerateConfig(steps=2, retries=0)
        masks = {pair: MaskSource("real", concept.shapes["+".join(pair)])}
        AnomalyGenerator(pipe, concept, pairs, resolution=size).run(
            folder / "pairs", source.normals, {pair: 8}, masks, controls=0
        )
        making = (peak_memory.read(cpu) or 0) - left
        nets.save_folder(pipe, folder / "model")
        shape = shape_of({"model": str(folder / "model"), "resolution": size, "device": "cpu"})
        expected = estimate.estimate_training(shape, config, 1, 1, checkpointing).peak
        made = estimate.estimate_generation(shape, pairs, concept.settings).peak
    return {
        "subject": subject, "pixels": size, "samples": batch, "checkpointing": checkpointing,
        "train": {"measured": learning, "estimated": expected, "ratio": round(expected / learning, 3)},
        "generate": {"measured": making, "estimated": made, "ratio": round(made / making, 3)},
    }  # fmt: skip


def computed() -> list[dict[str, Any]]:
    """Estimates of known models at their own size, bfloat16, which no machine of the tests could run."""
    from dit_attn.cli.commands.anomaly.estimate import shape_of
    from dit_attn.pipelines.anomaly import TrainConfig
    from dit_attn.pipelines.anomaly.estimate import estimate_training

    shapes = [shape_of({"model": name, "dtype": "bf16", "device": "cpu"}) for name in ("pixart-sigma", "flux")]
    return [
        estimate_training(shape, TrainConfig(), 1, 1, checkpointing).to_dict()
        for shape in shapes for checkpointing in (False, True)
    ]  # fmt: skip


def main() -> int:
    """Measure every subject in a process of its own and write the record."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], sys.argv[2] == "checkpointed")))
        return 0
    results = []
    for subject in SUBJECTS:
        for how in ("stored", "checkpointed"):
            command = [sys.executable, "-m", "tests._support.anomaly_peak", subject, how]
            told = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **_MALLOC}, check=True, stdout=subprocess.PIPE, text=True
            )
            results.append(json.loads(told.stdout.splitlines()[-1]))
            print(results[-1])
    what = "bytes by which the process grew at most from before the model was loaded, next to the estimate"
    used = versions(Path(sys.executable), str(ROOT))
    content = {"what": what, "versions": used, "environment": _MALLOC, "results": results, "computed": computed()}
    write_record(ROOT / "benchmarks/anomaly/estimate.json", "python -m tests._support.anomaly_peak", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
