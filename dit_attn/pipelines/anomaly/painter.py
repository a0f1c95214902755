"""Paint masks of normal images with a stock pipeline: text, concept, and blending at every step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F

from dit_attn.api import enabled
from dit_attn.pipelines.anomaly.backbone import Backbone, Text, joined
from dit_attn.pipelines.anomaly.blend import Blend, blended
from dit_attn.pipelines.anomaly.concept import Concept, applied
from dit_attn.pipelines.anomaly.orders import GenerateConfig, Order
from dit_attn.pipelines.anomaly.reweighting import Reweighting, touched_tokens
from dit_attn.pipelines.anomaly.training import filled
from dit_attn.processors.methods.adaptive_reweighting import AdaptiveReweighting
from dit_attn.processors.methods.base import Method


class Painter:
    """Paint with one pipeline, one concept and one set of prompts.

    Args:
        backbone: the pipeline.
        concept: what was learned, on the device of the pipeline; ``None``: the words alone.
        config: how.
        prompt, normal_prompt: templates.
        methods: for the time of the calls.

    Attributes:
        reports: what the methods said of the last batch, by slug.
    """

    def __init__(
        self,
        backbone: Backbone,
        concept: Concept | None,
        config: GenerateConfig,
        prompt: str,
        normal_prompt: str,
        methods: Sequence[Method] = (),
    ):
        self.backbone, self.concept, self.config = backbone, concept, config
        self.prompt, self.normal_prompt, self.methods = prompt, normal_prompt, tuple(methods)
        self.reports: dict[str, Any] = {}

    def encode_prompts(self, pairs: Sequence[tuple[str, str]], free: bool = False) -> None:
        """Encode the prompts of some pairs now, and drop the text encoders if ``free``."""
        for product, defect in pairs:
            self.backbone.text(filled(self.prompt, product, defect))
            self.backbone.text(filled(self.normal_prompt, product, ""))
        if free:
            self.backbone.free_text_encoders()

    @torch.no_grad()
    def paint(
        self, orders: Sequence[Order], images: torch.Tensor, masks: torch.Tensor, control: bool = False
    ) -> torch.Tensor:
        """Paint views of normal images; (B, 3, size, size) in [0, 1], on the CPU.

        Args:
            orders: whose names and seeds count.
            images: (B, 3, size, size) in [0, 1].
            masks: (B, 1, size, size) in {0, 1}.
            control: use the prompt of the normal product and no concept.
        """
        backbone, config, pipe = self.backbone, self.config, self.backbone.pipe
        family, device = backbone.family, backbone.device
        masks = masks.to(device)
        clean = backbone.encode(images)
        noise = torch.stack(
            [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(order.seed)) for order in orders]
        ).to(device)
        kept, start = backbone.pack(clean), backbone.pack(noise)
        wide = self._region(masks, config.dilate, clean)
        exact = self._region(masks, 0, clean)
        text = joined([self._order_text(order, control) for order in orders], family.masked)
        own = text["prompt_embeds"].shape[1]
        blend = Blend(kept, start, lambda level: wide if level > config.dilate_above else exact)
        with ExitStack() as stack:
            if self.concept is not None and not control:
                pairs = torch.tensor([self.concept.index(o.product, o.defect) for o in orders], device=device)
                text = self.concept.extend(text, family.masked, pairs, masks)
                stack.enter_context(applied(self.concept, pipe.transformer))
            session = stack.enter_context(enabled(pipe, *self.methods)) if self.methods else None
            method, length = AdaptiveReweighting.among(self.methods), text["prompt_embeds"].shape[1]
            if session is not None and method is not None and length > own:
                learned = torch.arange(length) >= own
                weights = Reweighting(method, session, kept, touched_tokens(backbone, masks), learned)
                blend.on_clean = weights.update
            stack.enter_context(blended(pipe.scheduler, blend))
            latents = start.to(backbone.dtype)  # pipelines multiply it by their first level
            words = {key: self._typed(value) for key, value in text.items()}
            negative = self._negative(orders, text)
            size = backbone.resolution
            out = pipe(
                prompt=None, **words, **negative, latents=latents, height=size, width=size,
                num_inference_steps=config.steps, output_type="pt", **{family.guidance: config.guidance},
                **(family.call or {}),
            )  # fmt: skip
            self.reports = dict(session.reports) if session is not None else {}
        return out.images.float().clamp(0, 1).cpu()

    def _order_text(self, order: Order, control: bool) -> Text:
        if control:
            return self.backbone.text(filled(self.normal_prompt, order.product, ""))
        return self.backbone.text(filled(self.prompt, order.product, order.defect))

    def _negative(self, orders: Sequence[Order], text: Text) -> dict[str, torch.Tensor]:
        """The normal product's text, as long as ``text``; nothing where there is no guidance."""
        if self.config.guidance <= 1.0:
            return {}
        masked = self.backbone.family.masked
        plain = joined([self.backbone.text(filled(self.normal_prompt, order.product, "")) for order in orders], masked)
        out: dict[str, torch.Tensor] = {}
        for key in text:
            value = plain[key].to(text[key])
            missing = max(0, text[key].shape[1] - value.shape[1]) if key != "pooled_prompt_embeds" else 0
            if missing and key == masked:
                value = F.pad(value, (0, missing))
            elif missing:
                value = torch.cat([value, value[:, -1:].expand(-1, missing, -1)], 1)
            out[f"negative_{key}"] = self._typed(value)
        return out

    def _typed(self, value: torch.Tensor) -> torch.Tensor:
        """Text in the type of the weights."""
        return value.to(self.backbone.dtype) if value.is_floating_point() else value

    def _region(self, masks: torch.Tensor, dilate: int, clean: torch.Tensor) -> torch.Tensor:
        """Cells of the latents that are painted, in the pipeline's form."""
        cells = self.backbone.cells(masks, self.backbone.factor)
        if dilate:
            reach = dilate * (self.backbone.cell // self.backbone.factor)
            cells = F.max_pool2d(cells, 2 * reach + 1, 1, reach)
        return self.backbone.pack(cells.expand(-1, clean.shape[1], -1, -1))
