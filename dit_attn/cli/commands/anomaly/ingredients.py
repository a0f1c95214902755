"""What ``dit-attn anomaly generate`` makes pairs of, and the making in one process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn.cli import workers
from dit_attn.cli.commands.anomaly import timings
from dit_attn.cli.commands.anomaly.inputs import (
    counts_of,
    find_source,
    generate_config,
    load_backbone,
    masks_of,
    region_of,
)
from dit_attn.cli.options import Options
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly.concept import Concept
from dit_attn.pipelines.anomaly.generator import AnomalyGenerator, PairMaker, Region
from dit_attn.pipelines.anomaly.mask_drawer import MaskDrawer, check_mask_model
from dit_attn.pipelines.anomaly.masks import MaskSource
from dit_attn.pipelines.anomaly.orders import check_counts
from dit_attn.pipelines.anomaly.sources import Source

OnProgress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Ingredients:
    """What pairs are made of.

    Attributes:
        concept: of the defects.
        counts: pairs wanted, by (product, defect).
        masks: sources of masks, by (product, defect).
        source: of the normal images.
        roi: returns the region where defects may lie; the foreground where ``None``.
    """

    concept: Concept
    counts: dict[tuple[str, str], int]
    masks: dict[tuple[str, str], MaskSource]
    source: Source
    roi: Region | None = None

    def digest(self) -> str:
        """Hash of what decides the pairs besides the model and the flags: concept, masks and names of images."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.concept.state_dict().items()):
            found.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        for pair, masks in self.masks.items():
            found.update("+".join(pair).encode())
            for shape in masks.shapes:
                found.update(str(shape.shape).encode() + np.packbits(shape).tobytes())
        for product in dict.fromkeys(product for product, _ in self.counts):
            found.update("\n".join(str(path) for path in self.source.normals[product]).encode())
        return found.hexdigest()


def ingredients_of(options: Options) -> Ingredients:
    """Read and check what the flags name.

    Raises:
        DitAttnError: it cannot be used.
    """
    concept = Concept.load(options["concept"])
    counts = counts_of(options, [tuple(name.split("+", 1)) for name in concept.settings.pairs])
    check_counts(counts)
    source = find_source(options, shots=False, products=[product for product, _ in counts])
    for product, _ in counts:
        if not source.normals.get(product):
            raise DitAttnError(f"there are no normal images of {product!r}; give --normal DIR and --product {product}")
    masks = {pair: masks_of(options, concept, pair) for pair in counts}
    if options.get("mask_source") == "learned":
        for pair in counts:
            check_mask_model(concept, "+".join(pair))
    return Ingredients(concept, counts, masks, source, region_of(options.get("roi", "auto")))


def load_generator(options: Options, given: Ingredients) -> AnomalyGenerator:
    """Load the model; return a generator whose prompts are encoded."""
    backbone = load_backbone(options, given.concept.settings.resolution)
    config = generate_config(options)
    generator = AnomalyGenerator(backbone.pipe, given.concept, config, resolution=backbone.resolution)
    if options.get("mask_source") == "learned":
        drawer = MaskDrawer(generator.backbone, given.concept)
        for pair, learned in given.masks.items():
            learned.draw = drawer.of("+".join(pair))
    generator.encode_prompts(list(given.counts), free=True)
    return generator


def pair_maker(options: Options, output: Path, given: Ingredients) -> PairMaker:
    """Load the model; return what makes and writes requested pairs."""
    return PairMaker(load_generator(options, given), output, given.source.normals, given.masks, given.roi)


def make_here(options: Options, output: Path, given: Ingredients, on_progress: OnProgress) -> dict[str, Any]:
    """Make the pairs in this process, or its part of them under a launcher; return the summary.

    Args:
        options: the flags.
        output: folder of the run.
        given: what pairs are made of.
        on_progress: callback(finished, wanted, rejected).
    """
    generator = load_generator(options, given)
    backbone = generator.backbone
    watch = timings.Watch(options, "generate", backbone.resolution, generator.config.batch)
    _, worker = workers.join_workers(backbone.device, True)

    def step(done: int, wanted: int, rejected: int) -> None:
        on_progress(done, wanted, rejected)
        watch.update(done)

    summary = generator.run(
        output, given.source.normals, given.counts, given.masks, roi=given.roi, controls=options.get("controls", 4),
        on_progress=step, worker=worker,
    )  # fmt: skip
    if worker.rank == 0:
        watch.note()
    return summary
