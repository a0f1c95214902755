"""The stock pipelines that anomalies are learned on: text, latents and clean predictions in one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.high_resolution.latents import encode, form_of, pixels_per_token

_QWEN_TEXT = 128  # tokens of a prompt, padding included; longer ones have a multiple

Text = dict[str, torch.Tensor]
"""What ``encode_prompt`` gave, by the name of the pipeline's argument; batch first."""


@dataclass(frozen=True)
class Family:
    """How a kind of pipeline is called.

    Attributes:
        encode: text of one prompt.
        predict: the transformer's output for latents as the pipeline holds them, times in [0, 1000] and text.
        guidance: name of the argument of the pipeline that scales guidance.
        masked: name of the argument that says which text tokens exist, ``""`` for none.
        call: further arguments of the pipeline.
    """

    encode: Callable[[Any, str], Text]
    predict: Callable[[Any, torch.Tensor, torch.Tensor, Text, tuple[int, int]], torch.Tensor]
    guidance: str = "guidance_scale"
    masked: str = ""
    call: dict[str, Any] | None = None


def _encode_pixart(pipe: Any, prompt: str) -> Text:
    length = min(300, int(getattr(pipe.tokenizer, "model_max_length", 300)))
    found = pipe.encode_prompt(
        prompt, do_classifier_free_guidance=False, clean_caption=False, max_sequence_length=length
    )
    return {"prompt_embeds": found[0], "prompt_attention_mask": found[1]}


def _predict_pixart(pipe: Any, z: torch.Tensor, time: torch.Tensor, text: Text, size: tuple[int, int]) -> torch.Tensor:
    model, batch = pipe.transformer, len(z)
    sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if getattr(model, "use_additional_conditions", False):
        sizes = {
            "resolution": z.new_tensor([size]).repeat(batch, 1),
            "aspect_ratio": z.new_tensor([[size[0] / size[1]]]).repeat(batch, 1),
        }
    out = model(
        z, encoder_hidden_states=text["prompt_embeds"], encoder_attention_mask=text["prompt_attention_mask"],
        timestep=time, added_cond_kwargs=sizes, return_dict=False,
    )[0]  # fmt: skip
    return out.chunk(2, 1)[0] if model.config.out_channels == 2 * z.shape[1] else out


def _encode_sd3(pipe: Any, prompt: str) -> Text:
    length = min(256, int(getattr(pipe.tokenizer_3, "model_max_length", 256) if pipe.tokenizer_3 else 256))
    found = pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"prompt_embeds": found[0], "pooled_prompt_embeds": found[2]}


def _predict_sd3(pipe: Any, z: torch.Tensor, time: torch.Tensor, text: Text, size: tuple[int, int]) -> torch.Tensor:
    return pipe.transformer(
        z, timestep=time, encoder_hidden_states=text["prompt_embeds"],
        pooled_projections=text["pooled_prompt_embeds"], return_dict=False,
    )[0]  # fmt: skip


def _encode_flux(pipe: Any, prompt: str) -> Text:
    length = min(512, int(getattr(pipe.tokenizer_2, "model_max_length", 512)))
    found = pipe.encode_prompt(prompt, None, max_sequence_length=length)
    return {"prompt_embeds": found[0], "pooled_prompt_embeds": found[1]}


def _predict_flux(pipe: Any, z: torch.Tensor, time: torch.Tensor, text: Text, size: tuple[int, int]) -> torch.Tensor:
    model, cell = pipe.transformer, 2 * int(pipe.vae_scale_factor)
    rows, columns = size[0] // cell, size[1] // cell
    ids = pipe._prepare_latent_image_ids(len(z), rows, columns, z.device, z.dtype)
    guidance = z.new_full((len(z),), 3.5) if model.config.guidance_embeds else None
    return model(
        hidden_states=z, timestep=time / 1000, guidance=guidance, pooled_projections=text["pooled_prompt_embeds"],
        encoder_hidden_states=text["prompt_embeds"], img_ids=ids,
        txt_ids=z.new_zeros(text["prompt_embeds"].shape[1], 3), return_dict=False,
    )[0]  # fmt: skip


