"""Make image-mask pairs: normal image, mask, learned anomaly, blended sampling, gate, files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_attn.api import resolve
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly.backbone import Backbone
from dit_attn.pipelines.anomaly.concept import Concept
from dit_attn.pipelines.anomaly.gate import Gate
from dit_attn.pipelines.anomaly.masks import MaskSource, foreground
from dit_attn.pipelines.anomaly.orders import GenerateConfig, Made, Order, seed_of
from dit_attn.pipelines.anomaly.painter import Painter
from dit_attn.pipelines.anomaly.pixels import read_image, write_png
from dit_attn.pipelines.anomaly.quotas import fill_quotas, gate_of
from dit_attn.pipelines.anomaly.views import View, view_of
from dit_attn.pipelines.run import answered_here
from dit_attn.pipelines.worker_share import WorkerShare
from dit_attn.processors.methods.adaptive_reweighting import AdaptiveReweighting

Region = Callable[[Path, np.ndarray], np.ndarray]
"""Returns where defects may lie, (H, W) bool, from a file and its pixels."""


class AnomalyGenerator:
    """Make pairs with a stock pipeline and a learned concept.

    Args:
        pipe: the stock pipeline that the concept was learned on.
        concept: a :class:`~dit_attn.pipelines.anomaly.concept.Concept`, a file of one, or ``None``: the words alone.
        config: how.
        resolution: pixels at which the model works; that of the concept where ``None``.
        prompt, normal_prompt: templates; those of the concept where ``None``.
        methods: of :func:`dit_attn.enable`, for the time of the calls.

    Raises:
        DitAttnError: a pipeline that is not there yet, or one that the concept was not learned on; re-weighting without
            a concept.
    """

    def __init__(
        self,
        pipe: Any,
        concept: Concept | str | Path | None = None,
        config: GenerateConfig | None = None,
        *,
        resolution: int | None = None,
        prompt: str | None = None,
        normal_prompt: str | None = None,
        methods: Sequence[Any] = (),
    ):
        self.concept = Concept.load(concept) if isinstance(concept, (str, Path)) else concept
        settings = self.concept.settings if self.concept is not None else None
        self.backbone = Backbone(pipe, resolution or (settings.resolution if settings else None))
        self.config = config or GenerateConfig()
        prompt = prompt or (settings.prompt if settings else "{product} with a {defect}")
        normal_prompt = normal_prompt or (settings.normal_prompt if settings else "normal {product}")
        if self.concept is not None:
            self.concept.check_model(self.backbone)
            self.concept.to(self.backbone.device).requires_grad_(False)
        chosen = resolve(pipe, *methods, *self._reweighting())
        if AdaptiveReweighting.among(chosen) is not None and self.concept is None:
            raise DitAttnError("re-weighting is for the learned vectors of a concept; give one, or leave it off")
        self.methods = chosen
        self.painter = Painter(self.backbone, self.concept, self.config, prompt, normal_prompt, chosen)

    def _reweighting(self) -> tuple[AdaptiveReweighting, ...]:
        mode = self.config.reweighting
        return () if mode == "off" else (AdaptiveReweighting(mode=mode),)

    def gate(self, product: str, defect: str) -> Gate | None:
        """Return the gate of a pair, ``None`` where the concept has none."""
        return gate_of(self.concept, product, defect)

    def encode_prompts(self, pairs: Sequence[tuple[str, str]], free: bool = False) -> None:
        """Encode the prompts of some pairs now, and drop the text encoders if ``free``."""
        self.painter.encode_prompts(pairs, free)

    def make(self, orders: Sequence[Order], *, control: bool = False) -> list[Made]:
        """Make one pair per order, as many at once as there are.

        Args:
            orders: what to make.
            control: use the prompt of the normal product and no concept: what painting alone does.
        """
        backbone, config = self.backbone, self.config
        views = [view_of(order.mask, backbone.resolution, config.crop) for order in orders]
        images = torch.stack([view.image(order.pixels) for view, order in zip(views, orders)])
        masks = torch.stack([view.mask(order.mask) for view, order in zip(views, orders)])
        painted = self.painter.paint(orders, images, masks, control)
        return [self._finished(*one) for one in zip(orders, views, painted)]

    def _finished(self, order: Order, view: View, painted: torch.Tensor) -> Made:
        image = view.paste(painted, order.pixels, order.mask, self.config.feather)
        gate = self.gate(order.product, order.defect)
        if gate is None:
            return Made(order, image, None, "")
        raw = painted.permute(1, 2, 0).double().cpu().numpy()
        pixels, mask = view.image(order.pixels), view.mask(order.mask)
        normal = pixels.permute(1, 2, 0).double().numpy()
        shown = view.image(image).permute(1, 2, 0).double().numpy()
        scores = gate.score(shown, normal, mask[0].numpy() > 0, raw)
        return Made(order, image, scores, gate.verdict(scores))

    # -- a run ---------------------------------------------------------------------------------------------------------

    def run(
        self,
        output: Path,
        normals: Mapping[str, Sequence[Path]],
        counts: dict[tuple[str, str], int],
        masks: dict[tuple[str, str], MaskSource],
        *,
        roi: Region | None = None,
        controls: int = 4,
        on_progress: Callable[[int, int, int], None] | None = None,
        worker: WorkerShare | None = None,
    ) -> dict[str, Any]:
        """Make pairs until every quota is met or its retries are used up; go on where an earlier run stopped.

        Images are written under ``accepted/PRODUCT/DEFECT/image`` and ``mask``, rejects under ``rejected`` with the
        reason in ``manifest.jsonl``. The files are the same for any number of processes, and after any interruption.

        Args:
            output: folder of the run.
            normals: normal images by product.
            counts: pairs wanted, by (product, defect).
            masks: sources of masks, by (product, defect).
            roi: returns the region (H, W) bool where defects may lie, from a file and its pixels; the foreground where
                ``None``.
            controls: pairs per (product, defect) that are made with the prompt of the normal product, for the report.
            on_progress: callback(finished, wanted, rejected), as far as this process knows.
            worker: the part of the batches that this process makes; all of them where ``None``.

        Returns:
            The summary that is also written to ``summary.json``.

        Raises:
            DitAttnError: the disk is full, or masks fit nowhere.
        """
        maker = PairMaker(self, output, normals, masks, roi)
        return fill_quotas(
            output, counts, self.config, self.concept, answered_here(maker), controls=controls, on_progress=on_progress,
            worker=worker,
        )  # fmt: skip

    def order(
        self,
        product: str,
        defect: str,
        number: int,
        attempt: int,
        normals: Sequence[Path],
        masks: MaskSource,
        roi: Region | None = None,
    ) -> Order:
        """Choose the normal image, the mask and the noise of one pair by its own seed."""
        rng = np.random.default_rng(seed_of(self.config.seed, product, defect, number, "pair"))
        path = normals[int(rng.integers(len(normals)))]
        pixels = read_image(path)
        region = foreground(pixels) if roi is None else roi(path, pixels)
        mask = masks.sample(region, rng)
        seed = seed_of(self.config.seed, product, defect, number, attempt)
        return Order(product, defect, number, attempt, path, pixels, mask, seed, masks.kind)


class PairMaker:
    """Makes requested pairs and writes them.

    Args:
        generator: makes them.
        output: folder of the run.
        normals: normal images by product.
        masks: sources of masks, by (product, defect).
        roi: returns the region (H, W) bool where defects may lie; the foreground where ``None``.
    """

    def __init__(
        self,
        generator: AnomalyGenerator,
        output: Path,
        normals: Mapping[str, Sequence[Path]],
        masks: dict[tuple[str, str], MaskSource],
        roi: Region | None = None,
    ):
        self.generator, self.output, self.normals, self.masks, self.roi = generator, output, normals, masks, roi

    def __call__(self, request: dict[str, Any]) -> Any:
        """Make a batch and return its rows of the manifest, or make controls and return their figures.

        Args:
            request: see :func:`~dit_attn.pipelines.anomaly.quotas.fill_quotas`.
        """
        if "controls" in request:
            product, defect = request["pair"]
            return self._controls(product, defect, request["controls"])
        attempt = request["attempt"]
        orders = [self._order(product, defect, number, attempt) for product, defect, number in request["pairs"]]
        made = self.generator.make(orders)
        return [self._write(one) for one, missing in zip(made, request["missing"]) if missing]

    def _order(self, product: str, defect: str, number: int, attempt: int) -> Order:
        masks = self.masks[product, defect]
        return self.generator.order(product, defect, number, attempt, self.normals[product], masks, self.roi)

    def _write(self, made: Made) -> dict[str, Any]:
        order, generator, output = made.order, self.generator, self.output
        decision = "rejected" if made.rejected else "accepted"
        stem = f"{order.number:06d}" + (f"_{order.attempt}" if made.rejected else "")
        folder = Path(decision) / order.product / order.defect
        image, mask = folder / "image" / f"{stem}.png", folder / "mask" / f"{stem}.png"
        write_png(output / image, made.image)
        write_png(output / mask, order.mask.astype(np.uint8) * 255)
        settings = generator.concept.settings if generator.concept is not None else None
        return {
            "product": order.product, "defect": order.defect, "number": order.number, "attempt": order.attempt,
            "decision": decision, "reason": made.rejected, "generated": image.as_posix(), "mask_file": mask.as_posix(),
            "source_image": str(order.normal), "mask_source": order.mask_source, "seed": order.seed,
            "scores": asdict(made.scores) if made.scores else {},
            "concept": f"{order.product}+{order.defect}" if settings else "",
            "model": settings.model if settings else "",
            "licence": settings.licence if settings else "", "config": asdict(generator.config),
            "methods": [method.to_dict() for method in generator.methods],
        }  # fmt: skip

    def _controls(self, product: str, defect: str, count: int) -> dict[str, Any]:
        """Ratios of images that were painted with the prompt of the normal product."""
        generator = self.generator
        batch, orders = generator.config.batch, [self._order(product, defect, 10**6 + i, 0) for i in range(count)]
        made = [one for start in range(0, count, batch)
                for one in generator.make(orders[start : start + batch], control=True)]  # fmt: skip
        scores = [one.scores for one in made if one.scores is not None]
        return {
            "count": len(made), "accepted": sum(not one.rejected for one in made),
            "ratio": float(np.mean([one.ratio for one in scores])),
            "fill": float(np.mean([one.fill for one in scores])),
        }  # fmt: skip