def _encode_qwen(pipe: Any, prompt: str) -> Text:
    words, mask = pipe.encode_prompt(prompt)
    exists = torch.ones(words.shape[:2], dtype=torch.long, device=words.device) if mask is None else mask
    # Text has rotary positions here. Learned vectors follow the padding, so that one length for all prompts gives them
    # one position, whatever else is in the batch.
    missing = -words.shape[1] % _QWEN_TEXT
    return {"prompt_embeds": F.pad(words, (0, 0, 0, missing)), "prompt_embeds_mask": F.pad(exists, (0, missing))}


def _predict_qwen(pipe: Any, z: torch.Tensor, time: torch.Tensor, text: Text, size: tuple[int, int]) -> torch.Tensor:
    cell = 2 * int(pipe.vae_scale_factor)
    return pipe.transformer(
        hidden_states=z, timestep=time / 1000, encoder_hidden_states=text["prompt_embeds"],
        encoder_hidden_states_mask=text["prompt_embeds_mask"],
        img_shapes=[[(1, size[0] // cell, size[1] // cell)]] * len(z), return_dict=False,
    )[0]  # fmt: skip


_PIXART = Family(
    _encode_pixart, _predict_pixart, masked="prompt_attention_mask",
    call={"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None},
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    "PixArtSigmaPipeline": _PIXART,
    "PixArtAlphaPipeline": _PIXART,
    "StableDiffusion3Pipeline": Family(_encode_sd3, _predict_sd3),
    "FluxPipeline": Family(_encode_flux, _predict_flux, guidance="true_cfg_scale"),
    "QwenImagePipeline": Family(_encode_qwen, _predict_qwen, guidance="true_cfg_scale", masked="prompt_embeds_mask"),
}


def joined(texts: Sequence[Text], masked: str) -> Text:
    """Join texts of one sample each to a batch; where ``masked`` names a mask, shorter ones are filled up.

    Args:
        texts: what :meth:`Backbone.text` gave.
        masked: name of the text's mask, ``""`` for none.
    """
    if masked:
        longest = max(text["prompt_embeds"].shape[1] for text in texts)
        texts = [
            {
                **text,
                "prompt_embeds": F.pad(text["prompt_embeds"], (0, 0, 0, longest - text["prompt_embeds"].shape[1])),
                masked: F.pad(text[masked], (0, longest - text[masked].shape[1])),
            }
            for text in texts
        ]
    return {key: torch.cat([text[key] for text in texts]) for key in texts[0]}


class Backbone:
    """A stock pipeline, seen from its latents.

    Args:
        pipe: of a class in ``FAMILIES``.
        resolution: height and width that the model works at, in pixels; ``None`` for its native size.

    Raises:
        DitAttnError: another pipeline, or a resolution that is no multiple of a token.
    """

    def __init__(self, pipe: Any, resolution: int | None = None):
        name = type(pipe).__name__
        if name not in FAMILIES:
            raise DitAttnError(f"anomalies are not there yet for {name}; they are for {', '.join(sorted(FAMILIES))}")
        self.pipe, self.family, self.name = pipe, FAMILIES[name], name
        self._texts: dict[str, Text] = {}
        self.factor = int(pipe.vae_scale_factor)
        self.cell = pixels_per_token(pipe)
        native = int(getattr(pipe.transformer.config, "sample_size", 0) or 128) * self.factor
        self.resolution = native if resolution is None else resolution
        if self.resolution % self.cell or self.resolution < 2 * self.cell:
            raise DitAttnError(
                f"resolution {self.resolution} does not fit {name}; take a multiple of {self.cell} pixels, the size of "
                "a token"
            )
        config = pipe.scheduler.config
        self.flow = type(pipe.scheduler).__name__.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
        default = "flow_prediction" if self.flow else "epsilon"
        self.prediction = config.get("prediction_type", default) or default
        if self.prediction not in ("sample", "epsilon", "flow_prediction"):
            raise DitAttnError(f"{name} predicts {self.prediction!r}; sample, epsilon and flow_prediction are known")

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return next(self.pipe.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the transformer's weights."""
        return self.pipe.transformer.dtype

    def autocast(self) -> Any:
        """Compute in the type of the weights, as a context: what is learned is fp32."""
        wide = self.dtype if self.dtype != torch.float32 else None
        return torch.autocast(self.device.type, wide, enabled=wide is not None)

    @torch.no_grad()
    def text(self, prompt: str) -> Text:
        """Encode a prompt, batch 1; one that was encoded before needs no text encoder."""
        if prompt not in self._texts:
            self._texts[prompt] = {key: value.detach() for key, value in self.family.encode(self.pipe, prompt).items()}
        return self._texts[prompt]

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders in the pipeline."""
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return tuple(name for name in names if getattr(self.pipe, name, None) is not None)

    def free_text_encoders(self) -> None:
        """Drop the text encoders from the pipeline: prompts are encoded by now."""
        for name in self.text_encoders:
            setattr(self.pipe, name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode (B, 3, H, W) in [0, 1] as normalized latents (B, C, h, w), fp32."""
        return encode(self.pipe, pixels.to(self.device))

    @torch.no_grad()
    def round_trip(self, pixels: torch.Tensor) -> torch.Tensor:
        """Send (B, 3, H, W) in [0, 1] through the autoencoder and back, on the CPU: what is lost are its traces."""
        vae, frame = self.pipe.vae, form_of(self.pipe).single_frame
        values = (pixels * 2 - 1).to(self.device, vae.dtype)
        out = vae.decode(vae.encode(values[:, :, None] if frame else values).latent_dist.mode()).sample
        return ((out[:, :, 0] if frame else out).float() / 2 + 0.5).clamp(0, 1).cpu()

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Bring latents (B, C, h, w) into the form in which the pipeline holds them."""
        return form_of(self.pipe).pack(self.pipe, latents)

    def cells(self, mask: torch.Tensor, size: int) -> torch.Tensor:
        """Pool masks (B, 1, H, W) in {0, 1} to cells of ``size`` pixels: any touched cell is 1."""
        return F.max_pool2d(mask, size)

    @torch.no_grad()
    def sample(self, noise: torch.Tensor, text: Text, *, steps: int) -> torch.Tensor:
        """Denoise with the stock pipeline, without guidance: images (B, 3, H, W) in [0, 1], fp32, on the CPU.

        Args:
            noise: latents (B, C, h, w).
            text: of every sample.
            steps: of the scheduler.
        """
        words = {key: value.to(self.dtype) if value.is_floating_point() else value for key, value in text.items()}
        out = self.pipe(
            prompt=None, **words, latents=self.pack(noise).to(self.device, self.dtype),
            height=noise.shape[2] * self.factor, width=noise.shape[3] * self.factor, num_inference_steps=steps,
            output_type="pt", **{self.family.guidance: 1.0}, **(self.family.call or {}),
        )  # fmt: skip
        return out.images.float().clamp(0, 1).cpu()

    def draw_levels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw noise levels (count,): s in (0, 1) of flow models, else time steps."""
        if self.flow:
            return torch.sigmoid(torch.randn(count, generator=generator) + 0.3)
        steps = int(self.pipe.scheduler.config.num_train_timesteps)
        return torch.randint(steps, (count,), generator=generator).float()

    def errors(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, text: Text) -> torch.Tensor:
        """Compute squared errors of the model's objective, (B, C, h, w), packed as the pipeline's latents are.

        Args:
            clean: latents (B, C, h, w).
            noise: of the same shape.
            level: what :meth:`draw_levels` gave.
            text: of every sample.
        """
        size = (clean.shape[2] * self.factor, clean.shape[3] * self.factor)
        clean, noise = self.pack(clean), self.pack(noise)
        shape = (-1, *[1] * (clean.ndim - 1))
        if self.flow:
            sigma = level.to(clean).view(shape)
            alpha, time = 1 - sigma, level.to(clean) * 1000
        else:
            kept = self.pipe.scheduler.alphas_cumprod.to(clean)[level.long().to(clean.device)].view(shape)
            alpha, sigma, time = kept.sqrt(), (1 - kept).sqrt(), level.to(clean)
        noisy = alpha * clean + sigma * noise
        with self.autocast():
            out = self.family.predict(self.pipe, noisy.to(self.dtype), time, text, size).float()
        if self.prediction == "sample":
            return (out - clean).square() / sigma.clamp(min=0.05).square()
        return (out - (noise - clean if self.prediction == "flow_prediction" else noise)).square()
